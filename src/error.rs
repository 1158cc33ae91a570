//! One error for the whole engine: what kind it is, what was being done, where.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

use crate::checkpoint::FullReason;

/// What the engine's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the terms a caller decides by. Each kind is one `code`
/// on the wire; the specification's table says what the host does next.
///
/// Since 0.1.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request cannot be meant: an odd name, a length out of range.
    InvalidRequest,
    /// The monitor's address cannot be connected to.
    MonitorUnreachable,
    /// The monitor accepts but does not greet: another client holds it.
    MonitorBusy,
    /// The monitor's connection ended; commands under way have no known outcome.
    MonitorClosed,
    /// The monitor sent something that is not QMP, or past a limit.
    MonitorProtocol,
    /// QEMU did not answer a command, or a job did not end or go on, before the deadline.
    QemuTimeout,
    /// QEMU refused a command; its own words are in the source.
    QemuRefused,
    /// This QEMU lacks something that is needed, or using it would hurt the VM.
    QemuUnsupported,
    /// The guest agent cannot be connected to, or does not answer: it is not there, hangs, or
    /// another client has it.
    AgentUnreachable,
    /// The guest agent answered with an error, or holds file systems frozen already.
    AgentRefused,
    /// The guest was not still up to the instant: the point in time is consistent as after a
    /// crash, no better.
    ConsistencyLost,
    /// Nobody has confirmed that the guest was let go: it may be frozen or paused still.
    GuestHeld,
    /// Another user's NBD server runs in this QEMU, which has only one.
    NbdServerBusy,
    /// The NBD server cannot be connected to, or does not know the export.
    NbdUnreachable,
    /// The NBD server broke the protocol; the connection is dead.
    NbdProtocol,
    /// The NBD connection ended with requests under way.
    NbdClosed,
    /// The NBD server answered a request with an error; the connection lives.
    NbdRefused,
    /// The NBD server did not answer before the deadline; the connection is dead.
    NbdTimeout,
    /// No session of that id is in QEMU, or it is not open.
    UnknownSession,
    /// The session's process lives, or nobody here can tell.
    SessionAlive,
    /// No disk of that name.
    UnknownDisk,
    /// The disk is left out of backups; the reason is in the text.
    DiskExcluded,
    /// A checkpoint of that name exists already.
    CheckpointExists,
    /// No checkpoint of that name.
    UnknownCheckpoint,
    /// The disk would have more than [`crate::checkpoint::MAX_CHECKPOINTS`].
    TooManyCheckpoints,
    /// Another job or export uses the checkpoint's bitmap.
    CheckpointBusy,
    /// What is asked for cannot be done with the checkpoint as it is.
    CheckpointUnusable,
    /// An incremental was demanded and the base cannot serve it.
    BaseUnusable(FullReason),
    /// The scratch file cannot be made, or there is no room for it.
    ScratchUnavailable,
    /// Scratch was full, and the point in time of the disk was given up.
    ScratchFull,
    /// The point in time is gone: its job or filter ended under it.
    PointInTimeLost,
    /// The offset was given back to QEMU, or never was a place to resume from.
    OffsetReleased,
    /// The disk is being read, mapped or pushed already.
    StreamActive,
    /// A disk that is to be committed was not read to its end, pushed or exported.
    Incomplete,
    /// The target of a restore or push exists already.
    TargetExists,
    /// The target of a restore or push is full, or its file system fails.
    TargetUnwritable,
    /// The push target cannot be connected to, or does not greet.
    TargetUnreachable,
    /// The target must not or cannot be used: it is in use, or there is no right to it.
    TargetRefused,
    /// The target is not what it must be: missing, read-only, of another size.
    TargetMismatch,
    /// Writing to the push target failed.
    TargetFailed,
    /// The push target took nothing for too long, or a file system does not answer.
    TargetTimeout,
    /// `qemu-storage-daemon` cannot be started or ended early.
    StorageDaemonFailed,
    /// The record stream to restore contradicts itself, its checks or its chain.
    StreamDamaged,
    /// The caller cancelled.
    Cancelled,
    /// A bug of ours.
    Internal,
}

/// An error of the engine.
///
/// `Display` says what was being done and where, never the source: print the
/// chain (`{:#}` of anyhow, or [`Error::chain`]) to see the cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    doing: Cow<'static, str>,
    disk: Option<String>,
    offset: Option<u64>,
    leftovers: Vec<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`, met while `doing` ("reading a reply header").
    pub fn new(kind: Kind, doing: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            doing: doing.into(),
            disk: None,
            offset: None,
            leftovers: Vec::new(),
            source: None,
        }
    }

    /// Adds the cause: another error, or a sentence.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Names the disk that it happened on, unless one is named already.
    #[must_use]
    pub fn on_disk(mut self, disk: impl Into<String>) -> Self {
        self.disk.get_or_insert_with(|| disk.into());
        self
    }

    /// Names the byte offset that it happened at, unless one is named already.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset.get_or_insert(offset);
        self
    }

    /// Names objects in QEMU, or files, that could not be removed afterwards.
    #[must_use]
    pub fn leaving(mut self, leftovers: Vec<String>) -> Self {
        self.leftovers.extend(leftovers);
        self
    }

    /// What callers decide by.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The disk that it happened on.
    #[must_use]
    pub fn disk(&self) -> Option<&str> {
        self.disk.as_deref()
    }

    /// The byte offset that it happened at.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// Objects in QEMU, or files, that could not be removed afterwards.
    #[must_use]
    pub fn leftovers(&self) -> &[String] {
        &self.leftovers
    }

    /// The whole story on one line: this error and its causes.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)?;
        if let Some(disk) = &self.disk {
            write!(f, ", disk {disk}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ", offset {offset}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_says_where_and_chain_says_why_once() {
        let inner = Error::new(Kind::NbdClosed, "reading a chunk").because("end of file");
        let outer = Error::new(Kind::PointInTimeLost, "reading the view")
            .because(inner)
            .on_disk("vda")
            .at(512);
        assert_eq!(outer.to_string(), "reading the view, disk vda, offset 512");
        assert_eq!(
            outer.chain(),
            "reading the view, disk vda, offset 512: reading a chunk: end of file"
        );
    }

    #[test]
    fn the_first_site_stays() {
        let error = Error::new(Kind::NbdRefused, "reading")
            .at(1)
            .at(2)
            .on_disk("a")
            .on_disk("b");
        assert_eq!((error.disk(), error.offset()), (Some("a"), Some(1)));
    }
}
