//! Notifications: what the plugin says unasked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::envelope::Id;
use crate::record::Record;

/// Parameters of `record`: one record of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RecordParams {
    /// The `backup.read` or `backup.push` request that asked for the stream.
    pub stream: Id,
    /// The record.
    pub record: Record,
    /// A `data` record's bytes in base64, with the `inline` carrier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// Parameters of `progress`: at most 4 a second for a stream or push, at least one each 10 s.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressParams {
    /// The request that it is about.
    pub stream: Id,
    /// The disk.
    pub disk: String,
    /// Bytes of the disk that are passed; in a push, that QEMU has worked through. Never falls.
    pub done: u64,
    /// Bytes of the disk; in a push, that QEMU has to work through.
    pub total: u64,
    /// Bytes of `data` records so far; 0 in a push to another target.
    pub data_bytes: u64,
    /// Bytes that the disk's scratch file takes now.
    pub scratch_bytes: u64,
}

/// What happened to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmEvent {
    /// The guest stands still.
    Paused,
    /// The guest runs again.
    Resumed,
    /// The guest is shutting down.
    Shutdown,
    /// The guest was reset.
    Reset,
    /// A disk of the guest had an I/O error.
    IoError,
    /// The monitor's connection ended.
    MonitorClosed,
}

/// Parameters of `vm`: something happened to the VM of an open backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmParams {
    /// The backup.
    pub backup: String,
    /// What happened.
    pub event: VmEvent,
    /// QEMU's own account, where it gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}
