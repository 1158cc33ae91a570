//! One stream, of a `backup.read` or of a push to the host: an engine's chunks become
//! records on standard output.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qemu_fleece_engine::Error;
use qemu_fleece_engine::chunk::Chunk;
use qemu_fleece_engine::extent::{Content, length};
use qemu_fleece_engine::pull::Pull;
use qemu_fleece_engine::push::Options;
use qemu_fleece_engine::receive::Receive;
use qemu_fleece_engine::view::{READ_MAX, View};
use qemu_fleece_protocol::backup::{ReadParams, ReadResult, Release};
use qemu_fleece_protocol::envelope::notification_line;
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::event::{ProgressParams, RecordParams};
use qemu_fleece_protocol::hello::Carrier;
use qemu_fleece_protocol::push::PushResult;
use qemu_fleece_protocol::record::Begin;
use qemu_fleece_protocol::stream::Writer;
use qemu_fleece_protocol::{Code, Id, MAX_PAYLOAD_BYTES, Record, WireError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::marks::Marks;
use crate::wire;
use crate::writer::{Frame, Outlet};

/// Least `record_max`: the grain of everything else.
const RECORD_MIN: u64 = 64 * 1024;

/// Least time between two progress notifications of a stream.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Most time between two.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// What a stream needs to know.
pub(crate) struct Stream {
    pub(crate) id: Id,
    pub(crate) begin: Begin,
    pub(crate) view: Arc<View>,
    pub(crate) carrier: Carrier,
    pub(crate) outlet: Outlet,
    pub(crate) cancel: CancellationToken,
}

/// Where the chunks come from.
enum Source {
    /// We read; the stream can go on at these places.
    Pull(Box<Pull>, Arc<Mutex<Marks>>),
    /// QEMU writes.
    Push(Box<Receive>),
}

impl Source {
    async fn next(&mut self) -> Result<Option<Chunk>, Error> {
        match self {
            Self::Pull(pull, _) => pull.next().await,
            Self::Push(push) => push.next().await,
        }
    }

    /// The host has the end of the stream.
    fn finish(self) {
        match self {
            Self::Pull(pull, _) => pull.finish(),
            Self::Push(push) => push.finish(),
        }
    }

    /// Ends it early; the disk is free for another request then. Returns what is left behind.
    async fn close(self) -> Vec<String> {
        match self {
            Self::Pull(..) => Vec::new(),
            Self::Push(push) => push.close().await,
        }
    }
}

/// A stream that has started.
struct Running {
    stream: Stream,
    writer: Writer,
    read_bytes: u64,
    scratch_peak: u64,
    told: Instant,
}

/// Checks what can be checked before anything starts.
pub(crate) fn check(params: &ReadParams) -> Result<u64, WireError> {
    let cut = params.record_max.unwrap_or(MAX_PAYLOAD_BYTES);
    if !cut.is_power_of_two() || !(RECORD_MIN..=MAX_PAYLOAD_BYTES.min(READ_MAX)).contains(&cut) {
        let why = format!("record_max is a power of two from {RECORD_MIN} to {MAX_PAYLOAD_BYTES}");
        return Err(WireError::new(Code::InvalidParams, why));
    }
    Ok(cut)
}

/// Streams the disk, from `begin` to `end` or `failed`.
pub(crate) async fn run(
    mut stream: Stream,
    marks: Arc<Mutex<Marks>>,
    params: ReadParams,
    cut: u64,
) -> Result<ReadResult, WireError> {
    let on_read = params.release == Release::OnRead;
    let view = Arc::clone(&stream.view);
    let pull = Pull::open(
        Arc::clone(&view),
        params.offset,
        on_read,
        stream.cancel.clone(),
    )
    .await;
    let pull = match pull {
        Ok(pull) => pull.cut_at(cut),
        Err(error) => return Err(wire::of_view(&error, &view)),
    };
    let writer = marks
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .resume();
    if writer.offset() != params.offset {
        let why =
            "what was handed over was given back, and not acknowledged: the stream cannot go on";
        return Err(WireError::new(Code::OffsetReleased, why).left(StateLeft::BackupOpen));
    }
    stream.begin.offset = params.offset;
    let source = Source::Pull(Box::new(pull), marks);
    let told = Running::start(stream, writer).run(source).await?;
    Ok(ReadResult {
        digest: told.digest,
        read_bytes: told.read_bytes,
        scratch_peak: told.scratch_peak,
        duration_ms: told.duration_ms,
    })
}

/// Streams what QEMU pushes to us, from `begin` to `end` or `failed`.
pub(crate) async fn run_push(
    stream: Stream,
    options: Options,
    runtime_dir: PathBuf,
) -> Result<PushResult, WireError> {
    let (view, cancel) = (Arc::clone(&stream.view), stream.cancel.clone());
    let push = Receive::open(Arc::clone(&view), options, runtime_dir, cancel).await;
    let push = push.map_err(|error| wire::of_view(&error, &view))?;
    let (mode, writer) = (stream.begin.mode, Writer::new(&stream.begin));
    let source = Source::Push(Box::new(push));
    let told = Running::start(stream, writer).run(source).await?;
    Ok(PushResult {
        mode,
        copied_bytes: told.read_bytes,
        scratch_peak: told.scratch_peak,
        duration_ms: told.duration_ms,
        digest: Some(told.digest),
    })
}

/// What a complete stream comes to.
struct Told {
    digest: String,
    read_bytes: u64,
    scratch_peak: u64,
    duration_ms: u64,
}

impl Running {
    fn start(stream: Stream, writer: Writer) -> Self {
        Self {
            stream,
            writer,
            read_bytes: 0,
            scratch_peak: 0,
            told: Instant::now(),
        }
    }

    async fn run(mut self, mut source: Source) -> Result<Told, WireError> {
        let started = Instant::now();
        // Before anybody is told, all is cleaned up, and the disk free for another request.
        match self.stream(&mut source).await {
            Ok(digest) => {
                source.finish();
                self.stream.view.remember().await;
                Ok(Told {
                    digest,
                    read_bytes: self.read_bytes,
                    scratch_peak: self.scratch_peak,
                    duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                })
            }
            Err(mut error) => {
                error.data.leftovers.extend(source.close().await);
                self.stream.view.remember().await;
                let error = error.left(wire::left_of(&self.stream.view));
                let (code, action) = (error.data.code.name().to_owned(), error.data.action);
                let failed = Record::Failed {
                    code,
                    action,
                    offset: self.writer.offset(),
                };
                // A closed outlet has nobody to tell.
                let _closed = self.send(failed, None).await;
                Err(error)
            }
        }
    }

    async fn stream(&mut self, source: &mut Source) -> Result<String, WireError> {
        self.send_or_cancel(Record::Begin(self.stream.begin.clone()), None)
            .await?;
        while let Some(chunk) = self.next(source).await? {
            let record = match (&chunk.extent.content, &chunk.bytes) {
                (Content::Data, Some(bytes)) => self.writer.data(bytes),
                (Content::Zero { hole }, _) => self.writer.zero(length(&chunk.extent.range), *hole),
                (Content::Same, _) => self.writer.same(length(&chunk.extent.range)),
                (Content::Data, None) => {
                    return Err(WireError::new(Code::Internal, "data without bytes"));
                }
            };
            self.send_or_cancel(record, Some(chunk)).await?;
            match source {
                Source::Pull(pull, marks) => {
                    marks
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .pass(&self.writer);
                    self.read_bytes = pull.read_bytes();
                }
                Source::Push(push) => self.read_bytes = push.progress().done,
            }
            if self.told.elapsed() >= PROGRESS_EVERY {
                self.progress().await?;
            }
        }
        if let Source::Push(push) = source {
            self.read_bytes = push.progress().done;
        }
        self.progress().await?;
        let end = self.writer.end();
        let digest = end.digest.clone();
        self.send_or_cancel(Record::End(end), None).await?;
        Ok(digest)
    }

    /// The next chunk, with a heartbeat as long as there is none.
    async fn next(&mut self, source: &mut Source) -> Result<Option<Chunk>, WireError> {
        let next = source.next();
        tokio::pin!(next);
        loop {
            let silence = self.told + HEARTBEAT;
            tokio::select! {
                biased;
                found = &mut next => {
                    return found.map_err(|error| wire::unchanged(&error));
                }
                () = tokio::time::sleep_until(silence) => self.progress().await?,
            }
        }
    }

    async fn progress(&mut self) -> Result<(), WireError> {
        let scratch_bytes = self.stream.view.scratch_bytes().await;
        self.scratch_peak = self.scratch_peak.max(scratch_bytes);
        self.told = Instant::now();
        let params = ProgressParams {
            stream: self.stream.id.clone(),
            disk: self.stream.begin.disk.clone(),
            done: self.writer.offset(),
            total: self.stream.begin.size,
            data_bytes: self.writer.data_bytes(),
            scratch_bytes,
        };
        let line = notification_line("progress", params, None).map_err(|error| internal(&error))?;
        self.put(line.into()).await
    }

    async fn send_or_cancel(&self, record: Record, chunk: Option<Chunk>) -> Result<(), WireError> {
        self.put(self.frame(record, chunk)?).await
    }

    /// Hands a frame to standard output, unless the request is cancelled first.
    async fn put(&self, frame: Frame) -> Result<(), WireError> {
        tokio::select! {
            biased;
            () = self.stream.cancel.cancelled() => {
                Err(WireError::new(Code::Cancelled, "the request was cancelled"))
            }
            sent = self.stream.outlet.send(frame) => sent.map_err(|_closed| {
                WireError::new(Code::Cancelled, "standard output is closed")
            }),
        }
    }

    async fn send(&self, record: Record, chunk: Option<Chunk>) -> Result<(), WireError> {
        let frame = self.frame(record, chunk)?;
        self.stream
            .outlet
            .send(frame)
            .await
            .map_err(|_closed| WireError::new(Code::Cancelled, "standard output is closed"))
    }

    fn frame(&self, record: Record, chunk: Option<Chunk>) -> Result<Frame, WireError> {
        let payload = chunk.and_then(|chunk| chunk.bytes);
        let mut params = RecordParams {
            stream: self.stream.id.clone(),
            record,
            data: None,
        };
        let (payload, payload_bytes) = match (payload, self.stream.carrier) {
            (Some(bytes), Carrier::Inline) => {
                params.data = Some(base64_simd::STANDARD.encode_to_string(&*bytes));
                (None, None)
            }
            (Some(bytes), Carrier::Framed) => {
                let length = bytes.len() as u64;
                (Some(bytes), Some(length))
            }
            (None, _) => (None, None),
        };
        let line =
            notification_line("record", params, payload_bytes).map_err(|error| internal(&error))?;
        Ok(Frame {
            line,
            payload,
            written: None,
        })
    }
}

fn internal(error: &serde_json::Error) -> WireError {
    WireError::new(Code::Internal, format!("writing JSON: {error}"))
}
