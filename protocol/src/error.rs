//! Errors: a stable code, and what the host does next.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the host should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Never send the same request again: it cannot succeed.
    FixRequest,
    /// The same request may succeed later.
    Retry,
    /// Ask again without the base, or without `strict`.
    TakeFull,
    /// Make room, then ask again.
    FreeSpace,
    /// A person has to look at the machine or its configuration.
    AskOperator,
    /// A defect of this program: report it.
    ReportBug,
}

/// What an error has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateLeft {
    /// Everything is as it was before the request.
    Unchanged,
    /// The stream has ended without `end`, or the push has failed; the backup is open, and the
    /// disk may be read or pushed again.
    BackupOpen,
    /// The push has failed, and QEMU has begun to forget what it wrote: the backup is open,
    /// but for other disks only.
    DiskSpent,
    /// The backup or restore has ended as by abort: all is cleaned up.
    Aborted,
    /// The monitor's connection ended with a command under way: look before
    /// anything is done again.
    Unknown,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $number:literal, $action:ident;)*) => {
        /// What went wrong. New codes may come with any version; a host that
        /// meets an unknown one goes by `action`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the specification's table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The code's name on the wire.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The JSON-RPC number that goes with it.
            #[must_use]
            pub fn number(self) -> i32 {
                match self { $(Self::$variant => $number),* }
            }

            /// What the host should do next.
            #[must_use]
            pub fn action(self) -> Action {
                match self { $(Self::$variant => Action::$action),* }
            }
        }
    };
}

