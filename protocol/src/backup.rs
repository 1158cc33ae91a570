//! `backup.*`: a point in time, its streams, and the host's word on them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::default_chain;
use crate::consistency::{Consistency, Reached};
use crate::scratch::{ScratchChoice, ScratchRoom};
use crate::vm::Tracking;

/// A member that may be absent (inherit) or null (none).
fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Some)
}

/// Parameters of `backup.begin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BeginParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// The disks; absent: all that are not excluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskChoice>>,
    /// The chain of all checkpoints that this backup names; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// The checkpoint that incrementals are relative to; null or absent: full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The checkpoint to create with the point in time; null or absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// Fail with `base_unusable` where a disk's base cannot serve, rather than make that disk full.
    #[serde(default)]
    pub strict: bool,
    /// Where scratch lies, and how much it may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<ScratchChoice>,
    /// Keep readable also what did not change since the base, rather than give it back at
    /// once: for programs that read the whole of an exported disk. Takes more scratch.
    #[serde(default)]
    pub keep_unchanged: bool,
    /// How long the point in time outlives the host or the plugin, for `backup.attach`: at
    /// least so many milliseconds from the last ack or other sign of life. 0: not at all.
    #[serde(default)]
    pub keep_ms: u64,
    /// Whether the guest is held still for the instant; absent: `crash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
}

/// A disk of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskChoice {
    /// Its id, from `vm.inspect`.
    pub disk: String,
    /// Its own base: absent: the backup's; null: full.
    #[serde(
        default,
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "Option<String>")]
    pub base: Option<Option<String>>,
    /// The identity of the base that the host has stored: `checkpoint_id` of the backup
    /// that made it. A base of another identity cannot serve: `base_mismatch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_id: Option<String>,
}

/// What a stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All of the disk.
    Full,
    /// What changed since the base.
    Incremental,
}

impl Mode {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// Why a disk is full although a base was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FullReason {
    /// The disk has no checkpoint of that name.
    BaseMissing,
    /// Its bitmap was not stored when QEMU ended: changes may be missing.
    BaseInconsistent,
    /// It is disabled: changes were not recorded.
    BaseNotRecording,
    /// Another job or export uses its bitmap.
    BaseBusy,
    /// It was disabled for a time: changes are missing.
    BaseGap,
    /// It is of another VM, disk or image, or of another point in time than the host says.
    BaseMismatch,
    /// The disk had it, and QEMU lost its bitmap: it ended before the image stored it,
    /// or the format stores none.
    BitmapLost,
    /// An external snapshot was taken: what was written since is not recorded by it.
    OnBackingImage,
    /// The disk had another size when it was made.
    SizeChanged,
    /// A reason that this version does not know: it stands in a stream of a later one.
    #[serde(other)]
    Other,
}

/// Result of `backup.begin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BeginResult {
    /// The backup's id, for the other methods.
    pub backup: String,
    /// The point in time: milliseconds since 1970 UTC, by the plugin's clock.
    pub time_ms: u64,
    /// What it is consistent with; absent: `crash`, and nothing else was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Reached>,
    /// The room for scratch.
    pub scratch: ScratchRoom,
    /// The disks, in the order that was asked for.
    pub disks: Vec<BackupDisk>,
}

/// Parameters of `backup.begin_group`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BeginGroupParams {
    /// One for each VM, as of `backup.begin`; each has a monitor of its own.
    pub members: Vec<BeginParams>,
}

/// Result of `backup.begin_group`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BeginGroupResult {
    /// One for each member, in their order. From here on each is a backup of its own.
    pub backups: Vec<BeginResult>,
    /// Microseconds that the points in time lie apart at most: from the first transaction
    /// sent to the last one answered.
    pub skew_us: u64,
}

