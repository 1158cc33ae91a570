//! A guardian, from the side of who holds the guest.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::{Order, Program, Release, Ward, Word};
use crate::error::{Error, Kind, Result};

/// How long the process may take to start, and to answer what takes it no time.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);

/// A guardian at work. Dropped, it lets the guest go by itself, and ends then.
#[derive(Debug)]
pub(crate) struct Guardian {
    _child: Child,
    orders: ChildStdin,
    words: BufReader<ChildStdout>,
}

impl Guardian {
    /// Starts one, and returns when it watches: the guest can be held, and is not yet.
    ///
    /// # Errors
    /// [`Kind::AgentUnreachable`], [`Kind::AgentRefused`]; [`Kind::Internal`] where the
    /// program cannot be started or ends early.
    pub(crate) async fn start(program: &Program, ward: Ward, patience: Duration) -> Result<Self> {
        let failed =
            |why: std::io::Error| Error::new(Kind::Internal, "starting the guardian").because(why);
        // It goes on when this process is gone: no signal at its death, and a session of
        // its own, which it makes itself.
        let mut child = Command::new(&program.path)
            .arg0(&program.name)
            .args(&program.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(orders), Some(words)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(std::io::ErrorKind::BrokenPipe.into()));
        };
        let mut guardian = Self {
            _child: child,
            orders,
            words: BufReader::new(words),
        };
        guardian.order(&Order::Watch(ward)).await?;
        match guardian.hear(START_DEADLINE + patience).await? {
            Some(Word::Ready) => Ok(guardian),
            word => Err(odd(word.as_ref())),
        }
    }

    /// Has the guest held: how many file systems are frozen.
    ///
    /// # Errors
    /// [`Kind::AgentUnreachable`], [`Kind::AgentRefused`]: nothing is held; [`Kind::GuestHeld`]:
    /// after `patience` nobody knows; [`Kind::Internal`] where the guardian has ended.
    pub(crate) async fn hold(&mut self, patience: Duration) -> Result<u64> {
        self.order(&Order::Hold).await?;
        match self.hear(patience).await? {
            Some(Word::Held { filesystems }) => Ok(filesystems),
            None => Err(unconfirmed(patience)),
            word => Err(odd(word.as_ref())),
        }
    }

    /// Has the guest let go.
    ///
    /// # Errors
    /// As [`Guardian::hold`].
    pub(crate) async fn release(&mut self, patience: Duration) -> Result<Release> {
        // Where it has let go unasked, and ended, what it said is still to be read.
        let _gone = self.order(&Order::Release).await;
        match self.hear(patience).await? {
            Some(Word::Released(release)) => Ok(release),
            None => Err(unconfirmed(patience)),
            word => Err(odd(word.as_ref())),
        }
    }

    /// Tells it that the guest was let go.
    pub(crate) async fn stand_down(mut self) {
        // One that has ended needs not be told.
        let _gone = self.order(&Order::Release).await;
    }

    async fn order(&mut self, order: &Order) -> Result<()> {
        let failed = |why: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(Kind::Internal, "telling the guardian").because(why)
        };
        let mut line = serde_json::to_vec(order).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        // Short: it fits the pipe.
        let written = self.orders.write_all(&line).await;
        written.map_err(|error| failed(error.into()))
    }

    /// Its next word; `None`: not within `patience`.
    async fn hear(&mut self, patience: Duration) -> Result<Option<Word>> {
        let ended = |why: String| Error::new(Kind::Internal, "hearing the guardian").because(why);
        let mut line = String::new();
        match tokio::time::timeout(patience, self.words.read_line(&mut line)).await {
            Err(_elapsed) => Ok(None),
            Ok(Err(error)) => Err(ended(error.to_string())),
            Ok(Ok(0)) => Err(ended("it has ended".into())),
            Ok(Ok(_)) => match serde_json::from_str(&line) {
                Err(error) => Err(ended(error.to_string())),
                Ok(Word::Failed { kind, why }) => Err(kind.error(why)),
                Ok(word) => Ok(Some(word)),
            },
        }
    }
}

/// Nobody knows.
fn unconfirmed(patience: Duration) -> Error {
    Error::new(Kind::GuestHeld, "waiting for the guardian")
        .because(format!("nothing is confirmed within {patience:?}"))
}

fn odd(word: Option<&Word>) -> Error {
    Error::new(Kind::Internal, "hearing the guardian")
        .because(format!("not what was waited for: {word:?}"))
}
