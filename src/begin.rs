//! Begin: from wishes to open points in time, of one VM or of several together.
//!
//! ```text
//! VM 1: prepare ---\                                    /--- finish ---> Session
//! VM 2: prepare ----+-- quiesce -- instant -- release --+-- finish ---> Session
//! ```
//! Each VM's instant is one transaction, atomic over its disks. Those of several VMs are
//! sent together once all are prepared: how far they lie apart is measured, not promised.
//! Guests that are to be held still are so from before the first instant until after the last;
//! and pushes even longer.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::error::{Error, Kind, Result};
use crate::guardian::Program;
pub use crate::opening::Member;
use crate::opening::Opening;
use crate::qemu::Qmp;
use crate::quiesce::{Consistency, Quiet, Released, quiesce};
use crate::session::Session;

/// Most VMs that begin together.
pub const MAX_MEMBERS: usize = 64;

/// What has begun.
#[derive(Debug)]
pub struct Begun {
    /// One for each member, in their order.
    pub sessions: Vec<Session>,
    /// What each point in time is consistent with.
    pub released: Vec<Released>,
    /// How far the instants may lie apart: from the first transaction sent to the last
    /// one answered. Of one VM: how long its transaction took.
    pub skew: Duration,
}

/// Opens the points in time of all members, or of none. `guardian` lets guests go that are held.
///
/// # Errors
/// Those of each step; [`Kind::Cancelled`]. All that was made is taken away again, and
/// [`Error::leftovers`] names what could not be.
pub async fn begin(
    members: Vec<Member>,
    guardian: &Program,
    cancel: &CancellationToken,
) -> Result<Begun> {
    let guests = members.iter().map(|member| {
        let Member {
            qmp, consistency, ..
        } = member;
        (qmp.clone(), consistency.clone())
    });
    let guests: Vec<_> = guests.collect();
    let mut openings = Vec::new();
    for member in members {
        match Opening::prepare(member, cancel).await {
            Ok(opening) => openings.push(opening),
            Err(error) => return Err(give_up(openings, error).await),
        }
    }
    // Pushes come to a stand before the guests do, which would wait for them.
    let mut lulls = Vec::new();
    let hold = async {
        for (qmp, _) in &guests {
            lulls.push(qmp.lull().await);
        }
        hold_all(guests, guardian).await
    };
    // Cancelled, it lets go of those that are held.
    let quiet = tokio::select! {
        quiet = hold => quiet,
        () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "holding the guests")),
    };
    let quiet = match quiet {
        Ok(quiet) => quiet,
        Err(error) => return Err(give_up(openings, error).await),
    };
    let (openings, skew, taken) = take_instants(openings).await;
    let released = release_all(quiet).await;
    drop(lulls);
    let released = match taken.and(released) {
        Ok(released) => released,
        Err(error) => return Err(give_up(openings, error).await),
    };
    let mut sessions: Vec<Session> = Vec::new();
    let mut rest = openings.into_iter();
    while let Some(opening) = rest.next() {
        match opening.finish().await {
            Ok(session) => sessions.push(session),
            Err(mut error) => {
                for session in sessions {
                    error = error.leaving(session.abort().await);
                }
                return Err(give_up(rest.collect(), error).await);
            }
        }
    }
    for session in &sessions {
        info!(
            session = session.id,
            disks = session.disks().len(),
            ?skew,
            "point in time open"
        );
    }
    Ok(Begun {
        sessions,
        released,
        skew,
    })
}

async fn give_up(openings: Vec<Opening>, mut error: Error) -> Error {
    for opening in openings {
        error = opening.give_up(error).await;
    }
    error
}

/// All at once, so that none waits for another while it is held.
async fn hold_all(guests: Vec<(Qmp, Consistency)>, guardian: &Program) -> Result<Vec<Quiet>> {
    together(guests, |(qmp, consistency)| {
        let guardian = guardian.clone();
        async move { quiesce(&qmp, &consistency, &guardian).await }
    })
    .await
    .into_iter()
    .collect()
}

/// All at once; each is let go, whatever becomes of the others.
async fn release_all(quiet: Vec<Quiet>) -> Result<Vec<Released>> {
    together(quiet, Quiet::release).await.into_iter().collect()
}

/// Does `work` on all at once: the results in the same order, once all have ended. Dropped, it
/// ends all.
async fn together<T, R, F>(all: Vec<T>, work: impl Fn(T) -> F) -> Vec<Result<R>>
where
    R: Send + 'static,
    F: Future<Output = Result<R>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let mut results: Vec<Option<Result<R>>> = Vec::new();
    for (place, one) in all.into_iter().enumerate() {
        let one = work(one);
        tasks.spawn(async move { (place, one.await) });
        results.push(None);
    }
    while let Some(joined) = tasks.join_next().await {
        if let Ok((place, result)) = joined {
            results[place] = Some(result);
        }
    }
    let panicked = || Err(Error::new(Kind::Internal, "working on several VMs"));
    results
        .into_iter()
        .map(|result| result.unwrap_or_else(panicked))
        .collect()
}

/// All at once; the first error, if any, once all have ended.
async fn take_instants(openings: Vec<Opening>) -> (Vec<Opening>, Duration, Result<()>) {
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for (place, mut opening) in openings.into_iter().enumerate() {
        tasks.spawn(async move {
            let taken = opening.instant().await;
            (place, opening, taken)
        });
    }
    let mut done = Vec::new();
    let mut result = Ok(());
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok((place, opening, taken)) => {
                done.push((place, opening));
                result = result.and(taken);
            }
            Err(panic) => {
                let defect = Error::new(Kind::Internal, "taking the instant").because(panic);
                result = result.and(Err(defect));
            }
        }
    }
    let skew = started.elapsed();
    done.sort_by_key(|(place, _)| *place);
    let openings = done.into_iter().map(|(_, opening)| opening).collect();
    (openings, skew, result)
}
