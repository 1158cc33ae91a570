//! The guardian: a process that lets a guest go, whatever becomes of the one that holds it.
//!
//! ```text
//!  who holds                guardian                        guest
//!  Watch ------ stdin ----> connects to the agent --------> is it thawed?
//!        <----- Ready
//!  Hold ------------------> freezes ----------------------> frozen
//!        <----- Held
//!  (the instant)
//!  Release, or the end of
//!  its standard input ----> thaws until it is confirmed --> thawed
//!        <----- Released
//! ```
//! It owns the only connection to the agent, because the agent's socket serves one client.
//! It also thaws when a deadline passes or it is told to end (SIGTERM), so a guest stays
//! frozen only where both processes are killed, and not by the signal that asks.
//!
//! A VM is paused by who holds it, over its own monitor. Measured (QEMU 7.2, 10.0): commands
//! that were sent ahead are dropped when a monitor's client dies, 9 times in 40 between
//! `stop` and `cont`. So the guardian stands by: once the other is gone, and the monitor
//! free, it connects and continues the VM.

mod handle;
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::qemu::Address;

pub(crate) use handle::{Guardian, START_DEADLINE};
pub(crate) use watch::thaw;
pub use watch::watch;

/// How to start a guardian: a program that runs [`watch`] on its standard input and output.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its file.
    pub path: PathBuf,
    /// Its name, as it shall stand in lists of processes.
    pub name: OsString,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// What a guardian watches over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ward {
    /// File systems, frozen by the guest agent.
    Agent {
        /// The agent's socket.
        address: Address,
        /// How long they may be frozen before they are thawed unasked.
        deadline: Duration,
    },
    /// A VM, paused by who holds it.
    Monitor {
        /// Its monitor, free once that one is gone.
        address: Address,
    },
}

/// What the guardian is told: one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    /// First of all.
    Watch(Ward),
    /// Hold the guest: from here on it will be let go.
    Hold,
    /// Let it go, or know that it was.
    Release,
}

/// What the guardian answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// It watches. The guest can be held.
    Ready,
    /// The guest is held: so many file systems are frozen.
    Held { filesystems: u64 },
    /// The guest was let go.
    Released(Release),
    /// It could not be held, and is not. Nothing more will come.
    Failed { kind: Failure, why: String },
}

/// How a guest was let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Release {
    /// How many file systems were frozen until then, where that can be told.
    pub(crate) filesystems: Option<u64>,
    /// From before the freeze until after the thaw.
    pub(crate) held: Duration,
    /// By an order, not by the deadline or a signal.
    pub(crate) ordered: bool,
}

/// The kinds of errors that a guardian meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Failure {
    Unreachable,
    Refused,
    Internal,
}

impl From<Kind> for Failure {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::AgentUnreachable => Self::Unreachable,
            Kind::AgentRefused => Self::Refused,
            _ => Self::Internal,
        }
    }
}

impl Failure {
    fn error(self, why: String) -> Error {
        let kind = match self {
            Self::Unreachable => Kind::AgentUnreachable,
            Self::Refused => Kind::AgentRefused,
            Self::Internal => Kind::Internal,
        };
        Error::new(kind, why)
    }
}
