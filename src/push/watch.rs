//! A push's job, from its start to its end: how far it is, and what is wrong with it.
//!
//! ```text
//! running <--> paused, while a receiver holds much
//!    |   \--> stopped for an error, or nothing moves --> the push fails
//! pending --> finalized by us, in turn --> gone
//! ```

use std::time::Duration;

use qapi::qmp::{job_pause, job_resume};
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::{Progress, Run, cancelled, hung};
use crate::error::{Error, Kind, Result};
use crate::qemu::query::{self, BlockJob};
use crate::qemu::{Event, job};
use crate::target::Opened;

/// How often the job is looked at when it says nothing.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long the job gets for its end.
const RELEASE_DEADLINE: Duration = Duration::from_secs(30);

/// Most bytes of one of the job's writes.
const CHUNK: u64 = 1024 * 1024;

impl Run<'_> {
    /// Waits for the job's end: the bytes that it worked through.
    pub(super) async fn watch(&mut self, opened: &Opened) -> Result<u64> {
        let timeout = self.timeout();
        let mut moved = (0, Instant::now());
        let mut is_paused = false;
        loop {
            let look = tokio::time::timeout_at(moved.1 + timeout, self.look());
            let job = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(cancelled()),
                job = look => job,
            };
            // QEMU does not answer while it waits for a target that hangs.
            let Ok(job) = job else {
                opened.cut();
                return Err(hung(timeout));
            };
            let job = job?;
            self.progress.send_replace(Progress {
                done: job.offset,
                total: job.len,
            });
            if job.io_status != "ok" || job.error.is_some() {
                return Err(self.failed(&job).await);
            }
            if job.status == "pending" {
                let id = self.view.names().push();
                job::finalize(self.qmp, &id, RELEASE_DEADLINE).await?;
                return Ok(job.offset);
            }
            if job.offset != moved.0 || is_paused {
                moved = (job.offset, Instant::now());
            }
            if moved.1.elapsed() >= timeout {
                opened.cut();
                return Err(hung(timeout));
            }
            is_paused = self.steer(is_paused).await?;
            self.wait().await;
        }
    }

    /// A slow job by order is not a hung one.
    fn timeout(&self) -> Duration {
        let under_way = CHUNK * (self.options.workers + 1);
        let slow = self
            .options
            .speed
            .map_or(0, |speed| under_way.saturating_mul(1000) / speed.max(1));
        self.options.timeout + Duration::from_millis(slow)
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

    /// Why the job has stopped.
    async fn failed(&mut self, job: &BlockJob) -> Error {
        while let Ok(event) = self.events.try_recv() {
            self.heed(&event);
        }
        let why = job.error.clone().unwrap_or_else(|| job.io_status.clone());
        if self.read_failed {
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

    /// Whether an event is of the job.
    fn heed(&mut self, event: &Event) -> bool {
        let id = self.view.names().push();
        match event.name.as_str() {
            "BLOCK_JOB_ERROR" if event.data["device"] == id => {
                self.read_failed |= event.data["operation"] == "read";
                true
            }
            "JOB_STATUS_CHANGE" => event.data["id"] == id,
            _ => false,
        }
    }

    /// Pauses the job while a receiver of ours holds much; whether it is paused.
    async fn steer(&self, is_paused: bool) -> Result<bool> {
        let id = self.view.names().push();
        let told = if !is_paused && self.flow.is_high() {
            self.qmp.execute(&job_pause { id }).await
        } else if is_paused && self.flow.is_low() {
            self.qmp.execute(&job_resume { id }).await
        } else {
            return Ok(is_paused);
        };
        match told {
            Ok(_) => {
                self.flow.tell(!is_paused);
                Ok(!is_paused)
            }
            // It has concluded meanwhile: the next look tells.
            Err(error) if error.kind() == Kind::QemuRefused => Ok(is_paused),
            Err(error) => Err(error),
        }
    }

    /// Until there may be something to see.
    async fn wait(&mut self) {
        let look = Instant::now() + LOOK_EVERY;
        loop {
            let event = tokio::select! {
                () = self.cancel.cancelled() => return,
                () = self.flow.changed() => return,
                event = tokio::time::timeout_at(look, self.events.recv()) => event,
            };
            match event {
                Ok(Ok(event)) if self.heed(&event) => return,
                Ok(Ok(_)) => {}
                // Some were missed, or no more will come: a look tells.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) | Err(_) => return,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    return tokio::time::sleep_until(look).await;
                }
            }
        }
    }
}
