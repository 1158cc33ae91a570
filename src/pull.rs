//! Reading a disk's view in order: what changed, what of it is allocated, and
//! its bytes, several reads ahead.
//!
//! ```text
//! changes (dirty bitmap) --dirty--> allocation --data--> reads under way --> zeros found
//!        \--clean: same              \--zero                (READS ahead)       |
//!         \-------------------------------------------------------------> chunks, by offset
//! ```
//! A buffer must be free before a read is sent (see [`crate::buffer`]): QEMU's
//! replies always find room, whatever the consumer does with the chunks.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::buffer::{Buffer, Pool};
use crate::chunk::{Chunk, Chunks};
use crate::claim::Claim;
use crate::error::{Error, Kind, Result};
use crate::extent::{Content, Extent, Range, length, next_cut};
use crate::nbd::Ticket;
use crate::view::{READ_MAX, View};
use crate::walk::Walk;

/// Reads under way at a time.
const READS: usize = 8;

/// Buffers of a stream, under way and at the consumer.
const BUFFERS: usize = 10;

/// Most pieces that wait for a read before them.
const SLOTS: usize = 256;

/// How many bytes are read before what was passed is given back in one go,
const RELEASE_READ: u64 = 8 * 1024 * 1024;

/// or how much of the disk is passed: each TRIM is a round trip.
const RELEASE_PASSED: u64 = 256 * 1024 * 1024;

#[derive(Debug)]
enum Slot {
    Known(Extent),
    Reading(Range, Ticket<Buffer>),
}

/// A stream of one disk's chunks.
#[derive(Debug)]
pub struct Pull {
    claim: Claim,
    cancel: CancellationToken,
    release_on_read: bool,
    read_max: u64,
    pool: Pool,
    walk: Walk,
    to_read: Range,
    slots: VecDeque<Slot>,
    reading: usize,
    chunks: Chunks,
    handed: u64,
    read_bytes: u64,
    /// `read_bytes` when something was last given back.
    released_at: u64,
    is_whole: bool,
}

impl Pull {
    /// Starts to read `view` at `offset`; stops when `cancel` says so.
    ///
    /// # Errors
    /// [`Kind::StreamActive`]; [`Kind::OffsetReleased`] with the only offset that
    /// would do; [`Kind::PointInTimeLost`]; NBD's.
    pub async fn open(
        view: Arc<View>,
        offset: u64,
        release_on_read: bool,
        cancel: CancellationToken,
    ) -> Result<Self> {
        let claim = Claim::pull(view, offset)?;
        let view = claim.view();
        // One read tells as much as asking first, in one round trip.
        let walk = match Walk::open(view, offset, READ_MAX).await {
            Ok(walk) => walk,
            Err(_) if cancel.is_cancelled() => return Err(cancelled()),
            Err(error) => return Err(view.explain(error).await),
        };
        let (read_max, _) = view.read_max();
        if release_on_read {
            view.flow().await;
        }
        Ok(Self {
            read_max,
            claim,
            cancel,
            release_on_read,
            pool: Pool::new(BUFFERS),
            walk,
            to_read: 0..0,
            slots: VecDeque::new(),
            reading: 0,
            chunks: Chunks::new(READ_MAX),
            handed: offset,
            read_bytes: 0,
            released_at: 0,
            is_whole: false,
        })
    }

    /// Data chunks shall not cross a multiple of `cut`: a power of two up to [`READ_MAX`].
    #[must_use]
    pub fn cut_at(mut self, cut: u64) -> Self {
        self.chunks = Chunks::new(cut);
        self
    }

    /// Bytes that were read from QEMU so far.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// The view that is read.
    #[must_use]
    pub fn view(&self) -> &View {
        self.claim.view()
    }

    /// The consumer has all that [`Pull::next`] gave, up to its end: the disk can be committed.
    pub fn finish(self) {
        if self.is_whole {
            self.claim.complete();
        }
    }

    /// The next chunk; `None` at the end of the disk. With the call for a chunk,
    /// those before count as handed over.
    ///
    /// # Errors
    /// [`Kind::Cancelled`], [`Kind::PointInTimeLost`], NBD's. The stream is over then.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        let cancel = self.cancel.clone();
        let found = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled()),
            found = self.step() => found,
        };
        match found {
            // The end of the session closes sockets under a reader.
            Err(_) if cancel.is_cancelled() => Err(cancelled()),
            Err(error) => Err(self.view().explain(error.at(self.handed)).await),
            Ok(chunk) => Ok(chunk),
        }
    }

    async fn step(&mut self) -> Result<Option<Chunk>> {
        if self.read_bytes - self.released_at >= RELEASE_READ {
            self.released_at = self.read_bytes;
            self.give_back(1).await;
        } else {
            self.give_back(RELEASE_PASSED).await;
        }
        loop {
            if let Some(chunk) = self.chunks.pop() {
                self.handed = chunk.extent.range.end;
                return Ok(Some(chunk));
            }
            self.fill().await?;
            match self.slots.pop_front() {
                Some(Slot::Known(extent)) => self.chunks.known(extent),
                Some(Slot::Reading(range, ticket)) => {
                    self.reading -= 1;
                    let buffer = ticket.await?;
                    self.read_bytes += length(&range);
                    self.chunks.bytes(range.start, buffer);
                }
                None if self.chunks.flush() => {}
                None => {
                    self.is_whole = true;
                    self.give_back(1).await;
                    return Ok(None);
                }
            }
        }
    }

    async fn give_back(&self, least: u64) {
        if self.release_on_read {
            self.view().give_back_in_steps(self.handed, least).await;
        }
    }

    /// Sends reads until enough are under way.
    async fn fill(&mut self) -> Result<()> {
        while self.reading < READS && self.slots.len() < SLOTS {
            if self.to_read.is_empty() {
                match self.walk.next().await? {
                    None => return Ok(()),
                    Some(Extent {
                        range,
                        content: Content::Data,
                    }) => self.to_read = range,
                    Some(extent) => {
                        self.slots.push_back(Slot::Known(extent));
                        continue;
                    }
                }
            }
            let start = self.to_read.start;
            let end = next_cut(start, self.read_max, self.to_read.end);
            let bytes = usize::try_from(end - start).unwrap_or(usize::MAX);
            let buffer = match self.pool.try_take(bytes) {
                Some(buffer) => buffer,
                None if self.slots.is_empty() => self.pool.take(bytes).await,
                // What is under way comes first.
                None => return Ok(()),
            };
            let ticket = self.walk.data().submit_read(start, buffer).await?;
            self.slots.push_back(Slot::Reading(start..end, ticket));
            self.reading += 1;
            self.to_read.start = end;
        }
        Ok(())
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "reading a disk")
}
