//! `backup.export` and `backup.map`: the host reads a disk's point in time by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::Mode;

/// Parameters of `backup.export`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
    /// `fd:N`: a connected socket that the plugin inherited, whose other end shall be an
    /// NBD client's; absent: clients connect to `address`. It is hung up when the backup
    /// ends, and left alone where the request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// What of an exported disk can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Readable {
    /// Every byte.
    All,
    /// What changed since the base: elsewhere reads, and questions for the allocation, fail.
    Changed,
}

/// Result of `backup.export`. It holds until the backup ends, in whichever way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExportResult {
    /// Where clients connect: `unix:/path`, in a directory that only the plugin's user may
    /// enter. The plugin stands there, and lets them into this export of QEMU's server only.
    pub address: String,
    /// The export's name: the disk's id.
    pub export: String,
    /// Both as an NBD URI.
    pub uri: String,
    /// Bytes.
    pub size: u64,
    /// Full or incremental.
    pub mode: Mode,
    /// What can be read.
    pub readable: Readable,
    /// The meta context of zeros and holes.
    pub allocation_context: String,
    /// The meta context of what changed since the base (flag 1: dirty); none in a full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes_context: Option<String>,
    /// Bytes that one bit of the changes stands for.
    pub granularity: u64,
    /// The lengths of requests that the server takes.
    pub block_size: BlockSize,
}

/// NBD's block size constraints, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockSize {
    /// Offsets and lengths are multiples of it.
    pub minimum: u64,
    /// What is fastest.
    pub preferred: u64,
    /// The longest read.
    pub maximum: u64,
}

/// Parameters of `backup.map`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MapParams {
    /// The backup.
    pub backup: String,
    /// The disk.
    pub disk: String,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExtentKind {
    /// It has to be read.
    Data,
    /// It reads as zeros.
    Zero,
    /// Unchanged since the base.
    Same,
}

/// An extent: offset, length, kind.
pub type Extent = (u64, u64, ExtentKind);

/// Parameters of `extents`: a batch of a map, at most 4096 extents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExtentsParams {
    /// The `backup.map` request.
    pub stream: crate::envelope::Id,
    /// The disk.
    pub disk: String,
    /// Contiguous, also from batch to batch.
    pub extents: Vec<Extent>,
}

/// Result of `backup.map`: the map is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MapResult {
    /// How many there were.
    pub extents: u64,
    /// Bytes of `data`.
    pub data_bytes: u64,
    /// Bytes of `zero`.
    pub zero_bytes: u64,
    /// Bytes of `same`.
    pub same_bytes: u64,
}
