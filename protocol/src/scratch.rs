//! Scratch: what the host says of it in `backup.begin`, and hears of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where scratch lies, and how much it may take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScratchChoice {
    /// An existing directory; absent: the plugin's `--scratch-dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Most bytes for each disk, at least 1 MiB; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_max_bytes: Option<u64>,
    /// Most bytes for all disks together, at least 1 MiB; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Bytes that must be free at the start; absent: an eighth of `most_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_free_bytes: Option<u64>,
    /// What to do when a disk's scratch is full.
    #[serde(default)]
    pub on_full: OnFull,
}

/// What to do when a disk's scratch is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    /// Give up the point in time of that disk, so that the guest goes on at once.
    #[default]
    GiveUp,
    /// Let the guest stand still until there is room.
    Wait,
}

/// The room for scratch, at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScratchRoom {
    /// Bytes that are free in its file system.
    pub free_bytes: u64,
    /// Bytes that had to be.
    pub asked_bytes: u64,
    /// Most bytes that could ever be needed.
    pub most_bytes: u64,
}

/// What happened to the scratch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScratchEvent {
    /// It has taken three quarters of its room.
    High,
    /// It is full, and the guest stands still.
    Full,
    /// The disk's point in time was given up: it can no more be read.
    GivenUp,
    /// There is room again, and the guest goes on.
    Resumed,
}

/// Parameters of `scratch`: something happened to a disk's scratch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScratchParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
    /// What happened.
    pub event: ScratchEvent,
    /// Bytes that its scratch takes.
    pub scratch_bytes: u64,
    /// How long the guest stood still, once it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
}
