//! One disk's view of the point in time: where it is read, what of it was given
//! back, and what its scratch takes.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::checkpoint::GRANULARITY;
use crate::error::{Error, Kind, Result};
use crate::extent::{Range, inner_aligned, length, next_cut};
use crate::nbd::{Address, Client, status};
use crate::qemu::discover::Disk;
use crate::qemu::{Qmp, query};
use crate::scratch::Scratch;

/// How long QEMU's NBD server gets to greet, and to answer one request. A
/// storage that hangs longer than this ends the stream, not the backup.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// Longest range of one TRIM or one block status request: fits compact headers,
/// and keeps QEMU's answer to one within its own limit in practice.
const STEP: u64 = 1 << 30;

/// Longest read: throughput falls on either side of it.
pub const READ_MAX: u64 = 1024 * 1024;

/// Most TRIMs under way.
const TRIMS: usize = 8;

/// Where a disk's stream stands.
#[derive(Debug, Default)]
struct State {
    /// A stream is open.
    active: bool,
    /// A stream reached the end of the disk.
    complete: bool,
    /// The view before this offset is given back; 0: none of it.
    released: u64,
}

/// A disk's view.
#[derive(Debug)]
pub struct View {
    qmp: Qmp,
    job: String,
    address: Address,
    disk: String,
    size: u64,
    /// The meta context of the changes since the base, in an incremental.
    changes: Option<String>,
    /// See [`View::read_max`].
    one_cluster: bool,
    scratch: Scratch,
    state: Mutex<State>,
    /// A connection of its own, so that giving back never waits for a reader.
    trimmer: tokio::sync::Mutex<Option<Client>>,
}

impl View {
    /// A view of `disk`, exported under the disk's id at `address`, kept by `job`;
    /// `one_cluster`: this QEMU must not be asked for more than that at a time.
    #[must_use]
    pub fn new(
        qmp: Qmp,
        job: String,
        address: Address,
        disk: &Disk,
        changes: Option<String>,
        one_cluster: bool,
        scratch: Scratch,
    ) -> Self {
        Self {
            qmp,
            job,
            address,
            disk: disk.id.clone(),
            size: disk.size,
            changes,
            one_cluster,
            scratch,
            state: Mutex::default(),
            trimmer: tokio::sync::Mutex::default(),
        }
    }

    /// The disk's bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Longest read of the view, and whether its allocation can be asked for.
    ///
    /// Measured on QEMU 7.2: a READ or BLOCK_STATUS that starts in a cluster which
    /// the guest has overwritten since, and runs on into one that it has not, is
    /// answered from the disk as it is *now*. Inside one cluster the answer is right.
    #[must_use]
    pub fn read_max(&self) -> (u64, bool) {
        if self.one_cluster {
            (GRANULARITY, false)
        } else {
            (READ_MAX, true)
        }
    }

