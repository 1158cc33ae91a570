//! Begin: from wishes to open points in time, of one VM or of several together.
//!
//! ```text
//! VM 1: prepare ---\             /--- finish ---> Session
//! VM 2: prepare ----+-- instant --+-- finish ---> Session
//! ```
//! Each VM's instant is one transaction, atomic over its disks. Those of several VMs are
//! sent together once all are prepared: how far they lie apart is measured, not promised.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::error::{Error, Kind, Result};
pub use crate::opening::Member;
use crate::opening::Opening;
use crate::session::Session;

/// Most VMs that begin together.
pub const MAX_MEMBERS: usize = 64;

/// What has begun.
#[derive(Debug)]
pub struct Begun {
    /// One for each member, in their order.
    pub sessions: Vec<Session>,
    /// How far the instants may lie apart: from the first transaction sent to the last
    /// one answered. Of one VM: how long its transaction took.
    pub skew: Duration,
}

/// Opens the points in time of all members, or of none.
///
/// # Errors
/// Those of each step; [`Kind::Cancelled`]. All that was made is taken away again, and
/// [`Error::leftovers`] names what could not be.
pub async fn begin(members: Vec<Member>, cancel: &CancellationToken) -> Result<Begun> {
    let mut openings = Vec::new();
    for member in members {
        match Opening::prepare(member, cancel).await {
            Ok(opening) => openings.push(opening),
            Err(error) => return Err(give_up(openings, error).await),
        }
    }
    let (openings, skew, taken) = take_instants(openings).await;
    if let Err(error) = taken {
        return Err(give_up(openings, error).await);
    }
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
    Ok(Begun { sessions, skew })
}

async fn give_up(openings: Vec<Opening>, mut error: Error) -> Error {
    for opening in openings {
        error = opening.give_up(error).await;
    }
    error
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
