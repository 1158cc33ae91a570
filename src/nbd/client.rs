//! A connection in transmission: requests go out from a queue, and one task
//! takes in replies, always, whatever becomes of those who asked (a client that
//! does not read freezes QEMU at its next drain).
//!
//! ```text
//! submit_*() -- entry in the table, bytes in the queue --> writer task --> server
//!     |                                                                      |
//!   Ticket <--------- answer <------ reader task (owns the buffers) <--------+
//! ```
//! A lie of the server ends the connection: all that waits, and all that is asked
//! later, fails with [`Kind::NbdProtocol`] and the lie in the source. A refusal
//! fails its request only. Dropping a ticket, or a call of `submit_*`, harms nothing.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::buffer::Buffer;
use crate::error::{Error, Kind, Result};
use crate::nbd::handshake::{Export, negotiate};
use crate::nbd::incoming::receive;
use crate::nbd::pending::{Answer, Pending, Shared, Work};
use crate::nbd::reply::Reply;
use crate::nbd::wire::{Request, command, flag};

/// Requests in flight: QEMU works on so many of one connection at a time.
pub const IN_FLIGHT: usize = 16;

/// How long a server gets to hang up after goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where an NBD server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// The answer to come. Dropping it is harmless.
#[derive(Debug)]
pub struct Ticket<T> {
    answer: oneshot::Receiver<Result<Answer>>,
    pick: fn(Answer) -> Option<T>,
}

impl<T> Future for Ticket<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let closed = || {
            Error::new(Kind::NbdClosed, "waiting for an NBD reply")
                .because("the connection was closed")
        };
        Pin::new(&mut self.answer).poll(context).map(|answer| {
            let answer = answer.map_err(|_dropped| closed())??;
            (self.pick)(answer).ok_or_else(|| Error::new(Kind::Internal, "matching an NBD reply"))
        })
    }
}

#[derive(Debug)]
struct Outgoing {
    header: Vec<u8>,
    payload: Option<Buffer>,
}

/// A connection to one export, with at most one meta context.
#[derive(Debug)]
pub struct Client {
    export: Export,
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    reader: tokio::task::JoinHandle<()>,
    /// Ends both tasks with the client.
    _alive: DropGuard,
}

impl Client {
    /// Connects to `export`, with `context` for block status. The server gets
    /// `deadline` to accept, for the handshake, and for each complete reply.
    ///
    /// # Errors
    /// [`Kind::NbdUnreachable`] where nobody listens, or the server lacks the
    /// export or context; [`Kind::NbdTimeout`]; [`Kind::NbdClosed`]; [`Kind::NbdProtocol`].
    pub async fn connect(
        address: &Address,
        export: &str,
        context: Option<&str>,
        deadline: Duration,
    ) -> Result<Self> {
        let unreachable = |error: std::io::Error| {
            Error::new(Kind::NbdUnreachable, format!("connecting to {address}")).because(error)
        };
        let silent = |_elapsed| {
            Error::new(Kind::NbdTimeout, format!("connecting to {address}"))
                .because(format!("no connection within {deadline:?}"))
        };
        match address {
            Address::Unix(path) => {
                let stream = tokio::time::timeout(deadline, UnixStream::connect(path));
                let stream = stream.await.map_err(silent)?.map_err(unreachable)?;
                Self::over(stream, export, context, deadline).await
            }
            Address::Tcp(place) => {
                let stream = tokio::time::timeout(deadline, TcpStream::connect(place));
                let stream = stream.await.map_err(silent)?.map_err(unreachable)?;
                // Requests are small, and each is waited for.
                stream.set_nodelay(true).map_err(unreachable)?;
                Self::over(stream, export, context, deadline).await
            }
        }
    }

