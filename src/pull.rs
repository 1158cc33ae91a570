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
use std::ops::Deref;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::buffer::{Buffer, Pool};
use crate::error::{Error, Kind, Result};
use crate::extent::{Content, Extent, Range, length, next_cut, split_zeros};
use crate::nbd::{Client, Ticket, status};
use crate::view::{Cursor, READ_MAX, View};

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

/// Bytes of a chunk; clones and slices share the buffer.
#[derive(Clone, Debug)]
pub struct Slice {
    buffer: Arc<Buffer>,
    range: std::ops::Range<usize>,
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// A piece of the disk. Chunks are contiguous and never empty.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Where, and what it holds. Data never crosses a multiple of the stream's cut.
    pub extent: Extent,
    /// The bytes, of data.
    pub bytes: Option<Slice>,
}

#[derive(Debug)]
enum Slot {
    Known(Extent),
    Reading(Range, Ticket<Buffer>),
}

/// A stream of one disk's chunks.
#[derive(Debug)]
pub struct Pull {
    view: Arc<View>,
    cancel: CancellationToken,
    release_on_read: bool,
    cut: u64,
    read_max: u64,
    ask_allocation: bool,
    pool: Pool,
    data: Client,
    changes: Option<Client>,
    /// Walks the changes, in an incremental; the allocation, in a full.
    outer: Cursor,
    /// Walks the allocation of one changed range.
    inner: Option<Cursor>,
    to_read: Range,
    slots: VecDeque<Slot>,
    reading: usize,
    /// The last known piece, as long as the next may still lengthen it.
    held: Option<Extent>,
    out: VecDeque<Chunk>,
    handed: u64,
    read_bytes: u64,
    /// `read_bytes` when something was last given back.
    released_at: u64,
    complete: bool,
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.view.stop(self.complete);
    }
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
        view.start(offset)?;
        let connected = async { Ok((view.connect_data().await?, view.connect_changes().await?)) };
        let (data, changes) = match connected.await {
            Ok(clients) => clients,
            Err(error) => {
                view.stop(false);
                return Err(view.explain(error).await);
            }
        };
        let (read_max, ask_allocation) = view.read_max();
        Ok(Self {
            read_max,
            ask_allocation,
            outer: Cursor::new(offset..view.size()),
            view,
            cancel,
            release_on_read,
            cut: READ_MAX,
            pool: Pool::new(BUFFERS),
            data,
            changes,
            inner: None,
            to_read: 0..0,
            slots: VecDeque::new(),
            reading: 0,
            held: None,
            out: VecDeque::new(),
            handed: offset,
            read_bytes: 0,
            released_at: 0,
            complete: false,
        })
    }

    /// Data chunks shall not cross a multiple of `cut`: a power of two up to [`READ_MAX`].
    #[must_use]
    pub fn cut_at(mut self, cut: u64) -> Self {
        self.cut = cut;
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
        &self.view
    }

    /// The next chunk; `None` at the end of the disk. With the call for a chunk,
    /// those before count as handed over.
    ///
    /// # Errors
    /// [`Kind::Cancelled`], [`Kind::PointInTimeLost`], NBD's. The stream is over then.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        let cancel = self.cancel.clone();
        let cancelled = || Error::new(Kind::Cancelled, "reading a disk");
        let found = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled()),
            found = self.step() => found,
        };
        match found {
            // The end of the session closes sockets under a reader.
            Err(_) if cancel.is_cancelled() => Err(cancelled()),
            Err(error) => Err(self.view.explain(error.at(self.handed)).await),
            Ok(chunk) => Ok(chunk),
        }
    }

    async fn step(&mut self) -> Result<Option<Chunk>> {
        if self.read_bytes - self.released_at >= RELEASE_READ {
            self.give_back(1).await;
        } else {
            self.give_back(RELEASE_PASSED).await;
        }
        loop {
            if let Some(chunk) = self.out.pop_front() {
                self.handed = chunk.extent.range.end;
                return Ok(Some(chunk));
            }
            self.fill().await?;
            match self.slots.pop_front() {
                Some(Slot::Known(extent)) => self.known(extent),
                Some(Slot::Reading(range, ticket)) => {
                    self.reading -= 1;
                    let buffer = ticket.await?;
                    self.read_bytes += length(&range);
                    self.bytes(range.start, buffer);
                }
                None if self.held.is_some() => self.flush(),
                None => {
                    self.complete = true;
                    self.give_back(1).await;
                    return Ok(None);
                }
            }
        }
    }

    async fn give_back(&self, least: u64) {
        if self.release_on_read {
            self.view.release_in_steps(self.handed, least).await;
        }
    }

    /// Sends reads until enough are under way.
    async fn fill(&mut self) -> Result<()> {
        while self.reading < READS && self.slots.len() < SLOTS {
            if self.to_read.is_empty() {
                match self.plan().await? {
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
            let ticket = self.data.submit_read(start, buffer).await?;
            self.slots.push_back(Slot::Reading(start..end, ticket));
            self.reading += 1;
            self.to_read.start = end;
        }
        Ok(())
    }

    /// The next piece of the disk, by offset.
    async fn plan(&mut self) -> Result<Option<Extent>> {
        let allocation = |(range, flags)| Extent {
            range,
            content: status::content(flags),
        };
        let data = |range| Extent {
            range,
            content: Content::Data,
        };
        if let Some(inner) = &mut self.inner {
            if let Some(found) = inner.next(&self.data).await? {
                return Ok(Some(allocation(found)));
            }
            self.inner = None;
        }
        let Some(changes) = &self.changes else {
            if !self.ask_allocation {
                return Ok(self.outer.rest().map(data));
            }
            return Ok(self.outer.next(&self.data).await?.map(allocation));
        };
        match self.outer.next(changes).await? {
            None => Ok(None),
            Some((range, flags)) if !status::is_dirty(flags) => Ok(Some(Extent {
                range,
                content: Content::Same,
            })),
            // One read tells as much as asking first, in one round trip.
            Some((range, _)) if length(&range) <= READ_MAX || !self.ask_allocation => {
                Ok(Some(data(range)))
            }
            Some((range, _)) => {
                let mut inner = Cursor::new(range);
                let first = inner.next(&self.data).await?.map(allocation);
                self.inner = Some(inner);
                Ok(first)
            }
        }
    }

    /// A piece without bytes: lengthens the one before, or follows it.
    fn known(&mut self, extent: Extent) {
        match &mut self.held {
            Some(held) if held.content == extent.content => held.range.end = extent.range.end,
            _ => {
                self.flush();
                self.held = Some(extent);
            }
        }
    }

    fn flush(&mut self) {
        if let Some(extent) = self.held.take() {
            self.out.push_back(Chunk {
                extent,
                bytes: None,
            });
        }
    }

    /// Bytes that were read: zeros among them are told as such.
    fn bytes(&mut self, offset: u64, buffer: Buffer) {
        let runs = split_zeros(offset, &buffer);
        let buffer = Arc::new(buffer);
        for run in runs {
            if run.content != Content::Data {
                self.known(run);
                continue;
            }
            self.flush();
            let mut at = run.range.start;
            while at < run.range.end {
                let end = next_cut(at, self.cut, run.range.end);
                let index = |place: u64| usize::try_from(place - offset).unwrap_or(usize::MAX);
                let slice = Slice {
                    buffer: Arc::clone(&buffer),
                    range: index(at)..index(end),
                };
                let extent = Extent {
                    range: at..end,
                    content: Content::Data,
                };
                self.out.push_back(Chunk {
                    extent,
                    bytes: Some(slice),
                });
                at = end;
            }
        }
    }
}
