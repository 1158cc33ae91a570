//! A push to ourselves: QEMU's writes come out as chunks, by offset, as a pull's do.
//!
//! ```text
//! job in QEMU --NBD writes, in any order--> serve --Piece--> assemble --Chunk--> consumer
//!      ^--- paused while much is held <--- Flow <-----------------------'
//! ```
//! Every write is taken into memory and answered at once. QEMU would wait for one that is
//! not, at its next drain, and its guest with it; so a consumer that is slow has the job
//! paused instead.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::buffer::{Buffer, Pool};
use crate::chunk::{Chunk, Chunks};
use crate::error::{Error, Kind, Result};
use crate::extent::{Content, Extent, Range, length};
use crate::flow::Flow;
use crate::nbd::serve::{Asked, Offered, Served};
use crate::nbd::{Client, Cursor, status};
use crate::push::{Options, Progress, push_with};
use crate::qemu::step::CLUSTER;
use crate::target::{Receiver, Target};
use crate::view::{READ_MAX, View};

/// Most writes that are held at a time, whatever their length: a QEMU that is not paused by
/// then is none that can be dealt with.
const PIECES: usize = 4096;

/// What one write has brought.
#[derive(Debug)]
enum Piece {
    Data(Range, Buffer),
    Zero(Range),
}

impl Piece {
    fn range(&self) -> &Range {
        match self {
            Self::Data(range, _) | Self::Zero(range) => range,
        }
    }
}

/// A push that comes out here.
#[derive(Debug)]
pub struct Receive {
    size: u64,
    pieces: mpsc::Receiver<Result<Piece>>,
    /// What came ahead of its turn, by offset.
    ahead: BTreeMap<u64, Piece>,
    plan: Plan,
    chunks: Chunks,
    /// What is in order before it is in `chunks`, or handed over.
    at: u64,
    /// What will be written, up to here, is known.
    expected: u64,
    handed: u64,
    flow: Arc<Flow>,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
    job: Option<JoinHandle<Result<u64>>>,
    _end: DropGuard,
}

