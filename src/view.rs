//! One disk's view of the point in time: where it is read, what of it was given
//! back, and what its scratch takes.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::abilities::Abilities;
use crate::broken::Probe;
use crate::checkpoint::GRANULARITY;
use crate::consumption::{Consumption, Released, Work};
use crate::entry;
use crate::error::{Error, Kind, Result};
use crate::export::{self, Exported, Gate};
use crate::extent::{Range, inner_aligned, length, next_cut};
use crate::nbd::{Address, Client, Cursor, status};
use crate::plan::DiskPlan;
use crate::qemu::query;
use crate::qemu::step::Names;
use crate::qemu::{Qmp, note};
use crate::relay::Socket;
use crate::saved::{self, Progress};
use crate::scratch::Scratch;
use crate::session::now_ms;
use crate::teardown::Teardown;

/// How long QEMU's NBD server gets to greet, and to answer one request. A
/// storage that hangs longer than this ends the stream, not the backup.
pub(crate) const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// Longest range of one TRIM: fits compact headers.
const STEP: u64 = 1 << 30;

/// Longest read: throughput falls on either side of it.
pub const READ_MAX: u64 = 1024 * 1024;

/// The first QEMU that answers reads of a view rightly whatever they cross; the last that
/// does not is before it.
const FIRST_RIGHT: (u32, u32) = (10, 0);

/// Most TRIMs under way.
const TRIMS: usize = 8;

/// What changes of a view.
#[derive(Debug)]
struct State {
    /// How far it is consumed.
    consumption: Consumption,
    /// A part could not be given back, which was told.
    untrimmed: bool,
    /// Scratch was full, and the point in time of this disk was given up.
    lost: bool,
    /// What a push has made, and could not take away.
    left: Teardown,
    /// Its session ends.
    over: bool,
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
    abilities: Abilities,
    /// Where it can break.
    probe: Option<Probe>,
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
    /// A view of `plan`'s disk, made of the objects `names` in a QEMU with these abilities, and
    /// exported at `address`.
    #[must_use]
    pub fn new(
        qmp: Qmp,
        names: Names,
        address: Address,
        plan: &DiskPlan,
        abilities: Abilities,
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
            probe: abilities.breaks.then(Probe::default),
            abilities,
            scratch,
            state: Mutex::new(State {
                consumption: Consumption::new(plan.disk.size),
                untrimmed: false,
                lost: false,
                left: Teardown::default(),
                over: false,
            }),
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
        self.abilities.discards_source
    }

    /// Waits until QEMU does not work on it, and lets nobody else begin.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] where its session ends: what is made now would be left behind.
    pub(crate) async fn at_work(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let guard = self.at_work.lock().await;
        self.check_open().map(|()| guard)
    }

    fn check_open(&self) -> Result<()> {
        if self.state().over {
            let error = Error::new(Kind::Cancelled, "beginning to work on a view");
            return Err(self.here(error.because("its backup has ended")));
        }
        Ok(())
    }

    /// Whether a client that reads as it likes is answered rightly. See [`View::read_max`].
    #[must_use]
    pub fn reads_rightly(&self) -> bool {
        let version = self.abilities.version;
        (version.major, version.minor) >= FIRST_RIGHT
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
        self.state().consumption.resume(progress);
        self
    }

    /// Where a stream can start, and what the one before it left to go on by; `None`:
    /// nowhere.
    #[must_use]
    pub fn resume(&self) -> Option<(u64, Option<String>)> {
        self.state().consumption.start()
    }

