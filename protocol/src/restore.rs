//! `restore.*`: stored streams become a disk image again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::Record;

/// The target's image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// The disk's bytes as they are, sparse.
    Raw,
    /// QEMU's image format, version 3.
    Qcow2,
}

/// Parameters of `restore.begin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreBeginParams {
    /// The image to make: an absolute path in an existing directory, where
    /// nothing is yet. It appears under this name only with `restore.finish`.
    pub target: String,
    /// Its format.
    pub format: Format,
    /// The disk's bytes, as the streams' `begin` says.
    pub size: u64,
}

/// Result of `restore.begin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreBeginResult {
    /// The restore's id, for the other methods.
    pub restore: String,
}

/// Parameters of `restore.write`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreWriteParams {
    /// The restore.
    pub restore: String,
    /// The next record of the chain, as it was stored.
    pub record: Record,
    /// Its bytes in base64, with the `inline` carrier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// Result of `restore.write`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreWriteResult {
    /// Where the next record of this stream must start.
    pub offset: u64,
}

/// Parameters of `restore.finish` and `restore.abort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreParams {
    /// The restore.
    pub restore: String,
}

/// Result of `restore.finish`: the image is complete, checked, and on stable storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreFinishResult {
    /// The image.
    pub target: String,
    /// The disk's bytes.
    pub size: u64,
    /// Streams that made it.
    pub streams: usize,
    /// Bytes of `data` records that were written.
    pub data_bytes: u64,
    /// The checkpoint that it is equal to.
    pub checkpoint: Option<String>,
}
