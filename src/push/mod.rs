//! Push: QEMU itself writes a view to a target of the host's.
//!
//! ```text
//! target opened --> bitmap of what to copy --> job: view to target --> flushed --> closed --> named
//!       \________________\______________________\__________________\__ error: all taken away
//! ```
//! The job reads the view, not the guest's disk, so that the guest does not wait for the
//! target; and a target that takes nothing for too long is cut off, so that QEMU does not
//! wait for it either.
//!
//! What is copied: in an incremental, what changed since the base. In a full, all; but to a
//! target that reads as zeros, what the view has data for: QEMU would write the zeros, and
//! a raw file would take room for them.

mod flush;
mod job_events;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use qapi::qmp::block_resize;
use tokio::sync::watch::Sender;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::claim::Claim;
use crate::error::{Error, Kind, Result};
use crate::extent::Content;
use crate::flow::Flow;
use crate::paint::{self, Canvas};
use crate::qemu::Qmp;
use crate::qemu::step::{self, CLUSTER};
use crate::target::{self, Opened, Target};
use crate::teardown::{Teardown, Undo};
use crate::view::View;
use crate::walk::Walk;
use job_events::JobEvents;

/// Most writes under way at a time.
pub const MAX_WORKERS: u64 = 64;

/// How a view is pushed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Compressed clusters.
    pub compress: bool,
    /// Most bytes a second; `None`: no limit.
    pub speed: Option<u64>,
    /// Writes under way at a time, 1 to [`MAX_WORKERS`].
    pub workers: u64,
    /// Whether the view forgets what was written; `None`: where QEMU can, and nobody else
    /// reads it.
    pub discard_source: Option<bool>,
    /// How long the target may take nothing.
    pub timeout: Duration,
}

/// How far a push is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Worked through.
    pub done: u64,
    /// To be worked through.
    pub total: u64,
}

/// Pushes all of `view`, and returns when it is on the target's stable storage: the bytes
/// that were worked through.
///
/// # Errors
/// [`Kind::StreamActive`], [`Kind::OffsetReleased`] where a part of the view was given
/// back; the `Target*` kinds; [`Kind::PointInTimeLost`]; [`Kind::Cancelled`];
/// [`Kind::InvalidRequest`]. Nothing is left then but what [`Error::leftovers`] tells.
pub async fn push(
    view: &Arc<View>,
    target: Target,
    options: &Options,
    runtime_dir: &Path,
    progress: &Sender<Progress>,
    cancel: &CancellationToken,
) -> Result<u64> {
    let claim = Claim::whole(Arc::clone(view))?;
    let pushed = push_with(view, target, options, runtime_dir, progress, cancel, None).await?;
    claim.complete();
    Ok(pushed)
}

/// [`push`] of a view that is claimed; with `flow`, to a receiver that holds so much.
pub(crate) async fn push_with(
    view: &View,
    target: Target,
    options: &Options,
    runtime_dir: &Path,
    progress: &Sender<Progress>,
    cancel: &CancellationToken,
    flow: Option<&Flow>,
) -> Result<u64> {
    let _the_session_waits = view.at_work().await?;
    let mut run = Run {
        view,
        qmp: view.qmp(),
        options,
        // The host's own readers want all of it.
        discard_source: options
            .discard_source
            .unwrap_or(view.can_discard_source() && !view.is_exported()),
        progress,
        cancel,
        flow,
        events: JobEvents::new(view.qmp().events(), view.names().push()),
        lull: None,
        is_lulled: false,
        teardown: Teardown::default(),
    };
    let pushed = run.push(target, runtime_dir).await;
    match &pushed {
        Ok(bytes) => info!(disk = view.disk(), bytes, "pushed"),
        Err(error) => info!(disk = view.disk(), error = error.chain(), "not pushed"),
    }
    let Err(error) = pushed else { return pushed };
    Err(explain(view, error, cancel).await.on_disk(view.disk()))
}

/// Why a connection of ours to QEMU has ended.
async fn explain(view: &View, error: Error, cancel: &CancellationToken) -> Error {
    use Kind::{NbdClosed, NbdRefused, NbdUnreachable};
    if !matches!(error.kind(), NbdClosed | NbdRefused | NbdUnreachable) {
        return error;
    }
    // The end of the session closes connections under whoever works on it.
    let leftovers = error.leftovers().to_vec();
    if cancel.is_cancelled() {
        return cancelled().leaving(leftovers);
    }
    match view.explain(error).await {
        lost if lost.kind() == Kind::PointInTimeLost => lost.leaving(leftovers),
        explained => explained,
    }
}

struct Run<'a> {
    view: &'a View,
    qmp: &'a Qmp,
    options: &'a Options,
    discard_source: bool,
    progress: &'a Sender<Progress>,
    cancel: &'a CancellationToken,
    /// Of a receiver of ours.
    flow: Option<&'a Flow>,
    events: JobEvents,
    /// When others wanted it to stand still, last.
    lull: Option<Instant>,
    /// The job was paused for them.
    is_lulled: bool,
    teardown: Teardown,
}

