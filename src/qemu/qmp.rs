//! The QMP client: one task owns the socket, handles send it commands.
//!
//! ```text
//!  execute() --Command--> +-------+ --line, fd--> QEMU
//!                         | actor |
//!  caller <--- answer --- +-------+ <--- lines -- QEMU
//!  events() <- broadcast -----+
//! ```
//! Every command has an id, and waits in a table until its answer comes. A
//! command that was sent is never taken back: when its caller gives up, the late
//! answer is recognised by its id and dropped. One whose caller gave up before it
//! was sent is not sent at all. QEMU is heard while a long command is on its way,
//! so neither side waits for the other. Events are kept as name and
//! value, so an unknown one harms nothing.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::error::{Error, Kind, Result};
use crate::qemu::Address;
use crate::qemu::actor::{Actor, Command};
use crate::qemu::line::Lines;
use crate::qemu::turn::Turns;
use crate::qemu::{address, greeting, tls};

/// How long a command may take unless its caller says otherwise.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// Commands that change which nodes there are and how they hang together. See [`Turn`](crate::qemu::Turn).
const CHANGES: &[&str] = &[
    "block-export-add",
    "block-export-del",
    "block_resize",
    "blockdev-add",
    "blockdev-backup",
    "blockdev-del",
    "job-cancel",
    "job-finalize",
    "nbd-server-stop",
    "transaction",
];

/// Commands that wait to be sent.
const COMMANDS: usize = 64;

/// Events that a slow subscriber may lag behind before it misses some.
const EVENTS: usize = 1024;

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, as `JOB_STATUS_CHANGE`.
    pub name: String,
    /// Its data; null where it has none.
    pub data: Value,
}

/// QEMU's own words when it refuses a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{class}: {desc}")]
pub struct Refusal {
    /// The error class; `GenericError` for nearly all.
    pub class: String,
    /// What QEMU says.
    pub desc: String,
}

/// A handle to a monitor; clones share the connection, which closes with the last.
#[derive(Clone, Debug)]
pub struct Qmp {
    commands: mpsc::Sender<Command>,
    /// Weak: receivers see the end of the connection while handles live.
    events: broadcast::WeakSender<Event>,
    passes_fds: bool,
    address: Option<Arc<Address>>,
    pub(super) turns: Turns,
    /// This handle has the turn already.
    pub(super) has_turn: bool,
    /// The actor ends with the last handle, even in the middle of a send.
    _alive: Arc<DropGuard>,
}

impl Qmp {
    /// Connects, reads the greeting within `deadline`, and negotiates.
    ///
    /// # Errors
    /// [`Kind::MonitorUnreachable`]; [`Kind::MonitorBusy`] when there is no
    /// greeting, or no room to wait for one: QEMU serves one client a monitor, and
    /// lets a few others wait; [`Kind::MonitorClosed`]; [`Kind::MonitorProtocol`].
    pub async fn connect(address: &Address, deadline: Duration) -> Result<Self> {
        let unreachable = |why: std::io::Error| {
            let doing = format!("connecting to the monitor {address}");
            match why.kind() {
                // A unix socket whose queue of waiting clients is full.
                std::io::ErrorKind::WouldBlock => {
                    Error::new(Kind::MonitorBusy, doing).because("other clients hold this monitor")
                }
                _ => Error::new(Kind::MonitorUnreachable, doing).because(why),
            }
        };
        let mut qmp = match address {
            Address::Unix(path) => {
                let stream = within(deadline, UnixStream::connect(path));
                let stream = stream.await.map_err(unreachable)?;
                // A second descriptor of the socket, to send others with.
                let sender = stream.as_fd().try_clone_to_owned().map_err(unreachable)?;
                let sender = UnixStream::from_std(sender.into()).map_err(unreachable)?;
                let qmp = Self::start(stream, Some(sender), deadline, 0).await?;
                qmp.probe_fds().await?
            }
            Address::Tcp(host) => {
                let stream = within(deadline, address::tcp(host))
                    .await
                    .map_err(unreachable)?;
                Self::start(stream, None, deadline, 0).await?
            }
            Address::Tls {
                address: host,
                credentials,
            } => {
                let stream = within(deadline, address::tcp(host))
                    .await
                    .map_err(unreachable)?;
                let encrypted = tls::connect(stream, host, credentials);
                let encrypted = tokio::time::timeout(deadline, encrypted).await;
                let encrypted = encrypted.map_err(|_elapsed| greeting::missing())?;
                Self::start(
                    encrypted.map_err(unreachable)?,
                    None,
                    deadline,
                    greeting::HEARS_TLS,
                )
                .await?
            }
        };
        qmp.address = Some(Arc::new(address.clone()));
        Ok(qmp)
    }