impl Receive {
    /// Starts to push `view` to ourselves; stops when `cancel` says so.
    ///
    /// # Errors
    /// Those of NBD, of the look at what changed. Those of [`crate::push::push`] come
    /// with [`Receive::next`].
    pub async fn open(
        view: Arc<View>,
        options: Options,
        runtime_dir: PathBuf,
        cancel: CancellationToken,
    ) -> Result<Self> {
        let plan = match Plan::new(&view).await {
            Err(_) if cancel.is_cancelled() => return Err(cancelled()),
            plan => plan?,
        };
        let size = view.size();
        let flow = Arc::new(Flow::default());
        let (sink, pieces) = mpsc::channel(PIECES);
        let (to, receiver) = oneshot::channel();
        tokio::spawn(serve(receiver, size, sink, Arc::clone(&flow)));
        let (told, progress) = watch::channel(Progress::default());
        // Of its own: it cleans up also when nobody takes the chunks any more.
        let end = cancel.child_token();
        let job = tokio::spawn({
            let (flow, end) = (Arc::clone(&flow), end.clone());
            async move {
                let target = Target::Receiver(to);
                push_with(&view, target, &options, &runtime_dir, &told, &end, &flow).await
            }
        });
        Ok(Self {
            size,
            pieces,
            ahead: BTreeMap::new(),
            plan,
            chunks: Chunks::new(READ_MAX),
            at: 0,
            expected: 0,
            handed: 0,
            flow,
            progress,
            cancel,
            job: Some(job),
            _end: end.drop_guard(),
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
    /// to be pushed. The push is over then.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        let cancel = self.cancel.clone();
        let stepped = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(cancelled()),
            stepped = self.step() => stepped,
        };
        match stepped {
            Ok(chunk) => Ok(chunk),
            // Why the job ended is why its writes did.
            Err(error) if error.kind() == Kind::NbdClosed => match self.outcome().await {
                Err(cause) => Err(cause),
                Ok(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn step(&mut self) -> Result<Option<Chunk>> {
        loop {
            if let Some(chunk) = self.chunks.pop() {
                if chunk.bytes.is_some() {
                    self.flow.give(length(&chunk.extent.range));
                }
                self.handed = chunk.extent.range.end;
                return Ok(Some(chunk));
            }
            if self.at < self.expected {
                self.take().await?;
                continue;
            }
            match self.plan.next().await? {
                Some(Step::Same(range)) if range.start == self.at => {
                    self.at = range.end;
                    self.expected = range.end;
                    self.chunks.known(Extent {
                        range,
                        content: Content::Same,
                    });
                }
                Some(Step::Same(_)) => return Err(broken("a write of what did not change")),
                Some(Step::Written(end)) => self.expected = end,
                None if self.chunks.flush() => {}
                None if self.at != self.size => return Err(broken("a write behind the end")),
                None if !self.ahead.is_empty() => {
                    return Err(broken("a write of what did not change"));
                }
                None => {
                    self.outcome().await?;
                    return Ok(None);
                }
            }
        }
    }

    /// Takes the piece at `at`.
    async fn take(&mut self) -> Result<()> {
        loop {
            if let Some(piece) = self.ahead.remove(&self.at) {
                let range = piece.range().clone();
                self.at = range.end;
                match piece {
                    Piece::Zero(range) => self.chunks.known(Extent {
                        range,
                        content: Content::Zero { hole: false },
                    }),
                    Piece::Data(range, buffer) => self.data(&range, buffer),
                }
                return Ok(());
            }
            let piece = self.pieces.recv().await.unwrap_or_else(|| {
                Err(Error::new(Kind::NbdClosed, "receiving a push")
                    .because("QEMU ended before all was written"))
            })?;
            self.keep(piece)?;
        }
    }

    fn data(&mut self, range: &Range, buffer: Buffer) {
        let before = self.chunks.data_bytes();
        self.chunks.bytes(range.start, buffer);
        // Zeros that were written as bytes are told without: they hold nothing.
        let data = self.chunks.data_bytes() - before;
        self.flow.give(length(range) - data);
    }

    fn keep(&mut self, piece: Piece) -> Result<()> {
        let range = piece.range().clone();
        let before = self.ahead.range(..range.end).next_back();
        let overlaps = before.is_some_and(|(_, piece)| piece.range().end > range.start);
        if range.start < self.at || overlaps {
            return Err(broken("a range that is written twice"));
        }
        if self.ahead.len() >= PIECES {
            return Err(broken("too many writes ahead of their turn"));
        }
        self.ahead.insert(range.start, piece);
        Ok(())
    }

    /// Waits for the job: what it says counts.
    async fn outcome(&mut self) -> Result<u64> {
        let Some(job) = self.job.take() else {
            return Err(Error::new(Kind::Internal, "receiving a push"));
        };
        job.await
            .unwrap_or_else(|panic| Err(Error::new(Kind::Internal, "pushing").because(panic)))
    }
}

fn broken(what: &'static str) -> Error {
    Error::new(Kind::NbdProtocol, "receiving a push").because(what)
}

/// Answers QEMU, until it says goodbye or `sink` is closed.
async fn serve(
    receiver: oneshot::Receiver<Receiver>,
    size: u64,
    sink: mpsc::Sender<Result<Piece>>,
    flow: Arc<Flow>,
) {
    // Dropped where the push did not come to open its target.
    let Ok(Receiver { door }) = receiver.await else {
        return;
    };
    let served = async {
        let stream = door.open().await;
        let stream = stream
            .map_err(|error| Error::new(Kind::NbdClosed, "receiving a push").because(error))?;
        let mut client = Served::welcome(stream, Offered::to_write(size)).await?;
        let pool = Pool::new(PIECES);
        loop {
            let (cookie, asked) = client.asked().await?;
            let piece = match asked {
                Asked::Goodbye => return Ok(()),
                Asked::Other => continue,
                Asked::Flush => None,
                Asked::Zero(range) => Some(Piece::Zero(range)),
                Asked::Write(range) => {
                    let bytes = usize::try_from(length(&range)).unwrap_or_default();
                    let mut buffer = pool.take(bytes).await;
                    client.payload(&mut buffer).await?;
                    flow.take(length(&range)).await;
                    Some(Piece::Data(range, buffer))
                }
            };
            if let Some(piece) = piece
                && sink.send(Ok(piece)).await.is_err()
            {
                return Ok(());
            }
            client.done(cookie).await?;
        }
    };
    tokio::select! {
        served = served => if let Err(error) = served {
            let _closed = sink.send(Err(error)).await;
        },
        () = sink.closed() => {}
    }
}

/// What comes next, in order of offset.
#[derive(Debug)]
enum Step {
    /// Unchanged: QEMU does not write it.
    Same(Range),
    /// QEMU writes all up to here.
    Written(u64),
}

/// What QEMU will write: the changed granules, in whole clusters.
#[derive(Debug)]
struct Plan {
    size: u64,
    /// All before it is told.
    at: u64,
    changes: Option<(Client, Cursor)>,
}

impl Plan {
    async fn new(view: &View) -> Result<Self> {
        let changes = view.connect_changes().await?;
        let size = view.size();
        Ok(Self {
            size,
            at: 0,
            changes: changes.map(|client| (client, Cursor::new(0..size))),
        })
    }

    async fn next(&mut self) -> Result<Option<Step>> {
        let Some((client, cursor)) = &mut self.changes else {
            let all = (self.at < self.size).then_some(Step::Written(self.size));
            self.at = self.size;
            return Ok(all);
        };
        while let Some((range, flags)) = cursor.next(client).await? {
            let dirty = status::is_dirty(flags);
            let end = if range.end == self.size {
                self.size
            } else if dirty {
                range.end.next_multiple_of(CLUSTER).min(self.size)
            } else {
                range.end / CLUSTER * CLUSTER
            };
            if end <= self.at {
                continue;
            }
            let start = std::mem::replace(&mut self.at, end);
            return Ok(Some(if dirty {
                Step::Written(end)
            } else {
                Step::Same(start..end)
            }));
        }
        Ok(None)
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "receiving a push")
}

#[cfg(test)]
mod tests;
