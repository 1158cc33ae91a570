//! The task that owns a monitor's socket: commands out, answers to their callers,
//! events to all. Described where it is started, in `qmp`.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::qemu::line::{Lines, Message};
use crate::qemu::outgoing::Outgoing;
use crate::qemu::{Event, Refusal};

pub(super) type Answer = oneshot::Sender<Result<Value>>;

pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) arguments: Value,
    pub(super) fd: Option<OwnedFd>,
    pub(super) answer: Answer,
}

/// The next message, or `None` at the end. Cancel-safe: bytes that were read
/// stay in `lines`.
pub(super) async fn next(
    reader: &mut (impl AsyncRead + Unpin),
    lines: &mut Lines,
) -> Result<Option<Message>> {
    loop {
        if let Some(message) = lines.next_message()? {
            return Ok(Some(message));
        }
        match reader.read_buf(lines.space()).await {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "the monitor's connection broke");
                return Ok(None);
            }
        }
    }
}

pub(super) struct Actor<W> {
    pub(super) writer: W,
    /// The socket, where descriptors can be sent over it.
    pub(super) sender: Option<UnixStream>,
    pub(super) pending: HashMap<u64, (&'static str, Answer)>,
    pub(super) last_id: u64,
    pub(super) events: broadcast::Sender<Event>,
}

impl<W: AsyncWrite + Unpin + Send> Actor<W> {
    pub(super) async fn run(
        mut self,
        mut reader: impl AsyncRead + Unpin + Send,
        mut lines: Lines,
        mut queue: mpsc::Receiver<Command>,
        end: CancellationToken,
    ) {
        let mut outgoing = None;
        loop {
            tokio::select! {
                () = end.cancelled() => break,
                command = queue.recv(), if outgoing.is_none() => match command {
                    Some(command) => outgoing = self.accept(command),
                    None => break,
                },
                sent = self.send(&mut outgoing) => if let Err(error) = sent {
                    tracing::debug!(%error, "the monitor's connection broke");
                    break;
                },
                message = next(&mut reader, &mut lines) => match message {
                    Ok(Some(message)) => self.message(message),
                    Ok(None) => break,
                    Err(error) => return self.fail(&error),
                },
            }
        }
        // Dropping the answers tells the callers: closed.
    }

    /// A lie of the peer: each caller gets to know which.
    fn fail(self, error: &Error) {
        for (name, answer) in self.pending.into_values() {
            let lie = Error::new(Kind::MonitorProtocol, format!("executing {name}"))
                .because(error.chain());
            let _gone = answer.send(Err(lie));
        }
    }

    /// Gives the command an id. `None` when its caller has given up already: what
    /// was not sent need not be done.
    fn accept(&mut self, command: Command) -> Option<Outgoing> {
        let Command {
            name,
            arguments,
            fd,
            answer,
        } = command;
        if answer.is_closed() {
            return None;
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({"execute": name, "arguments": arguments, "id": id})
            .to_string()
            .into_bytes();
        line.push(b'\n');
        tracing::trace!(line = %String::from_utf8_lossy(&line).trim_end(), "to QEMU");
        self.pending.insert(id, (name, answer));
        Some(Outgoing::new(line, fd))
    }

    /// Sends a piece; waits for ever where there is none. Cancel-safe.
    async fn send(&mut self, outgoing: &mut Option<Outgoing>) -> std::io::Result<()> {
        let Some(line) = outgoing else {
            return std::future::pending().await;
        };
        line.send_some(&mut self.writer, self.sender.as_ref())
            .await?;
        if line.is_sent() {
            *outgoing = None;
        }
        Ok(())
    }

    fn message(&mut self, message: Message) {
        let Message {
            id,
            returned,
            error,
            event,
            data,
            ..
        } = message;
        if let Some(name) = event {
            // No subscriber is no harm.
            let _none = self.events.send(Event {
                name,
                data: data.unwrap_or_default(),
            });
            return;
        }
        let Some((name, answer)) = id.and_then(|id| self.pending.remove(&id)) else {
            tracing::debug!(?id, "an answer that nobody waits for");
            return;
        };
        let answered = match (returned, error) {
            (_, Some(error)) => Err(Error::new(Kind::QemuRefused, format!("executing {name}"))
                .because(Refusal {
                    class: error.class,
                    desc: error.desc,
                })),
            (Some(value), None) => Ok(value),
            (None, None) => Err(
                Error::new(Kind::MonitorProtocol, format!("executing {name}"))
                    .because("an answer with neither return nor error"),
            ),
        };
        // A caller that gave up.
        let _gone = answer.send(answered);
    }
}