    /// Speaks over any stream: a program's standard input and output, or a test.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub async fn over<S>(stream: S, deadline: Duration) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::start(stream, None, deadline, 0).await
    }

    /// With a QEMU of the major version `least` or newer.
    async fn start<S>(
        stream: S,
        sender: Option<UnixStream>,
        deadline: Duration,
        least: u64,
    ) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let (mut reader, writer) = (Box::pin(reader), Box::pin(writer));
        let mut lines = Lines::default();
        greeting::read(&mut reader, &mut lines, deadline, least).await?;
        let (commands, queue) = mpsc::channel(COMMANDS);
        let events = broadcast::channel(EVENTS).0;
        let end = CancellationToken::new();
        let qmp = Self {
            commands,
            events: events.downgrade(),
            passes_fds: false,
            address: None,
            turns: Turns::default(),
            has_turn: false,
            _alive: Arc::new(end.clone().drop_guard()),
        };
        let actor = Actor {
            writer,
            sender,
            pending: HashMap::new(),
            last_id: 0,
            events,
        };
        tokio::spawn(actor.run(reader, lines, queue, end));
        qmp.execute_raw_within("qmp_capabilities", json!({}), deadline)
            .await?;
        Ok(qmp)
    }

    async fn probe_fds(mut self) -> Result<Self> {
        // qemu-storage-daemon has no add-fd.
        let commands = self.execute_raw("query-commands", json!({})).await?;
        let has = |name: &str| {
            commands
                .as_array()
                .is_some_and(|list| list.iter().any(|entry| entry["name"] == name))
        };
        self.passes_fds = has("add-fd") && has("getfd");
        Ok(self)
    }

    /// Whether [`Qmp::execute_with_fd`] works: a unix socket, and a QEMU that
    /// takes descriptors.
    #[must_use]
    pub fn can_pass_fds(&self) -> bool {
        self.passes_fds
    }

    /// Where the monitor is; `None`: at the end of a stream.
    #[must_use]
    pub fn address(&self) -> Option<&Address> {
        self.address.as_deref()
    }

    /// A handle that has the turn.
    pub(super) fn in_turn(&self) -> Self {
        Self {
            has_turn: true,
            ..self.clone()
        }
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// QEMU's events from now on. A subscriber that lags is told how many it missed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self.events.upgrade() {
            Some(events) => events.subscribe(),
            // A receiver that is at its end.
            None => broadcast::channel(1).1,
        }
    }

    /// [`Qmp::execute_raw`] of a command whose arguments have a type of qapi's, so
    /// that their names are checked where this is compiled.
    ///
    /// # Errors
    /// As there.
    pub async fn execute<C: qapi::Command>(&self, command: &C) -> Result<Value> {
        let arguments = serde_json::to_value(command).map_err(|error| {
            Error::new(Kind::Internal, format!("writing {}", C::NAME)).because(error)
        })?;
        self.execute_raw(C::NAME, arguments).await
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`Kind::QemuRefused`] with a [`Refusal`] as source; [`Kind::QemuTimeout`]
    /// after [`COMMAND_DEADLINE`]: it may still be done later; [`Kind::MonitorClosed`]:
    /// it may have been done or not; [`Kind::MonitorProtocol`].
    pub async fn execute_raw(&self, name: &'static str, arguments: Value) -> Result<Value> {
        self.send(name, arguments, None, COMMAND_DEADLINE).await
    }

    /// [`Qmp::execute_raw`] with a deadline of its own.
    ///
    /// # Errors
    /// As there.
    pub async fn execute_raw_within(
        &self,
        name: &'static str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value> {
        self.send(name, arguments, None, deadline).await
    }

    /// [`Qmp::execute_raw`] that passes a descriptor along.
    ///
    /// # Errors
    /// As there; [`Kind::QemuUnsupported`] where descriptors cannot be passed.
    pub async fn execute_with_fd(
        &self,
        name: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value> {
        if !self.passes_fds {
            return Err(Error::new(
                Kind::QemuUnsupported,
                format!("passing a descriptor with {name}"),
            ));
        }
        let fd = fd
            .try_clone_to_owned()
            .map_err(|error| Error::new(Kind::Internal, "copying a descriptor").because(error))?;
        self.send(name, arguments, Some(fd), COMMAND_DEADLINE).await
    }

    async fn send(
        &self,
        name: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Value> {
        let _turn = if CHANGES.contains(&name) {
            Some(self.turn().await)
        } else {
            None
        };
        let (answer, answered) = oneshot::channel();
        let command = Command {
            name,
            arguments,
            fd,
            answer,
        };
        let exchange = async {
            self.commands
                .send(command)
                .await
                .map_err(|_closed| closed(name))?;
            answered.await.unwrap_or_else(|_dropped| Err(closed(name)))
        };
        tokio::time::timeout(deadline, exchange)
            .await
            .unwrap_or_else(|_elapsed| {
                Err(Error::new(Kind::QemuTimeout, format!("executing {name}"))
                    .because(format!("no answer within {deadline:?}")))
            })
    }
}

fn closed(name: &str) -> Error {
    Error::new(Kind::MonitorClosed, format!("executing {name}"))
        .because("the monitor's connection has ended")
}

async fn within<T>(
    deadline: Duration,
    step: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    tokio::time::timeout(deadline, step).await?
}