/// A disk of an open backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupDisk {
    /// Its id.
    pub disk: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// What was asked for.
    pub planned: Mode,
    /// What it is.
    pub mode: Mode,
    /// Why `mode` is not `planned`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<FullReason>,
    /// The base; none in a full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The checkpoint that commit will make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The identity of this point in time on this disk: the `base_id` of the next backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_id: Option<String>,
    /// How long that checkpoint will live.
    pub tracking: Tracking,
    /// Bytes that one bit of the base's bitmap stands for; of ours, in a full.
    pub granularity: u64,
    /// Most bytes that `data` and `zero` records can hold together: the disk's
    /// size in a full, the changed granules in an incremental.
    pub changed_bytes: u64,
}

/// Parameters of `backup.estimate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EstimateParams {
    /// QEMU's monitor, as in `vm.inspect`.
    pub monitor: String,
    /// The disks, as in `backup.begin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskChoice>>,
    /// The chain of the bases; absent: `default`.
    #[serde(default = "default_chain")]
    pub chain: String,
    /// The base, as in `backup.begin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// Result of `backup.estimate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EstimateResult {
    /// The disks, in the order that was asked for.
    pub disks: Vec<DiskEstimate>,
}

/// What a backup of a disk would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskEstimate {
    /// Its id.
    pub disk: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// What was asked for.
    pub planned: Mode,
    /// What it would be.
    pub mode: Mode,
    /// Why `mode` is not `planned`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<FullReason>,
    /// The base; none in a full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Most bytes that it could read now: the disk's size in a full, the changed
    /// granules in an incremental.
    pub changed_bytes: u64,
    /// Bytes that it would read now, by the best that can be known without a point
    /// in time: what the images have allocated in a full, `changed_bytes` in an incremental.
    pub read_bytes: u64,
}

/// When QEMU may forget what a stream has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Release {
    /// As it is handed to the host: least scratch; a broken stream cannot go on.
    #[default]
    OnRead,
    /// With `backup.ack`: a broken stream goes on from the last ack.
    OnAck,
}

/// Parameters of `backup.read`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
    /// Where to go on: 0, or what `backup.ack` last answered.
    #[serde(default)]
    pub offset: u64,
    /// When QEMU may forget what was read.
    #[serde(default)]
    pub release: Release,
    /// `data` records never cross a multiple of this: a power of two from 64 KiB
    /// to `max_payload_bytes`, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_max: Option<u64>,
}

/// Result of `backup.read`: the stream's `end`, and what it cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReadResult {
    /// As in the stream's `end`.
    pub digest: String,
    /// Bytes that were read from QEMU by this request.
    pub read_bytes: u64,
    /// Most bytes that the disk's scratch file took while this request ran, as sampled.
    pub scratch_peak: u64,
    /// How long it took.
    pub duration_ms: u64,
}

/// Parameters of `backup.ack`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AckParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
    /// All records that end at or before this offset are stored by the host.
    pub offset: u64,
}

/// Result of `backup.ack`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AckResult {
    /// Where `backup.read` can go on: at most `offset`. Before it, the view is given back.
    pub resume: u64,
}

/// Parameters of `backup.commit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitParams {
    /// The backup.
    pub backup: String,
    /// The disks that the host has stored; absent: all. The others end as by abort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// Names of old checkpoints to delete on the committed disks, once the new one
    /// is there; names that a disk does not have are passed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub delete_checkpoints: Vec<String>,
}

/// Result of `backup.commit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommitResult {
    /// Disks that now have the new checkpoint; empty where none was asked for.
    pub committed: Vec<String>,
    /// Checkpoints that were deleted, as `disk/checkpoint`.
    pub deleted: Vec<String>,
    /// Objects in QEMU that could not be removed, with the reason; also checkpoints
    /// that were to be deleted. The commit is done all the same.
    pub leftovers: Vec<String>,
}

/// Parameters of `backup.abort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AbortParams {
    /// The backup.
    pub backup: String,
}

/// Result of `backup.abort` and `restore.abort`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AbortResult {
    /// Objects in QEMU, or files, that could not be removed, with the reason.
    pub leftovers: Vec<String>,
}
