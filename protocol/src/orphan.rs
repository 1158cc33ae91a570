//! `backup.attach` and `reclaim`: backups whose process has ended.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::BackupDisk;

/// Parameters of `backup.attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// The backup that another process has begun.
    pub backup: String,
}

/// Result of `backup.attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachResult {
    /// The backup's id, as before.
    pub backup: String,
    /// The point in time, as `backup.begin` told it.
    pub time_ms: u64,
    /// Its disks, as `backup.begin` told them, and how far they are.
    pub disks: Vec<AttachedDisk>,
}

/// A disk of a backup that was taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachedDisk {
    /// The disk.
    #[serde(flatten)]
    pub disk: BackupDisk,
    /// Where `backup.read` goes on: the last ack, or 0. Absent: it can no more be read,
    /// because parts were given back that were not acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<u64>,
    /// Whether it can be committed: a stream had reached its end, a push was done, or it
    /// was exported.
    pub complete: bool,
}

/// Parameters of `reclaim`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReclaimParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Backups to be removed also where they are kept for `backup.attach`; absent: all
    /// that are dead and not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backups: Option<Vec<String>>,
    /// Remove `backups` also where nobody here can tell whether their process lives: the
    /// host's word that it does not. Never one that lives.
    #[serde(default)]
    pub force: bool,
}

/// Result of `reclaim`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReclaimResult {
    /// Backups that were removed.
    pub reclaimed: Vec<String>,
    /// Backups that are in QEMU still.
    pub left: Vec<LeftBackup>,
    /// Objects in QEMU, or files, that could not be removed, with the reason.
    pub leftovers: Vec<String>,
}

/// A backup that was not reclaimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeftBackup {
    /// Its id.
    pub backup: String,
    /// Why.
    pub state: BackupState,
}

/// Whether the process lives that has begun a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BackupState {
    /// It lives.
    Alive,
    /// It has ended.
    Dead,
    /// It has ended, and `keep_ms` is not over.
    Kept,
    /// It is on another machine or in another container, or of another version.
    Unknown,
}
