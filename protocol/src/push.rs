//! `backup.push`: QEMU writes a disk's point in time to a target that the host provides.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::Mode;
use crate::restore::Format;

/// Parameters of `backup.push`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PushParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
    /// Where QEMU writes.
    pub target: Target,
    /// Write compressed clusters: new `qcow2` files only.
    #[serde(default)]
    pub compress: bool,
    /// Most bytes a second; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
    /// Writes under way at a time, 1 to 64; absent: 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<u64>,
    /// Whether QEMU forgets what it has written, so that scratch shrinks; a push that fails
    /// cannot be repeated then (`disk_spent`). Absent: yes, where this QEMU can (9.1) and the
    /// disk is not exported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard_source: Option<bool>,
    /// How long the target may take nothing before it counts as hung: 1000 to 600000;
    /// absent: 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Where QEMU writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// A new image file. It appears under its name only when it is complete and durable.
    File {
        /// An absolute path where nothing is yet, in an existing directory.
        path: String,
        /// Its format.
        format: Format,
        /// The image below it: in an incremental, whose format is qcow2 then; none in a full.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<Backing>,
    },
    /// An image file or block device that exists, and is written over: all of it in a
    /// full, what changed in an incremental.
    Existing {
        /// An absolute path, or `fd:N`: a descriptor that the plugin inherited.
        path: String,
        /// Its format.
        format: Format,
        /// It reads as zeros all over: zeros need not be written.
        #[serde(default)]
        is_zero: bool,
    },
    /// An NBD server of the host's.
    Nbd {
        /// `unix:/path`, `tcp:host:port`, or `fd:N`: a connected socket that the plugin
        /// inherited. It is hung up when the push that has used it ends.
        address: String,
        /// The export's name; absent: the default export, whose name is empty.
        #[serde(default)]
        export: String,
        /// It reads as zeros all over: zeros need not be written.
        #[serde(default)]
        is_zero: bool,
        /// Encrypt the connection; absent: plain.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls: Option<Tls>,
    },
    /// The host, as `record` notifications: the same stream as of `backup.read`.
    Records {},
}

/// The image below an incremental one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// Its name as it shall stand in the new image: absolute, or relative to the new
    /// image's directory.
    pub path: String,
    /// Its format.
    pub format: Format,
}

/// How QEMU encrypts its connection to an NBD server. QEMU reads the files itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Tls {
    /// Certificates.
    X509 {
        /// A directory with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` where
        /// the server asks for them.
        dir: String,
        /// The name that the server's certificate must have; absent: the address's host.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
    },
    /// A pre-shared key.
    Psk {
        /// A directory with `keys.psk`, whose lines are `user:key in hex`.
        dir: String,
        /// The user; absent: `qemu`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        username: Option<String>,
    },
}

/// Result of `backup.push`: the target has all of it, on stable storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushResult {
    /// What was pushed.
    pub mode: Mode,
    /// Bytes that QEMU worked through, in whole clusters of 64 KiB.
    pub copied_bytes: u64,
    /// Most bytes that the disk's scratch file took while this request ran, as sampled.
    pub scratch_peak: u64,
    /// How long it took.
    pub duration_ms: u64,
    /// As in the stream's `end`, with the target `records`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}