    /// Has QEMU keep how far its consumer is, for a process that takes over. A failure
    /// costs that, not the backup, and is only logged.
    pub async fn remember(&self) {
        let told = async {
            let text = saved::to_text(&self.state().consumption.progress(now_ms()))?;
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

    /// Whether a stream has reached the end of the disk, it was pushed, or the host reads
    /// it by itself.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let state = self.state();
        state.consumption.complete || state.consumption.exported
    }

    /// Its point in time is given up: nothing of it can be read any more.
    pub(crate) fn lose(&self) {
        self.state().lost = true;
    }

    /// Whether its point in time was given up.
    pub(crate) fn is_lost(&self) -> bool {
        self.state().lost
    }

    /// What lies before it was given back.
    pub(crate) fn released(&self) -> u64 {
        self.state().consumption.released
    }

    /// Whether QEMU can give it up by itself.
    pub(crate) fn can_break(&self) -> bool {
        self.probe.is_some()
    }

    /// Frees the room of scratch that nobody needs any more.
    pub(crate) async fn empty_scratch(&self) {
        self.scratch.empty().await;
    }

    fn scratch_full(&self) -> Option<Error> {
        self.state().lost.then(|| {
            Error::new(Kind::ScratchFull, "reading the point in time")
                .because("scratch was full, and it was given up, so that the guest could go on")
                .on_disk(self.disk.clone())
        })
    }

    fn here(&self, error: Error) -> Error {
        error.on_disk(self.disk.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the view for a pull that starts at `offset`.
    pub(crate) fn start_pull(&self, offset: u64) -> Result<()> {
        self.claim(offset, Work::Pull)
    }

    /// Claims all of the view, for a push or a map.
    pub(crate) fn start(&self) -> Result<()> {
        self.claim(0, Work::Whole)
    }

    fn claim(&self, offset: u64, work: Work) -> Result<()> {
        if let Some(error) = self.scratch_full() {
            return Err(error);
        }
        let claimed = self.state().consumption.claim(offset, work);
        claimed.map_err(|error| self.here(error))
    }

    /// A push begins that gives back what it has written.
    pub(crate) fn spend(&self) {
        self.state().consumption.spent = true;
    }

    /// A stream begins that gives back what it reads.
    pub(crate) async fn flow(&self) {
        self.state().consumption.flowing = true;
        self.remember().await;
    }

    /// Whether a push has begun that gave back what it wrote: nothing can follow.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.state().consumption.spent
    }

    /// Whether a push works on it, or has given back what it wrote.
    pub(crate) fn is_pushed(&self) -> bool {
        self.state().consumption.is_pushed()
    }

    /// A push could not take this away.
    pub(crate) fn leave(&self, left: Teardown) {
        self.state().left.append(left);
    }

    pub(crate) fn take_left(&self) -> Teardown {
        std::mem::take(&mut self.state().left)
    }

    /// The stream is over.
    pub(crate) fn stop(&self) {
        self.state().consumption.stop();
    }

    /// A stream has reached the end of the disk, or it was pushed.
    pub(crate) fn complete(&self) {
        self.state().consumption.complete = true;
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
        let export = self.names.view();
        entry::connect(&self.qmp, &self.address, &export, context, NBD_DEADLINE).await
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
        self.state().consumption.partial = !keep_unchanged;
        Ok(changed)
    }

    /// Whether the host can say what it has of the view; and whether it can be any part,
    /// because it reads it by itself.
    ///
    /// # Errors
    /// [`Kind::StreamActive`] where that would take it away under a stream.
    pub fn check_release(&self) -> Result<bool> {
        let checked = self.state().consumption.check_release();
        checked.map_err(|error| self.here(error))
    }

    /// The host has, or wants no more, what lies before `offset`: from here on nobody may
    /// read it, and [`View::give_back`] tells QEMU so. What is given back by now: all before
    /// `offset`, or more.
    ///
    /// # Errors
    /// As of [`View::check_release`].
    pub fn release(&self, offset: u64) -> Result<Released> {
        let released = self.state().consumption.release(offset, None);
        released.map_err(|error| self.here(error))
    }

    /// As [`View::release`]; a stream can go on at `offset` by `mark`.
    ///
    /// # Errors
    /// As there.
    pub fn acknowledge(&self, offset: u64, mark: String) -> Result<Released> {
        let released = self.state().consumption.release(offset, Some(mark));
        released.map_err(|error| self.here(error))
    }

    /// Lets QEMU forget what was released. A failure costs scratch room, not the backup, and
    /// is only logged.
    pub async fn give_back(&self, released: Released) {
        if let Err(error) = self.trim(&released.range).await
            && !std::mem::replace(&mut self.state().untrimmed, true)
        {
            warn!(
                disk = self.disk,
                offset = released.offset,
                error = error.chain(),
                "could not give back a part of the view; further ones are not told"
            );
        }
    }

    /// Gives back what a pull has handed over, once `least` bytes or more have come together;
    /// nothing of what others read too.
    pub(crate) async fn give_back_in_steps(&self, offset: u64, least: u64) {
        let released = self.state().consumption.release_in_steps(offset, least);
        if let Some(released) = released {
            self.give_back(released).await;
        }
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

    /// Lets the host's own clients read it, over sockets below `runtime_dir` and at the other
    /// end of `client`, until the session ends. Whether they have read all is the host's word.
    ///
    /// # Errors
    /// [`Kind::StreamActive`] while a push works on it; [`Kind::OffsetReleased`];
    /// [`Kind::QemuUnsupported`] where this QEMU would answer them wrongly;
    /// [`Kind::InvalidRequest`] where `client` has another use by now; QEMU's; NBD's.
    /// `client` is as it was then.
    pub async fn export(&self, runtime_dir: &Path, client: Option<Socket>) -> Result<Exported> {
        if let Some(error) = self.scratch_full() {
            return Err(error);
        }
        let mut gate = self.gate.lock().await;
        let open = match gate.take() {
            Some(open) => open,
            None => {
                let free = client.as_ref().map_or(Ok(()), Socket::check_closed);
                free.map_err(|error| self.here(export::not_taken_over(error)))?;
                self.open_gate(runtime_dir).await?
            }
        };
        let open = gate.insert(open);
        if let Some(client) = client {
            open.admit(client).await?;
        }
        Ok(open.exported().clone())
    }

    async fn open_gate(&self, runtime_dir: &Path) -> Result<Gate> {
        // Whoever is at work is a push: it may last for hours, and take the view away.
        let _session_waits = self.at_work.try_lock().map_err(|_busy| {
            Error::new(Kind::StreamActive, "exporting a point in time")
                .because("a push of it is under way")
                .on_disk(self.disk.clone())
        })?;
        self.check_open()?;
        self.check_whole()?;
        let gate = export::open(self, runtime_dir).await?;
        // A pull may have given back a part meanwhile; from here on none does.
        let lent = self.state().consumption.lend();
        match lent {
            Ok(()) => Ok(gate),
            Err(error) => {
                gate.close().await;
                Err(self.here(error))
            }
        }
    }

    fn check_whole(&self) -> Result<()> {
        let checked = self.state().consumption.check_whole();
        checked.map_err(|error| self.here(error))
    }

    /// Whether all of it can be read, as far as nothing was given back by streams.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.state().consumption.partial
    }

    /// Whether the host's own clients can read it.
    #[must_use]
    pub(crate) fn is_exported(&self) -> bool {
        self.state().consumption.exported
    }

    /// The session ends: nobody begins to work on it any more. Closes our connections, and
    /// the host's clients'.
    pub(crate) async fn close(&self) {
        self.state().over = true;
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

    /// Turns any error into `PointInTimeLost` where the job that keeps it does not run, and a
    /// refusal into `ScratchFull` where QEMU has given it up.
    pub(crate) async fn blame_job(&self, error: Error) -> Error {
        let runs = self.job_runs().await;
        let is_refused = matches!(error.kind(), Kind::NbdRefused | Kind::QemuRefused);
        if is_refused && matches!(runs, Ok(true)) && self.is_broken().await {
            self.lose();
        }
        if let Some(full) = self.scratch_full() {
            return full.leaving(error.leftovers().to_vec());
        }
        let why = match runs {
            Ok(true) => return error.on_disk(self.disk.clone()),
            Ok(false) => error,
            Err(closed) => closed,
        };
        let offset = why.offset();
        let lost = Error::new(Kind::PointInTimeLost, "reading the point in time")
            .because(why)
            .on_disk(self.disk.clone());
        match offset {
            Some(offset) => lost.at(offset),
            None => lost,
        }
    }

    /// Whether QEMU has given it up by itself, as far as can be told.
    pub(crate) async fn has_broken(&self) -> bool {
        matches!(self.job_runs().await, Ok(true)) && self.is_broken().await
    }

    async fn job_runs(&self) -> Result<bool> {
        let jobs = query::jobs(&self.qmp).await?;
        let is_ours = |job: &query::Job| job.id == self.names.job() && job.status == "running";
        Ok(jobs.iter().any(is_ours))
    }

    /// As [`View::has_broken`], while the job runs: without, all is refused too.
    async fn is_broken(&self) -> bool {
        let Some(probe) = &self.probe else {
            return false;
        };
        probe.is_broken(self).await.unwrap_or_else(|error| {
            warn!(
                disk = self.disk,
                error = error.chain(),
                "whether it is broken is not known"
            );
            false
        })
    }
}
