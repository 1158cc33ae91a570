//! The process: one loop that owns all state.
//!
//! ```text
//! stdin --Input--> +------+ --spawns--> tasks (begin, commit, ...) --Done--+
//!                  | loop |                                                |
//!                  +------+ <----------------------------------------------+
//!                     |  replies wait here, so that the loop never waits for
//!                     v  standard output
//!                  writer --> stdout <-- records of streams
//! ```
//! A line is read only when there is room for its answer, so what waits is bounded.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use qemu_fleece_engine::guardian::Program;
use qemu_fleece_protocol::backup::AbortResult;
use qemu_fleece_protocol::envelope::{Request, error_line, result_line};
use qemu_fleece_protocol::hello::{Carrier, ShutdownResult};
use qemu_fleece_protocol::{Code, Id, MAX_REQUESTS, WireError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backups::Backups;
use crate::inherited::Inherited;
use crate::input::{self, Input};
use crate::monitors::Monitors;
use crate::requests::{self, Outcome};
use crate::restores::Order;
use crate::writer::{self, Frame, Outlet};

/// Most replies that wait for standard output before no more lines are read.
const MAX_REPLIES: usize = 2 * MAX_REQUESTS;

/// Methods that are taken also when too many others are unanswered: a host must
/// be able to cancel. They are answered at once.
const EXEMPT: &[&str] = &["cancel", "ping", "shutdown"];

/// How long the last replies get when the process ends.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);

/// How long the whole end of the process may take: QEMU may hang.
const CLOSE_DEADLINE: Duration = Duration::from_secs(90);

/// How the process is set up.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where scratch lies unless a host names another place.
    pub(crate) scratch_dir: PathBuf,
    /// Where private directories for sockets are made.
    pub(crate) runtime_dir: PathBuf,
    pub(crate) storage_daemon: PathBuf,
    pub(crate) guardian: Program,
    pub(crate) inherited: Inherited,
}

/// Why the loop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The host asked for it.
    Shutdown,
    /// The host is gone.
    Gone,
    /// Somebody wants us to go.
    Told,
}

/// A request that is done.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) id: Id,
    pub(crate) outcome: Outcome,
}

/// All that the loop owns.
pub(crate) struct Server {
    pub(crate) config: Config,
    pub(crate) outlet: Outlet,
    /// Agreed in the hello; none before it.
    pub(crate) carrier: Option<Carrier>,
    pub(crate) monitors: Monitors,
    pub(crate) backups: Backups,
    pub(crate) restores: HashMap<String, mpsc::Sender<Order>>,
    /// Unanswered requests.
    pub(crate) open: HashMap<Id, CancellationToken>,
    /// Requests that end by themselves once they are cancelled.
    pub(crate) tasks: JoinSet<Done>,
    /// Streams: they may wait for standard output.
    pub(crate) streams: JoinSet<Done>,
    replies: VecDeque<Frame>,
    shutdown: Option<Id>,
}

/// Serves the host until it is done or gone.
pub(crate) async fn serve(config: Config, stdin: File, stdout: File) -> anyhow::Result<Ending> {
    let mut inputs = input::spawn(stdin)?;
    let outlet = writer::spawn(stdout)?;
    let mut server = Server {
        config,
        outlet,
        carrier: None,
        monitors: Monitors::default(),
        backups: Backups::default(),
        restores: HashMap::new(),
        open: HashMap::new(),
        tasks: JoinSet::new(),
        streams: JoinSet::new(),
        replies: VecDeque::new(),
        shutdown: None,
    };
    let ending = server.run(&mut inputs).await?;
    if tokio::time::timeout(CLOSE_DEADLINE, server.close(ending))
        .await
        .is_err()
    {
        tracing::error!("the clean-up is stuck and was left");
    }
    Ok(ending)
}

