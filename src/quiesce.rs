//! Holds a guest still around the instant of a point in time.
//!
//! ```text
//! quiesce --> Quiet --(the instant)--> release --> Released
//!                \____ dropped: the guest is let go all the same
//! ```
//! Whatever becomes of this process, the guest is let go: see [`crate::guardian`].
//!
//! The guest was held still only if all of this is confirmed: the agent froze its file systems,
//! `release` came before the deadline, and as many file systems were thawed then as had been
//! frozen. Anything less is by policy: an error, or a point in time as after a crash that says why.

use std::time::Duration;

use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::guardian::{self, Guardian, Program, Ward};
use crate::qemu::{Address, Qmp, query};

/// How many deadlines a thaw may take before nobody waits for it: the guardian goes on.
const TRIES: u32 = 3;

/// What a point in time is to be consistent with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// What is on the disks, as after a loss of power.
    Crash,
    /// The guest's file systems, and its applications' hooks: frozen by the guest agent.
    Agent {
        /// The agent's socket.
        address: Address,
        /// What becomes of a backup without it.
        policy: Policy,
        /// How long file systems may be frozen; and how long the agent may take to answer.
        deadline: Duration,
    },
    /// As `Crash`; the VM is paused meanwhile.
    Pause,
}

/// What becomes of a backup whose guest cannot be held still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It fails.
    Require,
    /// It goes on, consistent as after a crash, and says why.
    Try,
}

/// How a point in time was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Of a guest that wrote on.
    Crash,
    /// With all file systems frozen.
    Agent,
    /// While the VM was paused.
    Pause,
}

/// A guest that was let go.
#[derive(Debug)]
pub struct Released {
    /// What the point in time is.
    pub how: How,
    /// How long the guest was held, at most: from before the freeze or `stop` until after the
    /// thaw or `cont`.
    pub held: Duration,
    /// How many file systems were frozen. 0: the guest has none that can be.
    pub filesystems: u64,
    /// Why it is no better than `how`, where more was tried.
    pub why_not: Option<Error>,
}

impl Released {
    fn crash(why_not: Option<Error>) -> Self {
        Self {
            how: How::Crash,
            held: Duration::ZERO,
            filesystems: 0,
            why_not,
        }
    }
}

/// A guest that is held still.
#[derive(Debug)]
pub struct Quiet {
    state: State,
    policy: Policy,
}

#[derive(Debug)]
enum State {
    /// Not at all.
    Free(Option<Error>),
    Held(Keeper),
}

/// Holds the guest still, and returns when it is: the instant is to follow at once. Dropped in
/// between, it lets the guest go.
///
/// # Errors
/// With [`Policy::Require`]: [`Kind::AgentUnreachable`], [`Kind::AgentRefused`],
/// [`Kind::GuestHeld`], [`Kind::ConsistencyLost`]. QEMU's where it is to be paused.
/// [`Kind::Internal`] where the guardian cannot be started.
pub async fn quiesce(qmp: &Qmp, consistency: &Consistency, guardian: &Program) -> Result<Quiet> {
    let program = guardian.clone();
    let (policy, kept) = match consistency.clone() {
        Consistency::Crash => {
            let state = State::Free(None);
            let policy = Policy::Require;
            return Ok(Quiet { state, policy });
        }
        Consistency::Agent {
            address,
            policy,
            deadline,
        } => {
            let kept = Keeper::start(|moment| freeze(program, address, deadline, moment));
            (policy, kept.await)
        }
        Consistency::Pause => {
            let kept = Keeper::start(|moment| pause(program, qmp.clone(), moment));
            (Policy::Require, kept.await)
        }
    };
    let state = match kept {
        Ok(keeper) => State::Held(keeper),
        Err(error) if policy == Policy::Try => State::Free(Some(error)),
        Err(error) => return Err(error),
    };
    Ok(Quiet { state, policy })
}

impl Quiet {
    /// Lets the guest go, once the instant is taken or will not be.
    ///
    /// # Errors
    /// With [`Policy::Require`]: [`Kind::ConsistencyLost`]; [`Kind::GuestHeld`]. QEMU's where
    /// it was paused.
    pub async fn release(self) -> Result<Released> {
        let keeper = match self.state {
            State::Free(why_not) => return Ok(Released::crash(why_not)),
            State::Held(keeper) => keeper,
        };
        let mut released = keeper.release().await?;
        if released.why_not.is_none() {
            return Ok(released);
        }
        if let Some(error) = released
            .why_not
            .as_ref()
            .filter(|error| error.kind() == Kind::GuestHeld)
        {
            tracing::error!(error = error.chain(), "the guest may be held still");
        }
        if self.policy == Policy::Require
            && let Some(error) = released.why_not
        {
            return Err(error);
        }
        released.how = How::Crash;
        Ok(released)
    }
}

/// A task that holds the guest and lets it go: so it does also where its owner is dropped in
/// the middle of a call.
#[derive(Debug)]
struct Keeper {
    release: oneshot::Sender<()>,
    task: JoinHandle<Result<Released>>,
}

/// The time between, from the task's side.
struct Moment {
    held: oneshot::Sender<()>,
    released: oneshot::Receiver<()>,
}

impl Moment {
    /// Says that the guest is held, and waits until it is to be let go: when that was.
    async fn pass(self) -> Instant {
        let _gone = self.held.send(());
        let _dropped = self.released.await;
        Instant::now()
    }
}

