//! What is where in a view, without its bytes.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::claim::Claim;
use crate::error::{Error, Kind, Result};
use crate::extent::{Content, Extent};
use crate::view::View;
use crate::walk::Walk;

/// A disk's extents, by offset: contiguous, and neighbours differ.
#[derive(Debug)]
pub struct Map {
    /// The view stays as it was: a map is not a copy.
    claim: Claim,
    cancel: CancellationToken,
    walk: Walk,
    held: Option<Extent>,
}

impl Map {
    /// Starts to walk `view`; stops when `cancel` says so.
    ///
    /// # Errors
    /// [`Kind::StreamActive`]; [`Kind::OffsetReleased`] where a part was given back;
    /// [`Kind::PointInTimeLost`]; [`Kind::Cancelled`]; NBD's.
    pub async fn open(view: Arc<View>, cancel: CancellationToken) -> Result<Self> {
        let claim = Claim::whole(view)?;
        match Walk::open(claim.view(), 0, 0).await {
            Ok(walk) => Ok(Self {
                claim,
                cancel,
                walk,
                held: None,
            }),
            Err(_) if cancel.is_cancelled() => Err(cancelled()),
            Err(error) => Err(claim.view().explain(error).await),
        }
    }

    /// The next extent; `None` at the end of the disk. Holes are zeros like others.
    ///
    /// # Errors
    /// [`Kind::Cancelled`], [`Kind::PointInTimeLost`], NBD's. The map is over then.
    pub async fn next(&mut self) -> Result<Option<Extent>> {
        loop {
            let cancel = self.cancel.clone();
            let found = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(cancelled()),
                found = self.walk.next() => found,
            };
            let found = match found {
                Err(_) if cancel.is_cancelled() => return Err(cancelled()),
                Err(error) => return Err(self.claim.view().explain(error).await),
                Ok(Some(found)) => without_holes(found),
                Ok(None) => return Ok(self.held.take()),
            };
            match &mut self.held {
                Some(held) if held.content == found.content => held.range.end = found.range.end,
                held => {
                    if let Some(extent) = held.replace(found) {
                        return Ok(Some(extent));
                    }
                }
            }
        }
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "mapping a disk")
}

fn without_holes(mut extent: Extent) -> Extent {
    if let Content::Zero { hole } = &mut extent.content {
        *hole = false;
    }
    extent
}
