//! `hello`, `shutdown`, `cancel`, `ping`: the session of the process.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::envelope::Id;

/// How the bytes of a record travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// Base64 in the record's own line: for any language, and for debugging.
    #[default]
    Inline,
    /// Raw bytes straight behind the record's line, `payload_bytes` of them.
    Framed,
}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Implementation {
    /// The program.
    pub name: String,
    /// Its version, in its own form.
    pub version: String,
}

// Apart from `Implementation`, because parameters are closed and results are not.
/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The program.
    pub name: String,
    /// Its version, in its own form.
    pub version: String,
}

/// Parameters of `hello`, the first request of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HelloParams {
    /// Protocol versions that the host speaks.
    pub protocols: Vec<u32>,
    /// The host.
    pub host: Host,
    /// How records' bytes shall travel, both ways.
    #[serde(default)]
    pub carrier: Carrier,
}

/// What bounds a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Longest line, without its `\n`.
    pub max_line_bytes: u64,
    /// Longest payload, and `data` record.
    pub max_payload_bytes: u64,
    /// Most unanswered requests.
    pub max_requests: u64,
    /// Longest name of a checkpoint or chain.
    pub max_name_bytes: u64,
    /// Most checkpoints on one disk, those of all chains together.
    pub max_checkpoints: u64,
    /// Most ranges that `checkpoint.redefine` takes for one disk.
    pub max_extents: u64,
}

/// Result of `hello`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HelloResult {
    /// The version that both speak from here on.
    pub protocol: u32,
    /// The plugin.
    pub plugin: Implementation,
    /// The carrier in use.
    pub carrier: Carrier,
    /// All carriers that this plugin has.
    pub carriers: Vec<Carrier>,
    /// What this plugin can do beyond version 1's core; unknown words are ignored.
    pub features: Vec<String>,
    /// What bounds a message.
    pub limits: Limits,
}

/// Parameters of a method that takes none: `ping`, `shutdown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// Result of `ping`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PingResult {}

/// Parameters of `cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CancelParams {
    /// The request to stop.
    pub id: Id,
}

/// Result of `cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CancelResult {
    /// Whether such a request was under way. It is still answered, once: with
    /// `cancelled` or, where it was done before the word came, its result.
    pub found: bool,
}

/// Result of `shutdown`: open backups and restores are aborted, then the process exits with 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ShutdownResult {
    /// Backups and restores that were open and are aborted.
    pub aborted: Vec<String>,
    /// Objects in QEMU, or files, that could not be removed.
    pub leftovers: Vec<String>,
}
