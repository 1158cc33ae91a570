//! A client of QEMU's guest agent, which has a socket of its own.
//!
//! The socket serves one client at a time: the next one can connect, and is not heard. An
//! agent that is not there, hangs, or talks to somebody else is silent, so each call has
//! a deadline. A call that got no answer in time leaves the connection out of step: the
//! next one starts with `guest-sync-delimited`, and passes over all that comes before its
//! answer, be it of an earlier call or of an earlier client.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::error::{Error, Kind, Result};
use crate::qemu::line::Message;
use crate::qemu::{Address, Refusal, address, tls};

/// Longest answer of the calls that are made here, with room for an error's words.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// Before a message it ends what a client has left half said; the agent puts it before its
/// answer to `guest-sync-delimited`. It is in no UTF-8 text.
const SENTINEL: u8 = 0xff;

const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// What is known of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The next line is the next answer.
    In,
    /// Other lines may come first.
    Out,
    /// It has ended.
    Broken,
}

/// A connection to an agent.
pub struct GuestAgent {
    stream: Box<dyn Stream>,
    received: Vec<u8>,
    step: Step,
}

impl fmt::Debug for GuestAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestAgent")
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl GuestAgent {
    /// Connects. Whether anybody answers shows with the first call.
    ///
    /// # Errors
    /// [`Kind::AgentUnreachable`].
    pub async fn connect(address: &Address, deadline: Duration) -> Result<Self> {
        let connecting = async {
            let stream: Box<dyn Stream> = match address {
                Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
                Address::Tcp(address) => Box::new(address::tcp(address).await?),
                Address::Tls {
                    address,
                    credentials,
                } => {
                    let stream = address::tcp(address).await?;
                    Box::new(tls::connect(stream, address, credentials).await?)
                }
            };
            Ok(stream)
        };
        let connected = tokio::time::timeout(deadline, connecting).await;
        let connected = connected.unwrap_or_else(|elapsed| Err(elapsed.into()));
        let stream = connected.map_err(|error: std::io::Error| {
            let doing = format!("connecting to the guest agent {address}");
            Error::new(Kind::AgentUnreachable, doing).because(error)
        })?;
        Ok(Self {
            stream,
            received: Vec::new(),
            step: Step::Out,
        })
    }

    /// Whether the connection has ended: further calls fail.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.step == Step::Broken
    }

    /// Whether the agent holds file systems frozen.
    ///
    /// # Errors
    /// [`Kind::AgentUnreachable`] where there is no answer, or not an agent's, within
    /// `deadline`; [`Kind::AgentRefused`] with a [`Refusal`] as source.
    pub async fn is_frozen(&mut self, deadline: Duration) -> Result<bool> {
        let status = self.call("guest-fsfreeze-status", deadline).await?;
        match status.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            _ => Err(no_agent(
                "guest-fsfreeze-status",
                "it is a status unheard of",
            )),
        }
    }

    /// Which of the commands to freeze and to thaw the agent has and refuses, if any: its
    /// configuration may disable commands, and a frozen agent disables freezing.
    ///
    /// # Errors
    /// As [`GuestAgent::is_frozen`].
    pub async fn lacks(&mut self, deadline: Duration) -> Result<Option<&'static str>> {
        let info = self.call("guest-info", deadline).await?;
        let commands = info["supported_commands"].as_array();
        let is_disabled = |name: &&str| {
            let mut commands = commands.into_iter().flatten();
            commands.any(|command| command["name"] == **name && command["enabled"] == false)
        };
        Ok([FREEZE, THAW].into_iter().find(is_disabled))
    }

    /// Flushes and freezes all file systems that can be: how many these were.
    ///
    /// # Errors
    /// As [`GuestAgent::is_frozen`]. Without an answer file systems may be frozen, now or
    /// later.
    pub async fn freeze(&mut self, deadline: Duration) -> Result<u64> {
        self.count(FREEZE, deadline).await
    }

    /// Thaws all file systems: how many of them were frozen until now.
    ///
    /// # Errors
    /// As [`GuestAgent::is_frozen`]. Without an answer it may be done later.
    pub async fn thaw(&mut self, deadline: Duration) -> Result<u64> {
        self.count(THAW, deadline).await
    }

    async fn count(&mut self, name: &'static str, deadline: Duration) -> Result<u64> {
        let count = self.call(name, deadline).await?;
        count
            .as_u64()
            .ok_or_else(|| no_agent(name, "it is no number of file systems"))
    }

    async fn call(&mut self, name: &'static str, deadline: Duration) -> Result<Value> {
        let answered = tokio::time::timeout(deadline, self.exchange(name)).await;
        let answer = answered.unwrap_or_else(|_elapsed| {
            let why = format!(
                "no answer within {deadline:?}: it does not run, hangs, or talks to another program"
            );
            Err(Error::new(Kind::AgentUnreachable, calling(name)).because(why))
        })?;
        match (answer.returned, answer.error) {
            (_, Some(error)) => Err(Error::new(Kind::AgentRefused, calling(name)).because(
                Refusal {
                    class: error.class,
                    desc: error.desc,
                },
            )),
            (Some(value), None) => Ok(value),
            (None, None) => Err(no_agent(name, "it has neither return nor error")),
        }
    }

    /// To be dropped when it takes too long: the connection is out of step then.
    async fn exchange(&mut self, name: &'static str) -> Result<Message> {
        let broken = |error: std::io::Error| {
            Error::new(Kind::AgentUnreachable, calling(name)).because(error)
        };
        let mut line = Vec::new();
        // In one piece with the command: an agent that wakes up late does them in this order.
        let sync = (self.step != Step::In).then(random);
        if let Some(id) = sync {
            let arguments = json!({"id": id});
            let sync = json!({"execute": "guest-sync-delimited", "arguments": arguments});
            line.push(SENTINEL);
            line.extend_from_slice(format!("{sync}\n").as_bytes());
        }
        line.extend_from_slice(format!("{}\n", json!({"execute": name})).as_bytes());
        if self.step == Step::Broken {
            return Err(broken(std::io::ErrorKind::NotConnected.into()));
        }
        self.step = Step::Out;
        if let Err(error) = self.stream.write_all(&line).await {
            self.step = Step::Broken;
            return Err(broken(error));
        }
        if let Some(id) = sync {
            self.find(id).await.map_err(broken)?;
        }
        let line = self.line().await.map_err(broken)?;
        let answer = message(&line).ok_or_else(|| no_agent(name, "it is no JSON object"))?;
        self.step = Step::In;
        Ok(answer)
    }

    /// Passes over all up to the agent's answer to the sync of that id.
    async fn find(&mut self, id: u64) -> std::io::Result<()> {
        loop {
            let sentinel = self.received.iter().position(|byte| *byte == SENTINEL);
            let Some(at) = sentinel else {
                self.received.clear();
                self.receive().await?;
                continue;
            };
            self.received.drain(..=at);
            let line = self.line().await?;
            // An older answer may have been cut off before its end.
            let last = line.iter().rposition(|byte| *byte == SENTINEL);
            let answer = last.map_or(&line[..], |at| &line[at + 1..]);
            let returned = message(answer).and_then(|message| message.returned);
            if returned.is_some_and(|value| value.as_u64() == Some(id)) {
                return Ok(());
            }
        }
    }

    /// The next line, without its end.
    async fn line(&mut self) -> std::io::Result<Vec<u8>> {
        let mut scanned = 0;
        loop {
            let end = self.received[scanned..]
                .iter()
                .position(|byte| *byte == b'\n');
            if let Some(end) = end.map(|at| scanned + at) {
                let mut line = self.received.split_off(end + 1);
                std::mem::swap(&mut line, &mut self.received);
                line.pop();
                return Ok(line);
            }
            scanned = self.received.len();
            if scanned > MAX_LINE_BYTES {
                self.step = Step::Broken;
                let why = format!("a line is longer than {MAX_LINE_BYTES} bytes");
                return Err(std::io::Error::other(why));
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> std::io::Result<()> {
        self.received.reserve(4096);
        let read = self.stream.read_buf(&mut self.received).await;
        if !matches!(read, Ok(length) if length > 0) {
            self.step = Step::Broken;
        }
        match read? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

fn calling(name: &str) -> String {
    format!("calling the guest agent's {name}")
}

/// What answers is something else.
fn no_agent(name: &str, why: &'static str) -> Error {
    Error::new(
        Kind::AgentUnreachable,
        format!("reading the answer to {name}"),
    )
    .because(why)
}

fn message(line: &[u8]) -> Option<Message> {
    // serde reads a struct from an array too.
    let is_object = line.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    is_object.then(|| serde_json::from_slice(line).ok())?
}

/// A number that no earlier client has used.
fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // An error leaves zeros: an id all the same.
    let _filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // JSON numbers are exact that far, also in an agent that reads them as floats.
    u64::from_le_bytes(bytes) >> 11
}
