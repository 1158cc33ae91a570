//! The way into QEMU's NBD server.
//!
//! ```text
//! our turn --> handshake --> the monitor answers --> in
//!    ^                  \--> it is silent: hung up --,
//!    '-----------------------------------------------'
//! ```
//! QEMU 10.0 stands still, and its guest with it, for a client that it lets in while it
//! drains: it stops reading the requests of those that were there before, and waits for the
//! new one's until it hangs up. What drains by our own order waits for its turn. The guest,
//! other jobs and other programs have none; but QEMU answers no command while it drains, so
//! its silence tells.

use std::future::Future;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use tracing::debug;

use crate::error::{Error, Kind, Result};
use crate::nbd::doorman::Porter;
use crate::nbd::{Address, Client};
use crate::qemu::{Qmp, Turn, query};

/// How long QEMU may be silent when it has let us in. On a busy machine it may be so without
/// a drain, and then we come once more; and the guest stands still no longer than this.
const SILENCE: Duration = Duration::from_secs(1);

/// The same for a client of the host's, who may not come once more.
const GUESTS_SILENCE: Duration = Duration::from_secs(3);

/// Connects to `export` of the server at `address`, with `context` for block status. QEMU gets
/// `deadline` to let us in and not stand still for us, and for each reply.
///
/// # Errors
/// As [`Client::connect`]; the monitor's: [`Kind::QemuTimeout`] where QEMU stands still for
/// something else, and then nobody is in.
pub(crate) async fn connect(
    qmp: &Qmp,
    address: &Address,
    export: &str,
    context: Option<&str>,
    deadline: Duration,
) -> Result<Client> {
    let turn = qmp.turn_beside_pushes().await;
    let end = Instant::now() + deadline;
    loop {
        let client = Client::connect(address, export, context, deadline).await?;
        if goes_on(&turn, SILENCE).await? {
            return Ok(client);
        }
        debug!(export, "QEMU stands still: hanging up");
        drop(client);
        // Not before it has ended what it was at.
        query::version(&turn).await?;
        if Instant::now() >= end {
            let doing = format!("connecting to {address}");
            return Err(Error::new(Kind::NbdTimeout, doing)
                .because("QEMU stands still whenever it has let us in"));
        }
    }
}

impl Porter for Qmp {
    async fn let_in<T: Send>(&self, step: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let turn = self.turn_beside_pushes().await;
        let done = step.await?;
        if goes_on(&turn, GUESTS_SILENCE).await? {
            return Ok(done);
        }
        Err(Error::new(Kind::NbdTimeout, "letting a client in").because("QEMU stands still"))
    }
}

/// Whether QEMU goes on when it has let a client in, in this turn; else the client has to
/// hang up.
async fn goes_on(turn: &Turn, silence: Duration) -> Result<bool> {
    let asked = turn.execute_raw_within("query-version", json!({}), silence);
    match asked.await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == Kind::QemuTimeout => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Answers each command with nothing.
    async fn monitor(stream: DuplexStream) {
        let mut stream = BufReader::new(stream);
        stream.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
        let mut line = String::new();
        while stream.read_line(&mut line).await.unwrap() > 0 {
            let command: serde_json::Value = serde_json::from_str(&line).unwrap();
            let answer = format!("{}\r\n", json!({"return": {}, "id": command["id"]}));
            stream.write_all(answer.as_bytes()).await.unwrap();
            line.clear();
        }
    }

    #[tokio::test]
    async fn nobody_comes_in_before_it_is_their_turn() {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(monitor(theirs));
        let qmp = Qmp::over(ours, PATIENCE).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = Address::Unix(path);
        let connecting = connect(&qmp, &address, "disk", None, PATIENCE);
        tokio::pin!(connecting);
        let turn = qmp.turn().await;
        let mut came = Vec::new();
        for turn in [Some(turn), None] {
            // Runs it until it has to wait.
            tokio::select! {
                biased;
                connected = &mut connecting => panic!("nobody has let it in: {connected:?}"),
                () = std::future::ready(()) => {}
            }
            came.push(listener.accept().is_ok());
            drop(turn);
        }
        assert_eq!(came, [false, true]);
    }
}
