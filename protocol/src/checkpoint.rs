//! `checkpoint.*`: named points in time from which changes are tracked, managed
//! without a backup.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The chain of requests that name none.
pub const DEFAULT_CHAIN: &str = "default";

pub(crate) fn default_chain() -> String {
    DEFAULT_CHAIN.to_owned()
}

/// Parameters of `checkpoint.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Whose checkpoints; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Those of every chain.
    #[serde(default)]
    pub all_chains: bool,
    /// The disks; absent: all that are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// Names that the host expects: only these are told, and a disk without one
    /// tells it as `missing`. Absent: all names that any disk has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Vec<String>>,
}

/// Result of `checkpoint.list`, and of each method that makes or changes checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DisksResult {
    /// The disks, in the VM's order.
    pub disks: Vec<DiskCheckpoints>,
}

/// A disk and its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskCheckpoints {
    /// Its id.
    pub disk: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// How long its checkpoints live.
    pub tracking: crate::vm::Tracking,
    /// The checkpoints, oldest first; then what is `missing`, then what is `foreign`.
    pub checkpoints: Vec<CheckpointInfo>,
}

/// What can be said of a checkpoint on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It can serve as base.
    Usable,
    /// QEMU did not end in order: what changed since is not known. `checkpoint.repair` removes it.
    Inconsistent,
    /// The disk does not have it, and was expected to.
    Missing,
    /// It is disabled.
    NotRecording,
    /// It was disabled for a time, or merged from parts that do not join: it records,
    /// and is no base.
    Gap,
    /// A dirty bitmap of somebody else; never touched.
    Foreign,
    /// The disk had another size when it was made.
    SizeChanged,
    /// An external snapshot was taken: what the guest wrote since is not recorded by it.
    OnBackingImage,
    /// It was made for another VM, disk or image.
    Mismatch,
    /// Another job or export uses its bitmap.
    Busy,
}

/// A checkpoint on one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointInfo {
    /// Its name; the bitmap's where it is `foreign`.
    pub checkpoint: String,
    /// Whether it can serve as base, or why not.
    pub health: Health,
    /// Its chain; none where it is `foreign`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// The identity of the point in time that it tracks changes from, on this disk:
    /// for `base_id`. None where there is no such point: `gap`, `missing`, `foreign`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When its point in time was: milliseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<u64>,
    /// Bytes changed since, in whole granules cut at the disk's end; none where it cannot be known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes: Option<u64>,
    /// Bytes that one bit stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
    /// Whether the image stores it: it survives an orderly stop of QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// Whether the guest's writes are recorded now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recording: Option<bool>,
    /// Most bytes of memory that its bits take in QEMU: one bit a granule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// Parameters of `checkpoint.create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Its chain; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Its name, new in this chain on each of the disks.
    pub checkpoint: String,
    /// The disks; absent: all that are not excluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// Bytes that one bit stands for: a power of two from 4096 to 67108864; absent: 65536.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
}

/// Parameters of `checkpoint.delete`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Their chain; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Their names.
    pub checkpoints: Vec<String>,
    /// The disks, which must have each of them; absent: all that have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

/// Result of `checkpoint.delete`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeleteResult {
    /// What was deleted, as `disk/checkpoint`.
    pub deleted: Vec<String>,
}

/// Parameters of `checkpoint.disable` and `checkpoint.enable`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ToggleParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Its chain; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Its name.
    pub checkpoint: String,
    /// The disks, which must have it; absent: all that have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

/// Parameters of `checkpoint.merge`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Their chain; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// The result's name: new, or one of `from`, which it then replaces.
    pub checkpoint: String,
    /// The checkpoints whose changes are joined.
    pub from: Vec<String>,
    /// Delete those of `from`, in the same transaction.
    #[serde(default)]
    pub delete_sources: bool,
    /// The disks, which must have each of `from`; absent: all that have all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

/// Parameters of `checkpoint.redefine`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedefineParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Its chain; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Its name; one that a disk has is replaced there.
    pub checkpoint: String,
    /// The disks, and what changed on each.
    pub disks: Vec<RedefineDisk>,
    /// Bytes that one bit stands for, as in `checkpoint.create`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
}

/// A disk of `checkpoint.redefine`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedefineDisk {
    /// Its id.
    pub disk: String,
    /// The host's word on what has changed since that point in time.
    pub changed: Changed,
    /// The identity that the host knows the point in time by; absent: a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When the point in time was: milliseconds since 1970 UTC; absent: as of the
    /// checkpoint that is replaced, else now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<u64>,
}

/// What has changed since a point in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Changed {
    /// In one word.
    Word(ChangedWord),
    /// These ranges, as `[offset, length]` in bytes, in any order; at most `max_extents`.
    Extents(Vec<(u64, u64)>),
}

/// What has changed, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangedWord {
    /// Everything.
    All,
    /// What the disk's bitmaps of that name hold, also those on its backing images:
    /// the host vouches that nothing else was written.
    Recorded,
}

/// Parameters of `checkpoint.repair`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RepairParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// Whose checkpoints; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// Those of every chain.
    #[serde(default)]
    pub all_chains: bool,
    /// The disks; absent: all that are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

/// Result of `checkpoint.repair`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RepairResult {
    /// The disks, in the VM's order.
    pub disks: Vec<RepairedDisk>,
    /// Points in time that are still open in QEMU, by the backup's id: they are left
    /// alone, because another process may live on them.
    pub open_backups: Vec<String>,
}

/// What was repaired on a disk, and what there is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RepairedDisk {
    /// Its id.
    pub disk: String,
    /// Bitmaps of ours that were removed: inconsistent checkpoints, and what a
    /// dead backup had begun.
    pub removed: Vec<String>,
    /// Checkpoints that cannot serve as base here, and why: a backup from one of them is full.
    pub lost: Vec<CheckpointInfo>,
    /// Checkpoints that can serve as base.
    pub usable: Vec<CheckpointInfo>,
    /// Bitmaps of others: untouched.
    pub foreign: Vec<String>,
    /// Bitmaps of ours that should have gone and could not be removed, with the reason.
    pub leftovers: Vec<String>,
}