impl Server {
    async fn run(&mut self, inputs: &mut mpsc::Receiver<Input>) -> anyhow::Result<Ending> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        while self.shutdown.is_none() {
            let outlet = self.outlet.clone();
            tokio::select! {
                permit = outlet.reserve(), if !self.replies.is_empty() => {
                    if let (Ok(permit), Some(frame)) = (permit, self.replies.pop_front()) {
                        permit.send(frame);
                    }
                }
                input = inputs.recv(), if self.replies.len() < MAX_REPLIES => match input {
                    Some(Input::Request(request, payload)) => self.request(request, payload),
                    Some(Input::Bad(bad)) => self.reply_error(bad.id.as_ref(), &bad.error),
                    Some(Input::End) | None => return Ok(Ending::Gone),
                },
                Some(done) = self.tasks.join_next() => self.joined(done).await,
                Some(done) = self.streams.join_next() => self.joined(done).await,
                () = outlet.closed() => return Ok(Ending::Gone),
                _ = terminate.recv() => return Ok(Ending::Told),
                _ = interrupt.recv() => return Ok(Ending::Told),
                _ = hangup.recv() => return Ok(Ending::Told),
            }
        }
        Ok(Ending::Shutdown)
    }

    fn request(&mut self, request: Request, payload: Option<Vec<u8>>) {
        let id = request.id.clone();
        if self.open.contains_key(&id) {
            // Not under this id: the request that has it is still to be answered.
            let error = WireError::new(
                Code::DuplicateId,
                format!("request {id} is not answered yet"),
            );
            return self.reply_error(None, &error);
        }
        if self.open.len() >= MAX_REQUESTS && !EXEMPT.contains(&request.method.as_str()) {
            let error = WireError::new(
                Code::TooManyRequests,
                format!("{MAX_REQUESTS} requests are not answered yet"),
            );
            return self.reply_error(Some(&id), &error);
        }
        self.open.insert(id.clone(), CancellationToken::new());
        match requests::dispatch(self, &request, payload) {
            Ok(Some(outcome)) => self.settle(Done { id, outcome }),
            Ok(None) => {}
            Err(error) => self.settle(Done {
                id,
                outcome: Outcome::Reply(Err(error)),
            }),
        }
    }

    /// The token that cancels the request `id`.
    pub(crate) fn token(&self, id: &Id) -> CancellationToken {
        self.open.get(id).cloned().unwrap_or_default()
    }

    /// Ends the loop after this request.
    pub(crate) fn shut_down(&mut self, id: Id) {
        self.shutdown = Some(id);
    }

    async fn joined(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(done) => self.settle(done),
            // A panic is a defect: say so as loudly as can be, and undo what is open.
            Err(error) if error.is_panic() => {
                tracing::error!(%error, "a request panicked");
                self.close(Ending::Told).await;
                std::process::exit(crate::EXIT_DEFECT);
            }
            Err(_aborted) => {}
        }
    }

    /// Takes over what a request has made, and answers it.
    fn settle(&mut self, done: Done) {
        let reply = requests::apply(self, done.outcome);
        self.open.remove(&done.id);
        match reply {
            Ok(result) => match result_line(&done.id, result) {
                Ok(line) => self.replies.push_back(line.into()),
                Err(error) => self.reply_error(
                    Some(&done.id),
                    &WireError::new(Code::Internal, error.to_string()),
                ),
            },
            Err(error) => self.reply_error(Some(&done.id), &error),
        }
    }

    fn reply_error(&mut self, id: Option<&Id>, error: &WireError) {
        match error_line(id, error) {
            Ok(line) => self.replies.push_back(line.into()),
            Err(error) => tracing::error!(%error, "writing an error reply"),
        }
    }

    /// Aborts what is open; answers what can still be answered.
    async fn close(&mut self, ending: Ending) {
        for cancel in self.open.values() {
            cancel.cancel();
        }
        if ending != Ending::Shutdown {
            self.streams.abort_all();
        }
        let deadline = tokio::time::Instant::now() + FLUSH_DEADLINE;
        while !self.streams.is_empty() {
            match tokio::time::timeout_at(deadline, self.streams.join_next()).await {
                Ok(Some(Ok(done))) => self.settle(done),
                Ok(_) => {}
                // Standard output is stuck; a stream holds nothing of QEMU any more.
                Err(_elapsed) => self.streams.abort_all(),
            }
        }
        while let Some(done) = self.tasks.join_next().await {
            if let Ok(done) = done {
                self.settle(done);
            }
        }
        let result = self.abort_all(ending == Ending::Gone).await;
        if let Some(id) = self.shutdown.take() {
            self.settle(Done {
                id,
                outcome: Outcome::Reply(requests::to_raw(result)),
            });
        }
        let flush = async {
            while let Some(frame) = self.replies.pop_front() {
                if self.outlet.send(frame).await.is_err() {
                    return;
                }
            }
            // Nothing more to say: only to know that all is said before the process ends.
            let (told, written) = oneshot::channel();
            let last = Frame {
                line: Vec::new(),
                payload: None,
                written: Some(told),
            };
            if self.outlet.send(last).await.is_ok() {
                let _closed = written.await;
            }
        };
        if tokio::time::timeout(FLUSH_DEADLINE, flush).await.is_err() {
            tracing::warn!("standard output is stuck; replies are lost");
        }
    }

    async fn abort_all(&mut self, keep: bool) -> ShutdownResult {
        let (mut aborted, mut leftovers) = self.backups.abort_all(keep).await;
        for (id, orders) in self.restores.drain() {
            let (answer, answered) = oneshot::channel();
            if orders.send(Order::Abort(answer)).await.is_ok()
                && let Ok(Ok(result)) = answered.await
            {
                let ended = serde_json::from_str::<AbortResult>(result.get());
                leftovers.extend(ended.map(|ended| ended.leftovers).unwrap_or_default());
                aborted.push(id);
            }
        }
        ShutdownResult { aborted, leftovers }
    }
}
