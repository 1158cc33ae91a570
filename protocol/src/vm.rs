//! `vm.inspect`: what is there, and what can be done with it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `vm.inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InspectParams {
    /// QEMU's monitor: `unix:/path`, an absolute path, `tcp:host:port`,
    /// `tls:host:port?x509=/dir` or `tls:host:port?psk=user:/dir`.
    pub monitor: String,
}

/// Result of `vm.inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InspectResult {
    /// QEMU's version, as `10.0.2`.
    pub qemu_version: String,
    /// The VM's name, where it has one.
    pub name: Option<String>,
    /// The VM's UUID, where it has one.
    pub uuid: Option<String>,
    /// QMP's run state (`running`, `paused`, ...); none in a storage daemon.
    pub status: Option<String>,
    /// All disks, also those that backups leave out.
    pub disks: Vec<DiskInfo>,
    /// Nodes, jobs, exports and bitmaps of ours, of any session, living or dead.
    pub our_objects: Vec<String>,
}

/// How long a checkpoint of a disk lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tracking {
    /// Stored in the image: survives an orderly stop of QEMU.
    Persistent,
    /// In memory: gone when QEMU ends.
    Transient,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskInfo {
    /// Its stable id: the device's id, else the backend's name, else the node's.
    pub disk: String,
    /// QEMU's block node; may change from start to start.
    pub node: String,
    /// The image's format: QEMU's driver name.
    pub format: String,
    /// The image's file, as QEMU names it.
    pub file: Option<String>,
    /// Bytes that the guest sees.
    pub size: u64,
    /// The device's path or id in QEMU.
    pub qdev: Option<String>,
    /// The iothread that serves it.
    pub iothread: Option<String>,
    /// How long checkpoints live on it.
    pub tracking: Tracking,
    /// Why backups leave it out (`read_only`, `removable`, `no_medium`, ...); none: they don't.
    pub excluded: Option<String>,
}
