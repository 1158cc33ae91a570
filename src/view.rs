//! One disk's view of the point in time: where it is read, what of it was given
//! back, and what its scratch takes.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::checkpoint::GRANULARITY;
use crate::error::{Error, Kind, Result};
use crate::export::{self, Exported, Gate};
use crate::extent::{Range, inner_aligned, length, next_cut};
use crate::nbd::{Address, Client, Cursor, status};
use crate::plan::DiskPlan;
use crate::qemu::query::{self, Version};
use crate::qemu::step::Names;
use crate::qemu::{Qmp, note};
use crate::relay::Stream;
use crate::saved::{self, Progress};
use crate::scratch::Scratch;
use crate::session::now_ms;
use crate::teardown::Teardown;

/// How long QEMU's NBD server gets to greet, and to answer one request. A
/// storage that hangs longer than this ends the stream, not the backup.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// Longest range of one TRIM: fits compact headers.
const STEP: u64 = 1 << 30;

/// Longest read: throughput falls on either side of it.
pub const READ_MAX: u64 = 1024 * 1024;

/// The first QEMU that answers reads of a view rightly whatever they cross; the last that
/// does not is before it.
const FIRST_RIGHT: (u32, u32) = (10, 0);

/// Most TRIMs under way.
const TRIMS: usize = 8;

/// Where a disk's stream stands.
#[derive(Debug, Default)]
struct State {
    /// A stream is open.
    active: bool,
    /// A stream reached the end of the disk, or a push is done.
    complete: bool,
    /// The host reads it by itself.
    exported: bool,
    /// What did not change since the base was given back.
    partial: bool,
    /// A push gives back what it has written: no second one can follow.
    spent: bool,
    /// The view before this offset is given back; 0: none of it.
    released: u64,
    /// A stream gives back what it reads: after a crash nobody knows how far it was.
    flowing: bool,
    /// Where the stream can go on, in the words of whoever streams.
    mark: Option<String>,
    /// Scratch was full, and the point in time of this disk was given up.
    lost: bool,
    /// What a push has made, and could not take away.
    left: Teardown,
}

/// A disk's view.
#[derive(Debug)]
pub struct View {
    qmp: Qmp,
    names: Names,
    address: Address,
    disk: String,
    size: u64,
    incremental: bool,
    granularity: u64,
    version: Version,
    can_discard_source: bool,
    scratch: Scratch,
    state: Mutex<State>,
    /// Held while QEMU itself works on the view: the session ends after that.
    at_work: tokio::sync::Mutex<()>,
    /// A connection of its own, so that giving back never waits for a reader.
    trimmer: tokio::sync::Mutex<Option<Client>>,
    /// Where the host's own clients come in.
    gate: tokio::sync::Mutex<Option<Gate>>,
}

impl View {
    /// A view of `plan`'s disk, made of the objects `names` in a QEMU of this version, whose
    /// backup jobs can discard their source or not, and exported at `address`.
    #[must_use]
    pub fn new(
        qmp: Qmp,
        names: Names,
        address: Address,
        plan: &DiskPlan,
        (version, can_discard_source): (Version, bool),
        scratch: Scratch,
    ) -> Self {
        Self {
            qmp,
            names,
            address,
            disk: plan.disk.id.clone(),
            size: plan.disk.size,
            incremental: plan.base.is_some(),
            granularity: plan.granularity(),
            version,
            can_discard_source,
            scratch,
            state: Mutex::default(),
            at_work: tokio::sync::Mutex::default(),
            trimmer: tokio::sync::Mutex::default(),
            gate: tokio::sync::Mutex::default(),
        }
    }

    /// The disk's bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it is read for what changed since a base.
    #[must_use]
    pub fn is_incremental(&self) -> bool {
        self.incremental
    }

    /// Its QEMU's monitor.
    pub(crate) fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The names of its objects in QEMU.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// The disk's id.
    pub(crate) fn disk(&self) -> &str {
        &self.disk
    }

    /// Bytes that one bit of what changed stands for.
    pub(crate) fn granularity(&self) -> u64 {
        self.granularity
    }

    /// QEMU's NBD server.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Whether a push can give back what it has written.
    pub(crate) fn can_discard_source(&self) -> bool {
        self.can_discard_source
    }

    /// Waits until QEMU does not work on it, and lets nobody else begin.
    pub(crate) async fn at_work(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.at_work.lock().await
    }

    /// Whether a client that reads as it likes is answered rightly. See [`View::read_max`].
    #[must_use]
    pub fn reads_rightly(&self) -> bool {
        (self.version.major, self.version.minor) >= FIRST_RIGHT
    }

