//! A push to ourselves: QEMU's writes come out as chunks, by offset, as a pull's do.
//!
//! ```text
//! job in QEMU --NBD writes, in any order--> intake --Piece--> assembly --Chunk--> consumer
//!      ^--- paused while much is held <---- Flow <----------------------------------'
//! ```
//! Every write is answered at once: QEMU would wait for one that is not, at its next drain,
//! and its guest with it. So a consumer that is slow has the job paused instead. What is
//! held counts until the consumer has dropped the last of its chunk.

mod assembly;
mod intake;
mod plan;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::chunk::Chunk;
use crate::claim::Claim;
use crate::error::{Error, Kind, Result};
use crate::flow::Flow;
use crate::push::{Options, Progress, push_with};
use crate::target::Target;
use crate::view::View;
use assembly::{Assembly, Next};
use plan::Plan;

/// A push that comes out here. Dropped, it ends by itself, in its own time.
#[derive(Debug)]
pub struct Receive {
    assembly: Assembly,
    progress: watch::Receiver<Progress>,
    /// Nobody wants it any more.
    cancel: CancellationToken,
    /// `None`: its outcome is known.
    job: Option<JoinHandle<Result<u64>>>,
    /// Ends the job.
    end: DropGuard,
    /// The job has it too, until it has cleaned up.
    claim: Arc<Claim>,
    is_whole: bool,
}

impl Receive {
    /// Starts to push `view` to ourselves; stops when `cancel` says so.
    ///
    /// # Errors
    /// [`Kind::StreamActive`]; [`Kind::OffsetReleased`]; [`Kind::PointInTimeLost`]; those of
    /// NBD, of the look at what changed. Those of [`crate::push::push`] come with
    /// [`Receive::next`].
    pub async fn open(
        view: Arc<View>,
        options: Options,
        runtime_dir: PathBuf,
        cancel: CancellationToken,
    ) -> Result<Self> {
        let claim = Arc::new(Claim::whole(Arc::clone(&view))?);
        let plan = match Plan::new(&view).await {
            Ok(plan) => plan,
            Err(_) if cancel.is_cancelled() => return Err(cancelled()),
            Err(error) => return Err(view.explain(error).await),
        };
        let flow = Flow::new();
        let (sink, pieces) = mpsc::unbounded_channel();
        let (to, receiver) = oneshot::channel();
        let (told, progress) = watch::channel(Progress::default());
        let end = cancel.child_token();
        let job = tokio::spawn({
            let (claim, flow, end) = (Arc::clone(&claim), Arc::clone(&flow), end.clone());
            async move {
                let (view, target) = (claim.view(), Target::Receiver(to));
                let intake = intake::receive(receiver, view.size(), sink, &flow);
                let flow = Some(&*flow);
                let push = push_with(view, target, &options, &runtime_dir, &told, &end, flow);
                both(push, intake, &end).await
            }
        });
        Ok(Self {
            assembly: Assembly::new(plan, pieces, flow),
            progress,
            cancel,
            job: Some(job),
            end: end.drop_guard(),
            claim,
            is_whole: false,
        })
    }

    /// How far QEMU is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// The next chunk; `None` once QEMU has pushed all and said so.
    ///
    /// # Errors
    /// Those of [`crate::push::push`]; [`Kind::NbdProtocol`] where QEMU writes what is not
    /// to be pushed. Nothing more comes then, and [`Receive::close`] cleans up.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        let cancel = self.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(cancelled()),
            stepped = self.step() => match stepped {
                // The end of the session closes connections under whoever works on it.
                Err(_) if cancel.is_cancelled() => Err(cancelled()),
                stepped => stepped,
            },
        }
    }

    async fn step(&mut self) -> Result<Option<Chunk>> {
        match self.assembly.next().await {
            Ok(Next::Chunk(chunk)) => Ok(Some(chunk)),
            Ok(Next::End) => {
                self.outcome().await?;
                self.is_whole = true;
                Ok(None)
            }
            // Why the job ends is why its writes do.
            Ok(Next::Early) => match self.outcome().await {
                Err(cause) => Err(cause),
                Ok(_) => Err(Error::new(Kind::NbdClosed, "receiving a push")
                    .because("QEMU ended before all was written")),
            },
            Err(error) => Err(self.claim.view().explain(error).await),
        }
    }

    /// The consumer has all that [`Receive::next`] gave, up to its end: the disk can be
    /// committed.
    pub fn finish(self) {
        if self.is_whole {
            self.claim.complete();
        }
    }

    /// Ends it wherever it is. Returns when all is cleaned up: what could not be, unless an
    /// error has told it. The disk is free for another stream then.
    pub async fn close(mut self) -> Vec<String> {
        drop(self.end);
        match &mut self.job {
            Some(job) => left(joined(job).await),
            None => Vec::new(),
        }
    }

    async fn outcome(&mut self) -> Result<u64> {
        let Some(job) = &mut self.job else {
            return Err(Error::new(Kind::Internal, "receiving a push"));
        };
        let outcome = joined(job).await;
        // Not before: who is cancelled here still has to wait for it.
        self.job = None;
        outcome
    }
}

/// Pushes, and takes in what is pushed, which ends with the push.
async fn both(
    push: impl Future<Output = Result<u64>>,
    intake: impl Future<Output = Result<()>>,
    end: &CancellationToken,
) -> Result<u64> {
    tokio::pin!(push);
    let ended = tokio::select! {
        pushed = &mut push => return pushed,
        ended = intake => ended,
    };
    match ended {
        Err(lie) if lie.kind() == Kind::NbdProtocol => {
            end.cancel();
            Err(lie.leaving(left(push.await)))
        }
        // The connection ends at the push's end, or for what ends the push too.
        _ => push.await,
    }
}

async fn joined(job: &mut JoinHandle<Result<u64>>) -> Result<u64> {
    job.await
        .unwrap_or_else(|panic| Err(Error::new(Kind::Internal, "pushing").because(panic)))
}

fn left(ended: Result<u64>) -> Vec<String> {
    ended.map_or_else(|error| error.leftovers().to_vec(), |_| Vec::new())
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "receiving a push")
}
