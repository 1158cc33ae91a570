//! The server's side, for one client: QEMU, when it pushes. To us, which is only writes; or
//! to another server, which answers the requests once the client is in.
//!
//! ```text
//! greeting --> options (structured replies, at most) --> GO --> requests --> goodbye
//!         \-> TLS, which we cannot look into
//! ```
//! A client that breaks the protocol, or reads, is no QEMU that pushes: the connection ends.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::Result;
use crate::extent::Range;
use crate::nbd::Export;
use crate::nbd::options::{Options, broken, closed};
use crate::nbd::wire::{Request, SIMPLE_REPLY_MAGIC, command, flag, info, option, option_reply};

/// Longest write that is taken.
pub const MAX_WRITE: u32 = 1024 * 1024;

/// NBD's EINVAL.
const EINVAL: u32 = 22;

/// NBD's ENOSPC.
const ENOSPC: u32 = 28;

/// Bytes that are read at a time where nobody wants them.
const SKIP: usize = 64 * 1024;

/// What the client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To write as many bytes as follow.
    Write(Range),
    /// To write zeros.
    Zero(Range),
    /// To bring all writes to stable storage.
    Flush,
    /// What this server does not do. It was told so.
    Other,
    /// To end.
    Goodbye,
}

/// What a client finds, whatever name it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    size: u64,
    flags: u16,
    /// Least, best and largest.
    blocks: [u32; 3],
    /// Replies may be structured: a write's has no structure, so it may be simple in any case.
    structured: bool,
}

impl Offered {
    /// What [`Served`] itself can serve.
    pub fn to_write(size: u64) -> Self {
        Self {
            size,
            flags: flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_WRITE_ZEROES,
            blocks: [1, 64 * 1024, MAX_WRITE],
            structured: true,
        }
    }

    /// What another server serves, with simple replies.
    pub fn of(export: &Export) -> Self {
        Self {
            size: export.size,
            flags: export.flags,
            blocks: [export.min_block, export.preferred_block, export.max_payload],
            structured: false,
        }
    }

    /// One option; whether transmission begins.
    async fn answer<S>(&self, options: &mut Options<S>) -> Result<bool>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (kind, data) = options.next().await?;
        match kind {
            option::GO => {
                let mut export = info::EXPORT.to_be_bytes().to_vec();
                export.extend(self.size.to_be_bytes());
                export.extend(self.flags.to_be_bytes());
                options.answer(kind, option_reply::INFO, &export).await?;
                let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
                for bytes in self.blocks {
                    blocks.extend(bytes.to_be_bytes());
                }
                options.answer(kind, option_reply::INFO, &blocks).await?;
                options.answer(kind, option_reply::ACK, &[]).await?;
                Ok(true)
            }
            option::STRUCTURED_REPLY if self.structured && data.is_empty() => {
                options.answer(kind, option_reply::ACK, &[]).await?;
                Ok(false)
            }
            option::ABORT | option::EXPORT_NAME => {
                Err(broken("the client gives up, or speaks an old style"))
            }
            _ => {
                options.answer(kind, option_reply::ERR_UNSUP, &[]).await?;
                Ok(false)
            }
        }
    }
}

/// A connection that is served.
#[derive(Debug)]
pub struct Served<S> {
    stream: S,
    size: u64,
}

/// Greets, and agrees to TLS, which whoever gets the stream goes on with.
///
/// # Errors
/// As of [`Served::welcome`]; a client that wants no TLS.
pub async fn welcome_tls(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    let mut options = Options::greet(stream).await?;
    let (kind, data) = options.next().await?;
    if kind != option::START_TLS || !data.is_empty() {
        return Err(broken("the client does not begin with TLS"));
    }
    options.answer(kind, option_reply::ACK, &[]).await
}

impl<S: AsyncRead + AsyncWrite + Unpin> Served<S> {
    /// Negotiates.
    ///
    /// # Errors
    /// `NbdProtocol`, `NbdClosed`.
    pub async fn welcome(stream: S, offered: Offered) -> Result<Self> {
        let mut options = Options::greet(stream).await?;
        while !offered.answer(&mut options).await? {}
        Ok(Self {
            stream: options.into_stream(),
            size: offered.size,
        })
    }

    /// For who serves the requests by other means.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// The next request, with the cookie of its reply. A write's bytes come next.
    ///
    /// # Errors
    /// `NbdProtocol`, also for a range that the export does not have;
    /// `NbdClosed`.
    pub async fn asked(&mut self) -> Result<(u64, Asked)> {
        let mut header = [0; Request::BYTES];
        self.stream.read_exact(&mut header).await.map_err(closed)?;
        let request = Request::decode(&header);
        let request = request.ok_or_else(|| broken("a request has a wrong magic"))?;
        let (kind, cookie, length) = (request.command, request.cookie, request.length);
        let range = request.offset..request.offset.saturating_add(length);
        let writes = matches!(kind, command::WRITE | command::WRITE_ZEROES);
        if writes && (length == 0 || range.end > self.size) {
            return Err(broken(format!(
                "a write of {range:?} to {} bytes",
                self.size
            )));
        }
        let asked = match kind {
            command::WRITE if length > MAX_WRITE.into() => {
                return Err(broken(format!("a write of {length} bytes")));
            }
            command::WRITE => Asked::Write(range),
            command::WRITE_ZEROES => Asked::Zero(range),
            command::FLUSH => Asked::Flush,
            command::DISC => Asked::Goodbye,
            // Its reply would have to be structured.
            command::READ => return Err(broken("the client reads")),
            _ => {
                self.reply(cookie, EINVAL).await?;
                Asked::Other
            }
        };
        Ok((cookie, asked))
    }

    /// The bytes of a write.
    ///
    /// # Errors
    /// `NbdClosed`.
    pub async fn payload(&mut self, into: &mut [u8]) -> Result<()> {
        self.stream.read_exact(into).await.map(drop).map_err(closed)
    }

    /// The bytes of a write that nobody wants.
    ///
    /// # Errors
    /// `NbdClosed`.
    pub async fn skip(&mut self, bytes: u64) -> Result<()> {
        let mut rest = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut buffer = vec![0; rest.min(SKIP)];
        while rest > 0 {
            let some = rest.min(SKIP);
            self.payload(&mut buffer[..some]).await?;
            rest -= some;
        }
        Ok(())
    }

    /// Tells that a request is done.
    ///
    /// # Errors
    /// `NbdClosed`.
    pub async fn done(&mut self, cookie: u64) -> Result<()> {
        self.reply(cookie, 0).await
    }

    /// Tells that there is no room for a write, whose bytes have been read.
    ///
    /// # Errors
    /// `NbdClosed`.
    pub async fn refuse(&mut self, cookie: u64) -> Result<()> {
        self.reply(cookie, ENOSPC).await
    }

    async fn reply(&mut self, cookie: u64, error: u32) -> Result<()> {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        self.stream.write_all(&bytes).await.map_err(closed)?;
        self.stream.flush().await.map_err(closed)
    }
}

#[cfg(test)]
mod tests;
