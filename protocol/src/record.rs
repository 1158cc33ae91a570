//! Records: the units of a stream. A stored stream is these as lines, each
//! `data` record's bytes straight behind its line.

use schemars::JsonSchema;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize};

use crate::backup::{FullReason, Mode};
use crate::error::Action;

/// The version of the stream's format.
pub const FORMAT: u32 = 1;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The stream starts.
    Begin(Begin),
    /// Bytes of the disk; exactly `length` bytes of payload go with it.
    Data {
        /// First byte.
        offset: u64,
        /// Number of bytes: 1 to `max_payload_bytes`.
        length: u64,
        /// CRC-32 (ISO-HDLC: zlib's, PNG's) of the payload.
        crc32: u32,
    },
    /// A range that reads as zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        length: u64,
        /// The source has no storage for it.
        #[serde(
            default,
            deserialize_with = "or_default",
            skip_serializing_if = "std::ops::Not::not"
        )]
        hole: bool,
    },
    /// A range that is unchanged since the base.
    Same {
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        length: u64,
    },
    /// The stream is complete.
    End(End),
    /// The stream broke off: nothing of it may count as a backup.
    Failed {
        /// Why: a code of the error table, or a later version's.
        code: String,
        /// What the host should do next.
        action: Action,
        /// How far it came.
        offset: u64,
    },
}

/// What a stream is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Begin {
    /// The stream's format: 1.
    pub format: u32,
    /// The disk's id.
    pub disk: String,
    /// The disk's bytes.
    pub size: u64,
    /// Full or incremental.
    #[serde(deserialize_with = "word")]
    pub mode: Mode,
    /// Why it is full although a base was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<FullReason>,
    /// The checkpoint that `same` refers to; none in a full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The checkpoint that goes with this point in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The grain of change tracking.
    pub granularity: u64,
    /// Where the records start: 0, or the offset that a broken stream goes on from.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "is_zero"
    )]
    pub offset: u64,
}

/// A member that is null means the same as one that is absent.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A word and nothing else: serde alone reads `{"full":null}` for `"full"` too.
fn word<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(String::deserialize(deserializer)?.into_deserializer())
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What a complete stream adds up to. Counts and digest run from offset 0,
/// also in a stream that goes on from another offset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct End {
    /// Number of `data`, `zero` and `same` records.
    pub records: u64,
    /// Sum of the `data` records' lengths.
    pub data_bytes: u64,
    /// Sum of the `zero` records' lengths.
    pub zero_bytes: u64,
    /// Sum of the `same` records' lengths.
    pub same_bytes: u64,
    /// SHA-256, in hex, as the specification defines.
    pub digest: String,
}
