//! What runs in the guardian's process.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Order, Release, Ward, Word};
use crate::error::{Error, Kind, Result};
use crate::qemu::{Address, GuestAgent, Qmp, query};

/// How long an agent may take to say that it is there.
const AGENT_DEADLINE: Duration = Duration::from_secs(5);

/// How long the guardian tries to let a guest go before it gives up.
const LAST_DEADLINE: Duration = Duration::from_secs(300);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves one holder, and returns when the guest is let go, or was never held. `end` asks it
/// to do so soon: it lets go first.
pub async fn watch(
    orders: impl AsyncRead + Unpin,
    words: impl AsyncWrite + Unpin,
    end: CancellationToken,
) {
    let mut holder = Holder {
        orders: BufReader::new(orders),
        words,
    };
    let watched = match holder.order().await {
        Some(Order::Watch(Ward::Agent { address, deadline })) => {
            watch_agent(&address, deadline, &mut holder, &end).await
        }
        Some(Order::Watch(Ward::Monitor { address })) => watch_monitor(&address, &mut holder).await,
        _ => return,
    };
    if let Err(error) = watched {
        info!(error = error.chain(), "the guest is not held");
        let (kind, why) = (error.kind().into(), error.chain());
        holder.say(&Word::Failed { kind, why }).await;
    }
}

/// Who holds the guest, at the other end of two pipes.
struct Holder<R, W> {
    orders: BufReader<R>,
    words: W,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Holder<R, W> {
    /// The next order; `None`: there will be no more. Cancelled, it may have lost one.
    async fn order(&mut self) -> Option<Order> {
        let mut line = String::new();
        match self.orders.read_line(&mut line).await {
            Ok(length) if length > 0 => serde_json::from_str(&line).ok(),
            _ => None,
        }
    }

    async fn say(&mut self, word: &Word) {
        if let Ok(mut line) = serde_json::to_vec(word) {
            line.push(b'\n');
            // The holder may be gone, which is what this process is for.
            let _gone = self.words.write_all(&line).await;
            let _gone = self.words.flush().await;
        }
    }
}

async fn watch_agent<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    address: &Address,
    deadline: Duration,
    holder: &mut Holder<R, W>,
    end: &CancellationToken,
) -> Result<()> {
    let mut agent = look(address, deadline.min(AGENT_DEADLINE)).await?;
    holder.say(&Word::Ready).await;
    let ordered = tokio::select! {
        order = holder.order() => order,
        () = end.cancelled() => None,
    };
    if ordered != Some(Order::Hold) {
        return Ok(());
    }
    let began = Instant::now();
    let frozen = agent.freeze(deadline).await;
    let mut ordered = false;
    if let Ok(filesystems) = frozen {
        info!(%address, filesystems, "frozen");
        holder.say(&Word::Held { filesystems }).await;
        tokio::select! {
            order = holder.order() => ordered = order == Some(Order::Release),
            () = end.cancelled() => {}
            () = tokio::time::sleep_until(began + deadline) => {}
        }
    }
    let filesystems = thaw(Some(agent), address, deadline, LAST_DEADLINE)
        .await
        .inspect_err(|error| {
            error!(%address, error = error.chain(), "gave up: the guest may be frozen still");
        })?;
    let held = began.elapsed();
    info!(%address, ?filesystems, ?held, ordered, "thawed");
    frozen?;
    let release = Release {
        filesystems,
        held,
        ordered,
    };
    holder.say(&Word::Released(release)).await;
    Ok(())
}

/// A connection to an agent that can freeze, can thaw, and has frozen nothing.
async fn look(address: &Address, patience: Duration) -> Result<GuestAgent> {
    let refused =
        |why: String| Error::new(Kind::AgentRefused, "looking at the guest agent").because(why);
    let mut agent = GuestAgent::connect(address, patience).await?;
    if agent.is_frozen(patience).await? {
        // Whoever has frozen them will thaw them: not we.
        return Err(refused(
            "file systems are frozen already, by somebody else".into(),
        ));
    }
    // What could not be thawed must not be frozen.
    match agent.lacks(patience).await? {
        Some(command) => Err(refused(format!("its {command} is disabled"))),
        None => Ok(agent),
    }
}

/// Thaws until it is confirmed, for at most `last`: how many file systems were frozen until
/// then, where that can be told. Each answer may take `patience`.
///
/// # Errors
/// [`Kind::AgentUnreachable`], [`Kind::AgentRefused`] of the last try.
pub(crate) async fn thaw(
    mut agent: Option<GuestAgent>,
    address: &Address,
    patience: Duration,
    last: Duration,
) -> Result<Option<u64>> {
    let last = Instant::now() + last;
    let mut is_first = true;
    loop {
        let error = match try_to_thaw(&mut agent, address, patience).await {
            // One that was not confirmed may have been done: nobody knows how many it found.
            Ok(filesystems) => return Ok(filesystems.filter(|_| is_first)),
            Err(error) => error,
        };
        if is_gone(&error) || Instant::now() >= last {
            return Err(error);
        }
        warn!(%address, error = error.chain(), "not thawed yet");
        is_first = false;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn try_to_thaw(
    agent: &mut Option<GuestAgent>,
    address: &Address,
    patience: Duration,
) -> Result<Option<u64>> {
    let agent = match agent {
        Some(agent) if !agent.is_broken() => agent,
        other => other.insert(GuestAgent::connect(address, patience).await?),
    };
    match agent.thaw(patience).await {
        Ok(filesystems) => Ok(Some(filesystems)),
        // Windows says so when it had let go by itself: VSS holds writes for 10 s at most.
        Err(error) if error.kind() == Kind::AgentRefused => {
            if agent.is_frozen(patience).await? {
                return Err(error);
            }
            warn!(error = error.chain(), "thawed before it was asked");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn watch_monitor<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    address: &Address,
    holder: &mut Holder<R, W>,
) -> Result<()> {
    holder.say(&Word::Ready).await;
    if holder.order().await != Some(Order::Hold) {
        return Ok(());
    }
    holder.say(&Word::Held { filesystems: 0 }).await;
    // Not before: the holder has the monitor, and continues the VM itself.
    if holder.order().await == Some(Order::Release) {
        return Ok(());
    }
    let last = Instant::now() + LAST_DEADLINE;
    while let Err(error) = resume(address).await {
        if is_gone(&error) || Instant::now() >= last {
            error!(%address, error = error.chain(), "gave up: the VM may be paused still");
            return Err(error);
        }
        warn!(%address, error = error.chain(), "not continued yet");
        tokio::time::sleep(PAUSE).await;
    }
    info!(%address, "the VM is not paused");
    Ok(())
}

async fn resume(address: &Address) -> Result<()> {
    let qmp = Qmp::connect(address, AGENT_DEADLINE).await?;
    if query::status(&qmp).await?.as_deref() == Some("paused") {
        qmp.execute_raw("cont", json!({})).await?;
    }
    Ok(())
}

/// Whether nobody listens at the address any more: QEMU has ended, and the guest with it.
fn is_gone(error: &Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.is_some_and(|cause| matches!(cause.kind(), ConnectionRefused | NotFound))
}