impl Run<'_> {
    async fn push(&mut self, target: Target, runtime_dir: &Path) -> Result<u64> {
        if self.discard_source && !self.view.can_discard_source() {
            return Err(
                Error::new(Kind::QemuUnsupported, "choosing `discard_source`")
                    .because("QEMU 9.1 and later can"),
            );
        }
        self.teardown = self.view.take_left();
        let leftovers = self.undo().await;
        if !leftovers.is_empty() {
            let doing = "taking away what an earlier push has left";
            return Err(Error::new(Kind::TargetFailed, doing).leaving(leftovers));
        }
        let opened = target::open(
            target,
            self.view,
            runtime_dir,
            self.options.timeout,
            self.cancel,
            &mut self.teardown,
        )
        .await;
        let copied = match &opened {
            Ok(opened) => self.copy(opened).await,
            Err(_) => Ok(0),
        };
        match (opened, copied) {
            (Ok(opened), Ok(bytes)) => self.close(opened).await.map(|()| bytes),
            (Ok(opened), Err(error)) => {
                // Whatever it hangs on: it is thrown away.
                opened.cut();
                let leftovers = self.undo().await;
                opened.discard().await;
                Err(error.leaving(leftovers))
            }
            (Err(error), _) => Err(error.leaving(self.undo().await)),
        }
    }

    /// What cannot be taken away now is tried again, by the next push or at the session's end.
    async fn undo(&mut self) -> Vec<String> {
        let leftovers = self.teardown.unwind(self.qmp).await;
        self.view.leave(std::mem::take(&mut self.teardown));
        leftovers
    }

    async fn close(&mut self, opened: Opened) -> Result<()> {
        let new = opened.new_file();
        let note = Undo::Object {
            id: self.view.names().partial(),
        };
        if let Some(undo) = &new {
            self.teardown.forget(undo);
            self.teardown.forget(&note);
        }
        let mut leftovers = self.undo().await;
        let finished = if leftovers.is_empty() {
            opened.finish(self.cancel).await
        } else {
            opened.discard().await;
            Err(Error::new(Kind::TargetFailed, "closing the target"))
        };
        let Err(error) = finished else {
            if new.is_some() {
                // Not before: until it is named, the note alone tells of the file.
                self.teardown.push(note);
                self.undo().await;
            }
            return Ok(());
        };
        if let Some(undo) = new {
            self.teardown.push(note);
            self.teardown.push(undo);
            leftovers.extend(self.undo().await);
        }
        Err(error.leaving(leftovers))
    }

    async fn copy(&mut self, opened: &Opened) -> Result<u64> {
        let mut is_zero = opened.is_zero;
        if opened.can_empty && !self.view.is_incremental() && !is_zero {
            self.empty().await?;
            is_zero = true;
        }
        let by_bitmap = self.choose(is_zero).await?;
        let how = step::Push {
            by_bitmap,
            compress: self.options.compress,
            speed: self.options.speed.unwrap_or(0),
            workers: self.options.workers,
            max_chunk: if self.view.reads_rightly() {
                0
            } else {
                CLUSTER
            },
            discard_source: self.discard_source,
        };
        let names = self.view.names();
        self.teardown.push(Undo::Job { id: names.push() });
        let push = step::push(names, &how);
        let started = self.qmp.execute_raw("blockdev-backup", push).await;
        let started = started.map_err(|error| match error.kind() {
            Kind::QemuRefused => {
                Error::new(Kind::TargetRefused, "starting the push").because(error)
            }
            _ => error,
        });
        let is_refused = matches!(&started, Err(error) if error.kind() == Kind::TargetRefused);
        if self.discard_source && !is_refused {
            // From here on a part of it may be gone.
            self.view.spend();
        }
        started?;
        let done = self.watch(opened).await?;
        self.flush(opened).await?;
        Ok(done)
    }

    /// Takes all room from a raw file: what is not written then reads as zeros.
    async fn empty(&mut self) -> Result<()> {
        // QEMU shortens a file also where it may not write it: so the right comes first.
        let export = self.export().await.map_err(|error| match error.kind() {
            Kind::QemuRefused => {
                Error::new(Kind::TargetRefused, "asking to write the target").because(error)
            }
            _ => error,
        })?;
        self.teardown.undo(self.qmp, &export).await?;
        for size in [0, self.view.size()] {
            let resize = block_resize {
                device: None,
                node_name: Some(self.view.names().target()),
                size: i64::try_from(size).unwrap_or(i64::MAX),
            };
            self.qmp.execute(&resize).await.map_err(|error| {
                Error::new(Kind::TargetRefused, "emptying the target").because(error)
            })?;
        }
        Ok(())
    }

    /// Whether there is a bitmap of what is copied; else all is.
    async fn choose(&mut self, is_zero: bool) -> Result<bool> {
        if self.view.is_incremental() {
            // It came with the view.
            return Ok(true);
        }
        if !is_zero || !self.view.reads_rightly() {
            return Ok(false);
        }
        self.paint_data().await?;
        let names = self.view.names();
        self.teardown.push(Undo::Bitmap {
            node: names.view(),
            name: names.push_bitmap(),
        });
        let (canvas, name) = (names.canvas(), names.push_bitmap());
        let bitmap = step::view_bitmap(names, &name, CLUSTER, &canvas, paint::BITMAP);
        self.qmp.execute_raw("transaction", bitmap).await?;
        Ok(true)
    }

    async fn paint_data(&mut self) -> Result<()> {
        let view = self.view;
        let canvas = Canvas::open(
            self.qmp,
            view.names(),
            view.size(),
            CLUSTER,
            view.address(),
            &mut self.teardown,
        );
        let mut canvas = canvas.await?;
        let mut walk = Walk::open(view, 0, 0).await?;
        while let Some(extent) = walk.next().await? {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            if extent.content == Content::Data {
                canvas.paint(extent.range).await?;
            }
        }
        walk.close().await;
        canvas.finish().await
    }

    /// Exports the target to ourselves, to be written.
    async fn export(&mut self) -> Result<Undo> {
        let names = self.view.names();
        let undo = Undo::Export { id: names.target() };
        self.teardown.push(undo.clone());
        let export = step::target_export(names);
        self.qmp.execute_raw("block-export-add", export).await?;
        Ok(undo)
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "pushing a disk")
}