    /// Longest read of the view, and whether its allocation can be asked for.
    ///
    /// Measured on QEMU 7.2: a READ or BLOCK_STATUS that starts in a cluster which
    /// the guest has overwritten since, and runs on into one that it has not, is
    /// answered from the disk as it is *now*. Inside one cluster the answer is right.
    #[must_use]
    pub fn read_max(&self) -> (u64, bool) {
        if self.reads_rightly() {
            (READ_MAX, true)
        } else {
            (GRANULARITY, false)
        }
    }

    /// Bytes that the scratch file takes now; 0 when that cannot be told.
    pub async fn scratch_bytes(&self) -> u64 {
        self.scratch.allocated(&self.qmp).await
    }

    /// Makes it what it was in a process that has ended.
    #[must_use]
    pub(crate) fn resumed(self, progress: &Progress) -> Self {
        {
            let mut state = self.state();
            state.complete = progress.complete;
            state.exported = progress.exported;
            state.partial = progress.partial;
            state.spent = progress.spent;
            state.released = progress.released;
            state.mark.clone_from(&progress.mark);
        }
        self
    }

    /// Where a stream can start, and what the one before it left to go on by; `None`:
    /// nowhere.
    #[must_use]
    pub fn resume(&self) -> Option<(u64, Option<String>)> {
        let state = self.state();
        (!state.spent).then(|| (state.released, state.mark.clone()))
    }

    fn progress(&self) -> Progress {
        let state = self.state();
        Progress {
            time_ms: now_ms(),
            released: state.released,
            mark: state.mark.clone(),
            complete: state.complete,
            exported: state.exported,
            spent: state.spent || state.flowing,
            partial: state.partial,
        }
    }

    /// Has QEMU keep how far its consumer is, for a process that takes over. A failure
    /// costs that, not the backup, and is only logged.
    pub async fn remember(&self) {
        let told = async {
            let text = saved::to_text(&self.progress())?;
            note::change(&self.qmp, &self.names.progress(), &text).await
        };
        if let Err(error) = told.await {
            warn!(
                disk = self.disk,
                error = error.chain(),
                "progress is not kept"
            );
        }
    }

    /// The host has stored what lies before `offset`, and a stream can go on there by
    /// `mark`: kept in QEMU first, then given back as by [`View::release`].
    pub async fn acknowledge(&self, offset: u64, mark: String) -> u64 {
        {
            let mut state = self.state();
            if offset <= state.released {
                return state.released;
            }
            state.mark = Some(mark);
        }
        let from = self.pass(offset);
        self.remember().await;
        self.give_back(from, offset).await;
        offset
    }