    /// Bytes that the scratch file takes now.
    #[must_use]
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.allocated()
    }

    /// Whether a stream has reached the end of the disk.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state().complete
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the view for a stream that starts at `offset`.
    pub(crate) fn start(&self, offset: u64) -> Result<()> {
        let mut state = self.state();
        if state.active {
            return Err(
                Error::new(Kind::StreamActive, "starting a stream").on_disk(self.disk.clone())
            );
        }
        if offset != state.released {
            return Err(Error::new(Kind::OffsetReleased, "starting a stream")
                .because(format!("it can start at {} only", state.released))
                .on_disk(self.disk.clone())
                .at(state.released));
        }
        state.active = true;
        Ok(())
    }

    /// The stream is over; `complete`: it reached the end of the disk.
    pub(crate) fn stop(&self, complete: bool) {
        let mut state = self.state();
        state.active = false;
        state.complete |= complete;
    }

    /// A connection for the view's bytes, and what is allocated.
    pub(crate) async fn connect_data(&self) -> Result<Client> {
        self.connect(Some("base:allocation")).await
    }

    /// A connection for what changed since the base; `None` in a full.
    ///
    /// It is one of its own: QEMU answers a request for two contexts twice when
    /// a part of the range is given back.
    pub(crate) async fn connect_changes(&self) -> Result<Option<Client>> {
        match &self.changes {
            Some(context) => self.connect(Some(context)).await.map(Some),
            None => Ok(None),
        }
    }

    async fn connect(&self, context: Option<&str>) -> Result<Client> {
        Client::connect(&self.address, &self.disk, context, NBD_DEADLINE).await
    }

    /// Gives back what did not change since the base, and counts what did: the
    /// guest's writes there need no copy from now on. Bytes that changed, in
    /// whole granules; the disk's size in a full.
    pub(crate) async fn give_back_unchanged(&self, cancel: &CancellationToken) -> Result<u64> {
        let Some(changes) = self.connect_changes().await? else {
            return Ok(self.size);
        };
        let mut changed = 0;
        let mut cursor = Cursor::new(0..self.size);
        while let Some((range, flags)) = cursor.next(&changes).await? {
            if cancel.is_cancelled() {
                return Err(Error::new(
                    Kind::Cancelled,
                    "giving back what did not change",
                ));
            }
            if status::is_dirty(flags) {
                changed += length(&range);
            } else {
                self.trim(&inner_aligned(&range, GRANULARITY, self.size))
                    .await?;
            }
        }
        changes.close().await;
        Ok(changed)
    }

    /// The host has, or wants no more, what lies before `offset`: QEMU may forget
    /// it. A failure costs scratch room, not the backup, and is only logged.
    pub async fn release(&self, offset: u64) {
        let from = {
            let mut state = self.state();
            let from = state.released;
            if offset <= from {
                return;
            }
            state.released = offset;
            from
        };
        let start = from / GRANULARITY * GRANULARITY;
        let range = inner_aligned(&(start..offset), GRANULARITY, self.size);
        if let Err(error) = self.trim(&range).await {
            warn!(
                disk = self.disk,
                offset,
                error = error.chain(),
                "could not give back a part of the view"
            );
        }
    }

    /// As [`View::release`], once `least` bytes or more have come together; whether
    /// they have.
    pub(crate) async fn release_in_steps(&self, offset: u64, least: u64) -> bool {
        let released = self.state().released;
        let due = offset.saturating_sub(released) >= least;
        if due {
            self.release(offset).await;
        }
        due
    }

    async fn trim(&self, range: &Range) -> Result<()> {
        if length(range) == 0 {
            return Ok(());
        }
        let mut trimmer = self.trimmer.lock().await;
        let client = match &mut *trimmer {
            Some(client) => client,
            none => none.insert(self.connect(None).await?),
        };
        let mut tickets = VecDeque::new();
        let mut at = range.start;
        while at < range.end {
            let cut = next_cut(at, STEP, range.end);
            tickets.push_back(client.submit_trim(at, cut - at).await?);
            if tickets.len() >= TRIMS
                && let Some(oldest) = tickets.pop_front()
            {
                oldest.await?;
            }
            at = cut;
        }
        for ticket in tickets {
            ticket.await?;
        }
        Ok(())
    }

    /// Closes the connection that gives back.
    pub(crate) async fn close(&self) {
        if let Some(client) = self.trimmer.lock().await.take() {
            client.close().await;
        }
    }

    /// Turns an error of reading into `PointInTimeLost` where that is the cause.
    pub(crate) async fn explain(&self, error: Error) -> Error {
        if !matches!(
            error.kind(),
            Kind::NbdRefused | Kind::NbdClosed | Kind::NbdUnreachable
        ) {
            return error.on_disk(self.disk.clone());
        }
        let lost = |why: Error| {
            let offset = why.offset();
            let lost = Error::new(Kind::PointInTimeLost, "reading the point in time")
                .because(why)
                .on_disk(self.disk.clone());
            match offset {
                Some(offset) => lost.at(offset),
                None => lost,
            }
        };
        match query::jobs(&self.qmp).await {
            Ok(jobs)
                if jobs
                    .iter()
                    .any(|job| job.id == self.job && job.status == "running") =>
            {
                error.on_disk(self.disk.clone())
            }
            Ok(_) => lost(error),
            Err(closed) => lost(closed),
        }
    }
}

/// Walks a range by block status, in steps, with a fixed amount of memory.
#[derive(Debug)]
pub(crate) struct Cursor {
    rest: Range,
    known: VecDeque<(u64, u64)>,
}

impl Cursor {
    pub(crate) fn new(range: Range) -> Self {
        Self {
            rest: range,
            known: VecDeque::new(),
        }
    }

    /// All that is left, at once, without asking.
    pub(crate) fn rest(&mut self) -> Option<Range> {
        let rest = self.rest.clone();
        self.rest.start = rest.end;
        (!rest.is_empty()).then_some(rest)
    }

    /// The next piece and its flags; pieces are contiguous and never empty.
    pub(crate) async fn next(&mut self, client: &Client) -> Result<Option<(Range, u64)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        if self.known.is_empty() {
            let ask = length(&self.rest).min(STEP);
            self.known = client
                .submit_block_status(self.rest.start, ask)
                .await?
                .await?
                .into();
        }
        let Some((bytes, flags)) = self.known.pop_front() else {
            return Err(
                Error::new(Kind::NbdProtocol, "reading block status").because("an empty answer")
            );
        };
        let start = self.rest.start;
        self.rest.start += bytes;
        Ok(Some((start..self.rest.start, flags)))
    }
}