codes! {
    /// The line is not one JSON object in UTF-8, or has a NUL.
    ParseError = "parse_error", -32700, FixRequest;
    /// The line is longer than `max_line_bytes`.
    LineTooLong = "line_too_long", -32700, FixRequest;
    /// A JSON object, but no JSON-RPC 2.0 request with a usable id.
    InvalidRequest = "invalid_request", -32600, FixRequest;
    /// The id belongs to a request that is not answered yet.
    DuplicateId = "duplicate_id", -32600, FixRequest;
    /// More than `max_requests` are unanswered.
    TooManyRequests = "too_many_requests", -32000, Retry;
    /// No method of that name.
    MethodNotFound = "method_not_found", -32601, FixRequest;
    /// The parameters do not fit the method: wrong type, unknown or missing member, odd name.
    InvalidParams = "invalid_params", -32602, FixRequest;
    /// A payload where none belongs, or one of another length than its record says.
    InvalidPayload = "invalid_payload", -32602, FixRequest;
    /// The first request must be `hello`, and only the first.
    HelloExpected = "hello_expected", -32000, FixRequest;
    /// No protocol version in common; `supported` lists ours.
    VersionUnsupported = "version_unsupported", -32000, AskOperator;
    /// The request was cancelled.
    Cancelled = "cancelled", -32000, Retry;
    /// No backup of that id.
    UnknownBackup = "unknown_backup", -32000, FixRequest;
    /// The backup was ended in another way than is asked for now.
    BackupEnded = "backup_ended", -32000, FixRequest;
    /// another process has the backup open, or nobody here can tell whether it lives
    BackupBusy = "backup_busy", -32000, Retry;
    /// No restore of that id.
    UnknownRestore = "unknown_restore", -32000, FixRequest;
    /// No disk of that id.
    UnknownDisk = "unknown_disk", -32000, FixRequest;
    /// The disk is left out of backups; the message says why.
    DiskExcluded = "disk_excluded", -32000, FixRequest;
    /// The monitor's address cannot be connected to.
    MonitorUnreachable = "monitor_unreachable", -32000, AskOperator;
    /// Another client holds the monitor: it accepts and does not greet.
    MonitorBusy = "monitor_busy", -32000, Retry;
    /// The monitor's connection ended: QEMU quit or closed it.
    MonitorClosed = "monitor_closed", -32000, Retry;
    /// What answers at the monitor's address does not speak QMP.
    MonitorProtocol = "monitor_protocol", -32000, AskOperator;
    /// QEMU did not answer a command in time, or has pushed nothing to `records` for too long.
    QemuTimeout = "qemu_timeout", -32000, Retry;
    /// QEMU refused a command; the message has its words.
    QemuRefused = "qemu_refused", -32000, AskOperator;
    /// This QEMU, or a disk's configuration in it, cannot do this without harm.
    QemuUnsupported = "qemu_unsupported", -32000, AskOperator;
    /// The guest agent cannot be connected to, or does not answer: it does not run, hangs, or
    /// talks to another program.
    AgentUnreachable = "agent_unreachable", -32000, Retry;
    /// The guest agent answered with an error, or file systems are frozen already.
    AgentRefused = "agent_refused", -32000, AskOperator;
    /// The guest was not still up to the instant: the deadline passed, or somebody let it go.
    ConsistencyLost = "consistency_lost", -32000, Retry;
    /// Nobody has confirmed that the guest was let go: it may be frozen or paused still.
    GuestHeld = "guest_held", -32000, AskOperator;
    /// QEMU's one NBD server is in use by somebody else.
    NbdServerBusy = "nbd_server_busy", -32000, Retry;
    /// The NBD server cannot be connected to.
    NbdUnreachable = "nbd_unreachable", -32000, Retry;
    /// The NBD server broke the protocol.
    NbdProtocol = "nbd_protocol", -32000, ReportBug;
    /// The NBD connection ended early.
    NbdClosed = "nbd_closed", -32000, Retry;
    /// The NBD server answered a request with an error: a read failed.
    NbdRefused = "nbd_refused", -32000, Retry;
    /// The NBD server did not answer in time.
    NbdTimeout = "nbd_timeout", -32000, Retry;
    /// A checkpoint of that name exists on one of the disks.
    CheckpointExists = "checkpoint_exists", -32000, FixRequest;
    /// No such checkpoint on the disk, or on any disk.
    UnknownCheckpoint = "unknown_checkpoint", -32000, FixRequest;
    /// The disk would have more than `max_checkpoints`.
    TooManyCheckpoints = "too_many_checkpoints", -32000, FixRequest;
    /// Another job or export uses the checkpoint's bitmap.
    CheckpointBusy = "checkpoint_busy", -32000, Retry;
    /// This cannot be done with the checkpoint as it is: inconsistent, or on a backing image.
    CheckpointUnusable = "checkpoint_unusable", -32000, FixRequest;
    /// `strict`, and the base cannot serve this disk; `reason` says why.
    BaseUnusable = "base_unusable", -32000, TakeFull;
    /// The scratch file cannot be made.
    ScratchUnavailable = "scratch_unavailable", -32000, FreeSpace;
    /// Scratch was full, and the point in time of the disk was given up, so that its guest could go on.
    ScratchFull = "scratch_full", -32000, FreeSpace;
    /// The point in time is gone; its backup can only be aborted.
    PointInTimeLost = "point_in_time_lost", -32000, Retry;
    /// The offset was given back, or is no place to go on from; `offset` says which one is.
    OffsetReleased = "offset_released", -32000, FixRequest;
    /// The disk is being read, mapped or pushed by another request.
    StreamActive = "stream_active", -32000, FixRequest;
    /// A disk to be committed was not read to its end, pushed or exported.
    Incomplete = "incomplete", -32000, FixRequest;
    /// The target of a restore or push exists.
    TargetExists = "target_exists", -32000, FixRequest;
    /// The target of a restore or push is full, or its file system fails.
    TargetUnwritable = "target_unwritable", -32000, FreeSpace;
    /// The push target cannot be connected to, or does not greet.
    TargetUnreachable = "target_unreachable", -32000, Retry;
    /// The target must not or cannot be used: in use, permission denied, no such export, TLS or its credentials refused, no image of that format.
    TargetRefused = "target_refused", -32000, AskOperator;
    /// The target is not what it must be: missing, or in no directory; no file or block device; read-only; of another size; with clusters over 64 KiB.
    TargetMismatch = "target_mismatch", -32000, FixRequest;
    /// Writing to the push target failed: it answered with an error, or ended.
    TargetFailed = "target_failed", -32000, Retry;
    /// The push target took nothing for `timeout_ms`, or a file system does not answer.
    TargetTimeout = "target_timeout", -32000, Retry;
    /// `qemu-storage-daemon` cannot be started, or ended early.
    StorageDaemonFailed = "storage_daemon_failed", -32000, AskOperator;
    /// The record stream contradicts itself, its checks or its chain; `offset` says where.
    StreamDamaged = "stream_damaged", -32000, AskOperator;
    /// A defect of this program.
    Internal = "internal", -32603, ReportBug;
}

/// The `error` member of a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// JSON-RPC's number. Hosts go by `data.code`.
    pub code: i32,
    /// For people; may change with any version.
    pub message: String,
    /// For programs.
    pub data: Box<ErrorData>,
}

/// The part of an error that programs go by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorData {
    /// What went wrong.
    pub code: Code,
    /// What the host should do next.
    pub action: Action,
    /// What is left behind.
    pub state_left: StateLeft,
    /// The disk that it happened on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The byte offset that it happened at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Restore: which stream of the chain, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<usize>,
    /// `base_unusable`: why, as in a disk's `reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<crate::backup::FullReason>,
    /// `version_unsupported`: the versions that would do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supported: Vec<u32>,
    /// Objects in QEMU, or files, that could not be removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leftovers: Vec<String>,
}

impl WireError {
    /// An error that has changed nothing.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let data = ErrorData {
            code,
            action: code.action(),
            state_left: StateLeft::Unchanged,
            disk: None,
            offset: None,
            stream: None,
            reason: None,
            supported: Vec::new(),
            leftovers: Vec::new(),
        };
        Self {
            code: code.number(),
            message: message.into(),
            data: Box::new(data),
        }
    }

    /// Says what is left behind.
    #[must_use]
    pub fn left(mut self, state: StateLeft) -> Self {
        self.data.state_left = state;
        self
    }
}
