//! A push's job, from its start to its end: how far it is, and what is wrong with it.
//!
//! ```text
//! running <--> paused, while a receiver holds much, or QEMU's nodes are to change
//!    |   \--> stopped for an error, or nothing moves --> the push fails
//! pending --> finalized by us, in turn --> gone
//! ```

use std::time::Duration;

use qapi::qmp::{job_pause, job_resume};
use tokio::time::Instant;

use super::{Progress, Run, cancelled};
use crate::error::{Error, Kind, Result};
use crate::flow::Flow;
use crate::qemu::Mover;
use crate::qemu::job;
use crate::qemu::query::{self, BlockJob};
use crate::target::Opened;
use crate::view::NBD_DEADLINE;

/// How often the job is looked at when it says nothing.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long a look may take at least: where it is late because we were, QEMU is asked still.
const LOOK_DEADLINE: Duration = Duration::from_secs(1);

/// How long it stays paused after a change: more of them come one after the other.
const LINGERS: Duration = Duration::from_millis(100);

/// How long the job gets for its end.
const RELEASE_DEADLINE: Duration = Duration::from_secs(30);

/// Most bytes of one of the job's writes.
const CHUNK: u64 = 1024 * 1024;

impl Run<'_> {
    /// Waits for the job's end: the bytes that it worked through.
    pub(super) async fn watch(&mut self, opened: &Opened) -> Result<u64> {
        let patience = self.patience();
        let mut moved = (0, Instant::now());
        let mut mover = self.qmp.mover();
        loop {
            let end = (moved.1 + patience).max(Instant::now() + LOOK_DEADLINE);
            let look = tokio::time::timeout_at(end, self.look());
            let job = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(cancelled()),
                job = look => job,
            };
            // QEMU does not answer while it waits for a target that hangs.
            let Ok(job) = job else {
                if self.is_lulled && !mover.moves() {
                    // It is another one: nothing of this push is under way.
                    continue;
                }
                opened.cut();
                return Err(self.stalled(patience));
            };
            let job = job?;
            self.progress.send_replace(Progress {
                done: job.offset,
                total: job.len,
            });
            if job.error.is_some() || (job.io_status != "ok" && !self.is_refused(&job)) {
                drop(mover);
                return Err(self.failed(&job).await);
            }
            if job.status == "pending" {
                drop(mover);
                let id = self.view.names().push();
                job::finalize(self.qmp, &id, RELEASE_DEADLINE).await?;
                return Ok(job.offset);
            }
            if job.offset != moved.0 || self.waits_for_us(&job) {
                moved = (job.offset, Instant::now());
            }
            if moved.1.elapsed() >= patience {
                opened.cut();
                return Err(self.stalled(patience));
            }
            let steered = tokio::time::timeout(LOOK_DEADLINE, self.steer(&job, &mut mover));
            // Where QEMU is silent, the next look tells.
            steered.await.unwrap_or(Ok(()))?;
            moved.1 += self.wait(&mut mover).await;
        }
    }

    /// How long the job may stand still: a slow one by order is not a hung one.
    fn patience(&self) -> Duration {
        let under_way = CHUNK * (self.options.workers + 1);
        let slow = self
            .options
            .speed
            .map_or(0, |speed| under_way.saturating_mul(1000) / speed.max(1));
        self.timeout() + Duration::from_millis(slow)
    }

    /// How long the target is waited for. A receiver of ours takes what comes: what takes
    /// long there is the disk's own storage, which gets as long as in a pull.
    pub(super) fn timeout(&self) -> Duration {
        match self.flow {
            Some(_) => self.options.timeout.max(NBD_DEADLINE),
            None => self.options.timeout,
        }
    }

    /// Whose fault it is that the job stands still.
    ///
    /// A host's target is blamed also where the disk's own storage hangs, or where QEMU as
    /// a whole waits for something else, as another push's target that has more time: QEMU
    /// does not tell what a job waits for, and what is under way in sockets is not seen
    /// from here (a hung server's socket takes in some writes; behind TLS nobody can count).
    pub(super) fn stalled(&self, patience: Duration) -> Error {
        if self.flow.is_none() {
            return Error::new(Kind::TargetTimeout, "pushing a disk").because(format!(
                "the target took nothing for {} s",
                patience.as_secs_f32()
            ));
        }
        Error::new(Kind::QemuTimeout, "pushing a disk").because(format!(
            "QEMU has read nothing for {} s: the disk's storage hangs, or QEMU does",
            patience.as_secs_f32()
        ))
    }

    async fn look(&self) -> Result<BlockJob> {
        let id = self.view.names().push();
        let jobs = query::block_jobs(self.qmp).await?;
        let job = jobs.into_iter().find(|job| job.device == id);
        job.ok_or_else(|| {
            Error::new(Kind::TargetFailed, "pushing a disk")
                .because("its job is gone before its outcome was seen")
        })
    }

    /// Whether the job has stopped because a receiver of ours had no room.
    fn is_refused(&mut self, job: &BlockJob) -> bool {
        self.flow.is_some() && job.io_status == "nospace" && !self.events.read_failed()
    }

    /// Why the job has stopped.
    async fn failed(&mut self, job: &BlockJob) -> Error {
        let why = job.error.clone().unwrap_or_else(|| job.io_status.clone());
        if self.events.read_failed() {
            let error = Error::new(Kind::QemuRefused, "reading the point in time").because(why);
            return self.view.blame_job(error).await;
        }
        let kind = if job.io_status == "nospace" {
            Kind::TargetUnwritable
        } else {
            Kind::TargetFailed
        };
        Error::new(kind, "writing to the target").because(why)
    }

    /// Whether the job stands still for us, and nothing of it is under way.
    fn waits_for_us(&self, job: &BlockJob) -> bool {
        (self.flow.is_some() || self.is_lulled) && is_still(job)
    }

    /// Pauses the job while a receiver of ours holds much, or QEMU's nodes are to change. It
    /// goes on afterwards, also where somebody else has paused it for a receiver.
    async fn steer(&mut self, job: &BlockJob, mover: &mut Mover) -> Result<()> {
        let id = self.view.names().push();
        // Somebody may have told it to go on.
        self.is_lulled &= job.paused;
        let is_wanted = mover.is_wanted();
        if is_wanted {
            self.lull = Some(Instant::now());
        }
        let is_over = self.lull.is_none_or(|last| last.elapsed() >= LINGERS);
        let told = if !job.paused && (is_wanted || self.flow.is_some_and(Flow::is_high)) {
            self.is_lulled = is_wanted;
            self.qmp.execute(&job_pause { id }).await
        } else if job.paused && is_over && self.may_go_on(job) {
            mover.set_moves(true);
            self.qmp.execute(&job_resume { id }).await
        } else {
            mover.set_moves(!is_still(job));
            return Ok(());
        };
        match told {
            // It has stopped, gone on or concluded meanwhile: the next look tells.
            Err(error) if error.kind() == Kind::QemuRefused => {
                self.is_lulled = false;
                Ok(())
            }
            told => told.map(drop),
        }
    }

    /// Whether a job that is paused, and need not be for a lull, may go on.
    fn may_go_on(&self, job: &BlockJob) -> bool {
        match self.flow {
            // With nothing under way, what is waited for comes only if the job goes on.
            Some(flow) => flow.is_low() || (flow.is_starving() && is_still(job)),
            None => self.is_lulled,
        }
    }

    /// Until there may be something to see: how much later than that it is, because we had no
    /// processor.
    async fn wait(&mut self, mover: &mut Mover) -> Duration {
        let end = Instant::now() + LOOK_EVERY;
        let flow = self.flow;
        let changed = async {
            match flow {
                Some(flow) => flow.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = changed => {}
            () = mover.changed() => {}
            () = self.events.next(end) => {}
        }
        end.elapsed()
    }
}

/// Whether a job is paused, and nothing of it is under way.
fn is_still(job: &BlockJob) -> bool {
    job.status == "paused"
}