    /// Speaks over any stream: the constructor for tests.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn over<S>(
        mut stream: S,
        export: &str,
        context: Option<&str>,
        deadline: Duration,
    ) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let negotiated =
            tokio::time::timeout(deadline, negotiate(&mut stream, export, context)).await;
        let export = negotiated.unwrap_or_else(|_elapsed| {
            Err(
                Error::new(Kind::NbdTimeout, "negotiating with the NBD server")
                    .because(format!("no end of the handshake within {deadline:?}")),
            )
        })?;
        let (reader, writer) = tokio::io::split(stream);
        let shared = Arc::new(Shared::default());
        let alive = CancellationToken::new();
        let (outgoing, queue) = mpsc::unbounded_channel();
        tokio::spawn(send(writer, queue, Arc::clone(&shared), alive.clone()));
        let reader = tokio::spawn(receive(
            reader,
            export.replies,
            Arc::clone(&shared),
            deadline,
            alive.clone(),
        ));
        let slots = Arc::new(Semaphore::new(IN_FLIGHT));
        Ok(Self {
            export,
            shared,
            slots,
            outgoing,
            reader,
            _alive: alive.drop_guard(),
        })
    }

    /// What the server says of the export.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Reads `buffer.len()` bytes at `offset`. Returns once the request is on its way.
    ///
    /// # Errors
    /// [`Kind::InvalidRequest`] past the end or over the server's maximum; what
    /// ended the connection. The ticket: [`Kind::NbdRefused`] with the server's
    /// error, and what ended the connection. No partial bytes are ever handed out.
    pub async fn submit_read(&self, offset: u64, buffer: Buffer) -> Result<Ticket<Buffer>> {
        let length = buffer.len() as u64;
        self.submit(
            command::READ,
            0,
            offset..offset.saturating_add(length),
            Some(buffer),
            |answer| match answer {
                Answer::Bytes(buffer) => Some(buffer),
                _ => None,
            },
        )
        .await
    }

    /// Writes the buffer at `offset`.
    ///
    /// # Errors
    /// As [`Client::submit_read`].
    pub async fn submit_write(&self, offset: u64, buffer: Buffer) -> Result<Ticket<()>> {
        let end = offset.saturating_add(buffer.len() as u64);
        self.submit(command::WRITE, 0, offset..end, Some(buffer), done)
            .await
    }

    /// Tells that a range is not needed any more.
    ///
    /// # Errors
    /// As [`Client::submit_read`]; [`Kind::QemuUnsupported`] where the server has no TRIM.
    pub async fn submit_trim(&self, offset: u64, length: u64) -> Result<Ticket<()>> {
        self.need(flag::SEND_TRIM, "TRIM")?;
        self.submit(
            command::TRIM,
            0,
            offset..offset.saturating_add(length),
            None,
            done,
        )
        .await
    }

    /// Makes a range read as zeros; `no_hole`: and keep its room.
    ///
    /// # Errors
    /// As [`Client::submit_trim`].
    pub async fn submit_write_zeroes(
        &self,
        offset: u64,
        length: u64,
        no_hole: bool,
    ) -> Result<Ticket<()>> {
        self.need(flag::SEND_WRITE_ZEROES, "WRITE_ZEROES")?;
        let flags = if no_hole { command::FLAG_NO_HOLE } else { 0 };
        self.submit(
            command::WRITE_ZEROES,
            flags,
            offset..offset.saturating_add(length),
            None,
            done,
        )
        .await
    }

    /// Brings all writes that were answered to stable storage.
    ///
    /// # Errors
    /// As [`Client::submit_read`].
    pub async fn submit_flush(&self) -> Result<Ticket<()>> {
        self.need(flag::SEND_FLUSH, "FLUSH")?;
        self.submit(command::FLUSH, 0, 0..0, None, done).await
    }

    /// Asks for the flags of a range: pairs of length and flags (see
    /// [`crate::nbd::status`]), contiguous from `offset`, for a prefix of the range.
    ///
    /// # Errors
    /// As [`Client::submit_read`]; [`Kind::InvalidRequest`] without a meta context.
    pub async fn submit_block_status(
        &self,
        offset: u64,
        length: u64,
    ) -> Result<Ticket<Vec<(u64, u64)>>> {
        if self.export.context.is_none() {
            return Err(
                Error::new(Kind::InvalidRequest, "asking for NBD block status")
                    .because("the connection has no meta context"),
            );
        }
        let range = offset..offset.saturating_add(length);
        self.submit(
            command::BLOCK_STATUS,
            0,
            range,
            None,
            |answer| match answer {
                Answer::Extents(extents) => Some(extents),
                _ => None,
            },
        )
        .await
    }

    fn need(&self, flag: u16, what: &str) -> Result<()> {
        if self.export.has(flag) {
            return Ok(());
        }
        Err(Error::new(Kind::QemuUnsupported, "asking the NBD server")
            .because(format!("it has no {what}")))
    }

    async fn submit<T>(
        &self,
        command: u16,
        flags: u16,
        range: std::ops::Range<u64>,
        buffer: Option<Buffer>,
        pick: fn(Answer) -> Option<T>,
    ) -> Result<Ticket<T>> {
        let length = range.end - range.start;
        self.check(command, &range, buffer.is_some())?;
        let slot = Arc::clone(&self.slots).acquire_owned().await;
        let slot = slot.map_err(|_closed| self.shared.obituary("sending an NBD request"))?;
        let (answer, ticket) = oneshot::channel();
        let mut table = self.shared.table();
        if table.dead.is_some() {
            drop(table);
            return Err(self.shared.obituary("sending an NBD request"));
        }
        table.last_cookie += 1;
        let cookie = table.last_cookie;
        let request = Request {
            flags,
            command,
            cookie,
            offset: range.start,
            length,
        };
        let too_long = || {
            Error::new(Kind::InvalidRequest, "sending an NBD request")
                .because("the range is too long")
        };
        let header = request.encode(self.export.replies).ok_or_else(too_long)?;
        let (payload, buffer) = if command == command::WRITE {
            (buffer, None)
        } else {
            (None, buffer)
        };
        let reply = Reply::new(command, range, self.export.replies, self.export.context);
        table.pending.insert(
            cookie,
            Pending {
                work: Some(Work { reply, buffer }),
                answer,
                since: Instant::now(),
                _slot: slot,
            },
        );
        // Under the lock: requests go out in the order of their cookies. The slots
        // bound the queue.
        if self.outgoing.send(Outgoing { header, payload }).is_err() {
            table.pending.remove(&cookie);
            drop(table);
            return Err(self.shared.obituary("sending an NBD request"));
        }
        Ok(Ticket {
            answer: ticket,
            pick,
        })
    }

    fn check(&self, command: u16, range: &std::ops::Range<u64>, data: bool) -> Result<()> {
        let length = range.end - range.start;
        let most = if data {
            u64::from(self.export.max_payload)
        } else {
            self.export.replies.max_range()
        };
        let grain = u64::from(self.export.min_block);
        let aligned = range.start.is_multiple_of(grain)
            && (range.end.is_multiple_of(grain) || range.end == self.export.size);
        let flush = command == command::FLUSH && length == 0;
        if !flush && (length == 0 || length > most || range.end > self.export.size || !aligned) {
            return Err(Error::new(Kind::InvalidRequest, "sending an NBD request")
                .because(format!(
                    "{length} bytes, of an export of {} in blocks of {grain}",
                    self.export.size
                ))
                .at(range.start));
        }
        Ok(())
    }

    /// Says goodbye and waits until the server has hung up.
    pub async fn close(self) {
        let request = Request {
            flags: 0,
            command: command::DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        if let Some(header) = request.encode(self.export.replies) {
            let _dead = self.outgoing.send(Outgoing {
                header,
                payload: None,
            });
        }
        let Self {
            outgoing,
            reader,
            _alive,
            ..
        } = self;
        drop(outgoing);
        // A server that stays is left by dropping the socket.
        let _stuck = tokio::time::timeout(GOODBYE, reader).await;
    }
}

fn done(answer: Answer) -> Option<()> {
    matches!(answer, Answer::Done).then_some(())
}

async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    shared: Arc<Shared>,
    alive: CancellationToken,
) {
    let work = async {
        while let Some(Outgoing { header, payload }) = queue.recv().await {
            writer.write_all(&header).await?;
            if let Some(payload) = payload {
                writer.write_all(&payload).await?;
            }
            if queue.is_empty() {
                writer.flush().await?;
            }
        }
        writer.shutdown().await
    };
    tokio::select! {
        () = alive.cancelled() => {}
        result = work => if let Err(error) = result {
            shared.kill(&Error::new(Kind::NbdClosed, "sending an NBD request").because(error));
            alive.cancel();
        },
    }
}