impl Keeper {
    /// Returns when the guest is held.
    async fn start<F>(work: impl FnOnce(Moment) -> F) -> Result<Self>
    where
        F: Future<Output = Result<Released>> + Send + 'static,
    {
        let (held, is_held) = oneshot::channel();
        let (release, released) = oneshot::channel();
        let task = tokio::spawn(work(Moment { held, released }));
        let keeper = Self { release, task };
        if is_held.await.is_ok() {
            return Ok(keeper);
        }
        let ended = keeper.release().await.map(|released| released.why_not);
        match ended {
            Err(error) | Ok(Some(error)) => Err(error),
            Ok(None) => Err(Error::new(Kind::Internal, "holding the guest")),
        }
    }

    async fn release(self) -> Result<Released> {
        let _ended = self.release.send(());
        let ended = self.task.await;
        ended.unwrap_or_else(|error| {
            Err(Error::new(Kind::Internal, "holding the guest").because(error))
        })
    }
}

/// Has file systems frozen by a guardian.
async fn freeze(
    program: Program,
    address: Address,
    deadline: Duration,
    moment: Moment,
) -> Result<Released> {
    let ward = Ward::Agent {
        address: address.clone(),
        deadline,
    };
    let mut guardian = Guardian::start(&program, ward, TRIES * deadline).await?;
    let began = Instant::now();
    let filesystems = match guardian.hold((1 + TRIES) * deadline).await {
        Ok(filesystems) => filesystems,
        Err(error) if error.kind() == Kind::Internal => {
            return Err(rescue(&address, deadline, error).await);
        }
        Err(error) => return Err(error),
    };
    let asked = moment.pass().await - began;
    let (held, why_not) = match guardian.release(TRIES * deadline).await {
        Err(error) => (
            began.elapsed(),
            Some(rescue(&address, deadline, error).await),
        ),
        Ok(release) => {
            let is_late = asked > deadline || !release.ordered;
            let doubt = doubt(is_late, filesystems, release.filesystems);
            (release.held, doubt.map(lost))
        }
    };
    Ok(Released {
        how: How::Agent,
        held,
        filesystems,
        why_not,
    })
}

/// Why it is not sure that all file systems were frozen at the instant.
fn doubt(is_late: bool, frozen: u64, thawed: Option<u64>) -> Option<String> {
    match thawed {
        _ if is_late => Some("the deadline passed first, or the guardian was told to end".into()),
        None => Some("the agent does not vouch for it".into()),
        Some(thawed) if thawed < frozen => Some(format!(
            "{frozen} file systems were frozen, and {thawed} in the end"
        )),
        Some(_) => None,
    }
}

fn lost(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::ConsistencyLost, "holding the guest up to the instant").because(why)
}

/// Thaws where the guardian has met `error`, and perhaps its end.
async fn rescue(address: &Address, deadline: Duration, error: Error) -> Error {
    if error.kind() == Kind::GuestHeld {
        // It goes on, and the agent has room for one client.
        return error;
    }
    match guardian::thaw(None, address, deadline, TRIES * deadline).await {
        Ok(_) => lost(error),
        Err(held) => Error::new(Kind::GuestHeld, "thawing the guest").because(held),
    }
}

/// Pauses the VM, with a guardian that stands by.
async fn pause(program: Program, qmp: Qmp, moment: Moment) -> Result<Released> {
    let mut released = Released {
        how: How::Pause,
        ..Released::crash(None)
    };
    if query::status(&qmp).await?.as_deref() != Some("running") {
        // Nothing is as still as that.
        moment.pass().await;
        return Ok(released);
    }
    let Some(address) = qmp.address().cloned() else {
        let doing = "pausing the VM";
        return Err(Error::new(Kind::QemuUnsupported, doing).because("its monitor has no address"));
    };
    let mut guardian = Guardian::start(&program, Ward::Monitor { address }, Duration::ZERO).await?;
    guardian.hold(guardian::START_DEADLINE).await?;
    let began = Instant::now();
    let stopped = qmp.execute_raw("stop", json!({})).await;
    if stopped.is_ok() {
        moment.pass().await;
    }
    // A `stop` without an answer may be done yet, and this after it.
    let resumed = resume(&qmp).await;
    released.held = began.elapsed();
    let may_be_paused = |error: &Error| error.kind() != Kind::ConsistencyLost;
    if !resumed.as_ref().is_err_and(may_be_paused) {
        // One that is not told waits for the monitor, and continues the VM.
        guardian.stand_down().await;
        stopped?;
    }
    released.why_not = resumed.err();
    Ok(released)
}

/// Continues the VM, unless it is in a state that is somebody else's concern by now.
async fn resume(qmp: &Qmp) -> Result<()> {
    let resumed = async {
        let status = query::status(qmp).await?;
        match status.as_deref() {
            Some("paused") => qmp.execute_raw("cont", json!({})).await.map(drop),
            Some("running") => Err(lost("somebody else has continued the VM")),
            _ => Ok(()),
        }
    };
    resumed.await.map_err(|error| match error.kind() {
        // QEMU may have ended; the guardian looks.
        Kind::MonitorClosed | Kind::ConsistencyLost => error,
        _ => Error::new(Kind::GuestHeld, "continuing the VM").because(error),
    })
}
