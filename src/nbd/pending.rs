//! Requests that wait for their replies, and why a connection is over.
//!
//! An entry stays in the table while its reply is being read (only its
//! [`Work`] is taken out), so that the deadline and the end of the connection
//! reach it at any moment.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::buffer::Buffer;
use crate::error::{Error, Kind, Result};
use crate::nbd::reply::Reply;

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Bytes(Buffer),
    Extents(Vec<(u64, u64)>),
}

/// What the reader needs to take in a reply.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) reply: Reply,
    /// Where the bytes of a READ go.
    pub(super) buffer: Option<Buffer>,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Pending {
    /// `None` while the reader reads a chunk of it.
    pub(super) work: Option<Work>,
    pub(super) answer: oneshot::Sender<Result<Answer>>,
    pub(super) since: Instant,
    pub(super) _slot: OwnedSemaphorePermit,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) pending: HashMap<u64, Pending>,
    pub(super) last_cookie: u64,
    /// Why nothing can be asked any more.
    pub(super) dead: Option<(Kind, String)>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    table: Mutex<Table>,
}

impl Shared {
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection is over: all that waits gets to know why. The first reason stays.
    pub(super) fn kill(&self, error: &Error) {
        let pending = {
            let mut table = self.table();
            let why = std::error::Error::source(error)
                .map_or_else(|| error.to_string(), ToString::to_string);
            table.dead.get_or_insert((error.kind(), why));
            std::mem::take(&mut table.pending)
        };
        for pending in pending.into_values() {
            // Whoever asked may be gone.
            let _gone = pending
                .answer
                .send(Err(self.obituary("waiting for an NBD reply")));
        }
    }

    /// Why the connection is over, for who was `doing` something.
    pub(super) fn obituary(&self, doing: &'static str) -> Error {
        match &self.table().dead {
            Some((kind, why)) => Error::new(*kind, doing).because(why.clone()),
            None => Error::new(Kind::NbdClosed, doing).because("the connection was closed"),
        }
    }

    /// Returns once a request has waited for `deadline`; tells so.
    pub(super) async fn late(&self, deadline: Duration) -> Error {
        let mut wait = deadline;
        loop {
            // Whatever is asked meanwhile has its deadline later than this ends.
            tokio::time::sleep(wait).await;
            let oldest = self.table().pending.values().map(|it| it.since).min();
            let waited = oldest.map_or(Duration::ZERO, |since| since.elapsed());
            if waited >= deadline {
                return Error::new(Kind::NbdTimeout, "reading NBD replies")
                    .because(format!("no complete reply within {deadline:?}"));
            }
            wait = deadline - waited;
        }
    }
}