    /// Whether a stream has reached the end of the disk, it was pushed, or the host reads
    /// it by itself.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let state = self.state();
        state.complete || state.exported
    }

    /// Its point in time is given up: nothing of it can be read any more.
    pub(crate) fn lose(&self) {
        self.state().lost = true;
    }

    /// Whether its point in time was given up.
    pub(crate) fn is_lost(&self) -> bool {
        self.state().lost
    }

    /// Frees the room of scratch that nobody needs any more.
    pub(crate) fn empty_scratch(&self) {
        self.scratch.empty();
    }

    fn scratch_full(&self) -> Option<Error> {
        self.state().lost.then(|| {
            Error::new(Kind::ScratchFull, "reading the point in time")
                .because("scratch was full, and it was given up, so that the guest could go on")
                .on_disk(self.disk.clone())
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the view for a stream that starts at `offset`.
    pub(crate) fn start(&self, offset: u64) -> Result<()> {
        if let Some(error) = self.scratch_full() {
            return Err(error);
        }
        let mut state = self.state();
        if state.active {
            return Err(
                Error::new(Kind::StreamActive, "starting a stream").on_disk(self.disk.clone())
            );
        }
        if state.spent {
            return Err(Error::new(Kind::OffsetReleased, "starting a stream")
                .because("a push has given back what it wrote")
                .on_disk(self.disk.clone()));
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

    /// A push begins that gives back what it has written.
    pub(crate) fn spend(&self) {
        self.state().spent = true;
    }

    /// A stream begins that gives back what it reads.
    pub(crate) async fn flow(&self) {
        self.state().flowing = true;
        self.remember().await;
    }

    /// A push could not take this away.
    pub(crate) fn leave(&self, left: Teardown) {
        self.state().left.append(left);
    }

    pub(crate) fn take_left(&self) -> Teardown {
        std::mem::take(&mut self.state().left)
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
        if !self.incremental {
            return Ok(None);
        }
        let context = format!("qemu:dirty-bitmap:{}", self.names.changes());
        self.connect(Some(&context)).await.map(Some)
    }

    /// The meta context of what changed since the base, of the host's own clients.
    #[must_use]
    pub fn public_context(&self) -> Option<String> {
        let bitmap = self.names.public_bitmap();
        self.incremental
            .then(|| format!("qemu:dirty-bitmap:{bitmap}"))
    }

    async fn connect(&self, context: Option<&str>) -> Result<Client> {
        Client::connect(&self.address, &self.names.view(), context, NBD_DEADLINE).await
    }

    /// Counts what changed since the base, in whole granules: the disk's size in a full.
    /// Gives back what did not, unless it shall be kept: the guest's writes there need no
    /// copy from now on.
    pub(crate) async fn survey(
        &self,
        keep_unchanged: bool,
        cancel: &CancellationToken,
    ) -> Result<u64> {
        let Some(changes) = self.connect_changes().await? else {
            return Ok(self.size);
        };
        let mut changed = 0;
        let mut cursor = Cursor::new(0..self.size);
        while let Some((range, flags)) = cursor.next(&changes).await? {
            if cancel.is_cancelled() {
                return Err(Error::new(
                    Kind::Cancelled,
                    "reading what changed since the base",
                ));
            }
            if status::is_dirty(flags) {
                changed += length(&range);
            } else if !keep_unchanged {
                self.trim(&inner_aligned(&range, GRANULARITY, self.size))
                    .await?;
            }
        }
        changes.close().await;
        self.state().partial = !keep_unchanged;
        Ok(changed)
    }

    /// The host has, or wants no more, what lies before `offset`: QEMU may forget
    /// it. A failure costs scratch room, not the backup, and is only logged. What may be
    /// forgotten by now: `offset`, or more.
    pub async fn release(&self, offset: u64) -> u64 {
        let from = self.pass(offset);
        self.give_back(from, offset).await;
        offset.max(from)
    }

    /// Counts what lies before `offset` as given back; what was so far.
    fn pass(&self, offset: u64) -> u64 {
        let mut state = self.state();
        let from = state.released;
        state.released = offset.max(from);
        from
    }

    async fn give_back(&self, from: u64, offset: u64) {
        if offset <= from {
            return;
        }
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

    /// Lets the host's own clients read it, over sockets below `runtime_dir`, until the
    /// session ends. Whether they have read all is the host's word.
    ///
    /// # Errors
    /// [`Kind::OffsetReleased`]; [`Kind::QemuUnsupported`] where this QEMU would answer them
    /// wrongly; QEMU's; NBD's.
    pub async fn export(&self, runtime_dir: &Path) -> Result<Exported> {
        if let Some(error) = self.scratch_full() {
            return Err(error);
        }
        {
            let state = self.state();
            if !state.exported && (state.spent || state.released > 0) {
                return Err(
                    Error::new(Kind::OffsetReleased, "exporting a point in time")
                        .because("a part of it was given back")
                        .on_disk(self.disk.clone())
                        .at(state.released),
                );
            }
        }
        let _session_waits = self.at_work().await;
        let mut gate = self.gate.lock().await;
        let open = match gate.take() {
            Some(open) => open,
            None => export::open(self, runtime_dir).await?,
        };
        let exported = gate.insert(open).exported().clone();
        self.state().exported = true;
        Ok(exported)
    }

    /// Carries bytes between the server of an exported view and `client`, until either ends.
    pub async fn admit(&self, client: impl Stream) {
        export::admit(client, self.address.clone()).await;
    }

    /// Whether all of it can be read, as far as nothing was given back by streams.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.state().partial
    }

    /// Whether the host's own clients can read it.
    #[must_use]
    pub fn is_exported(&self) -> bool {
        self.state().exported
    }

    /// Closes our connections, and the host's clients'.
    pub(crate) async fn close(&self) {
        if let Some(gate) = self.gate.lock().await.take() {
            gate.close().await;
        }
        if let Some(client) = self.trimmer.lock().await.take() {
            client.close().await;
        }
    }

    /// Turns an error of reading into `PointInTimeLost` where that is the cause.
    pub(crate) async fn explain(&self, error: Error) -> Error {
        if let Some(full) = self.scratch_full() {
            return full.leaving(error.leftovers().to_vec());
        }
        if !matches!(
            error.kind(),
            Kind::NbdRefused | Kind::NbdClosed | Kind::NbdUnreachable
        ) {
            return error.on_disk(self.disk.clone());
        }
        self.blame_job(error).await
    }

    /// Turns any error into `PointInTimeLost` where the job that keeps it does not run.
    pub(crate) async fn blame_job(&self, error: Error) -> Error {
        if let Some(full) = self.scratch_full() {
            return full.leaving(error.leftovers().to_vec());
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
                    .any(|job| job.id == self.names.job() && job.status == "running") =>
            {
                error.on_disk(self.disk.clone())
            }
            Ok(_) => lost(error),
            Err(closed) => lost(closed),
        }
    }
}
