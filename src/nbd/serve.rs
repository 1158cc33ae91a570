//! The server's side, for one client: QEMU, when it pushes. To us, which is only writes; or
//! to another server, which answers the requests once the client is in.
//!
//! ```text
//! greeting --> options (structured replies, at most) --> GO --> requests --> goodbye
//!         \-> TLS, which we cannot look into
//! ```
//! A client that breaks the protocol, or reads, is no QEMU that pushes: the connection ends.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Error, Kind, Result};
use crate::extent::Range;
use crate::nbd::Export;
use crate::nbd::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, MAX_OPTION_REPLY, NBDMAGIC, OPTION_REPLY_MAGIC,
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command, flag, info, option, option_reply, u16_at, u32_at,
    u64_at,
};

/// Longest write that is taken.
pub(crate) const MAX_WRITE: u32 = 1024 * 1024;

/// Most options of one client: QEMU sends a handful.
const MAX_OPTIONS: usize = 64;

/// NBD's EINVAL.
const EINVAL: u32 = 22;

/// What the client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
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

fn broken(what: impl Into<String>) -> Error {
    Error::new(Kind::NbdProtocol, "serving an NBD client").because(what.into())
}

fn closed(error: std::io::Error) -> Error {
    Error::new(Kind::NbdClosed, "serving an NBD client").because(error)
}

/// What a client finds, whatever name it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    size: u64,
    flags: u16,
    /// Least, best and largest.
    blocks: [u32; 3],
    /// Replies may be structured: a write's has no structure, so it may be simple in any case.
    structured: bool,
}

impl Offered {
    /// What [`Served`] itself can serve.
    pub(crate) fn to_write(size: u64) -> Self {
        Self {
            size,
            flags: flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_WRITE_ZEROES,
            blocks: [1, 64 * 1024, MAX_WRITE],
            structured: true,
        }
    }

    /// What another server serves, with simple replies.
    pub(crate) fn of(export: &Export) -> Self {
        Self {
            size: export.size,
            flags: export.flags,
            blocks: [export.min_block, export.preferred_block, export.max_payload],
            structured: false,
        }
    }
}

/// A connection that is served.
#[derive(Debug)]
pub(crate) struct Served<S> {
    stream: S,
    offered: Offered,
}

/// Greets, and agrees to TLS, which whoever gets the stream goes on with.
///
/// # Errors
/// As of [`Served::welcome`]; a client that wants no TLS.
pub(crate) async fn welcome_tls<S>(stream: S) -> Result<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut served = Served::greet(stream, Offered::to_write(0)).await?;
    let (kind, data) = served.next_option().await?;
    if kind != option::START_TLS || !data.is_empty() {
        return Err(broken("the client does not begin with TLS"));
    }
    served.answer(kind, option_reply::ACK, &[]).await?;
    Ok(served.stream)
}

impl<S: AsyncRead + AsyncWrite + Unpin> Served<S> {
    /// Negotiates.
    ///
    /// # Errors
    /// [`Kind::NbdProtocol`], [`Kind::NbdClosed`].
    pub(crate) async fn welcome(stream: S, offered: Offered) -> Result<Self> {
        let mut served = Self::greet(stream, offered).await?;
        for _ in 0..MAX_OPTIONS {
            if served.option().await? {
                return Ok(served);
            }
        }
        Err(broken(format!("more than {MAX_OPTIONS} options")))
    }

    /// For who serves the requests by other means.
    pub(crate) fn into_stream(self) -> S {
        self.stream
    }

    async fn greet(stream: S, offered: Offered) -> Result<Self> {
        let mut served = Self { stream, offered };
        let mut greeting = NBDMAGIC.to_be_bytes().to_vec();
        greeting.extend(IHAVEOPT.to_be_bytes());
        greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        served.write(&greeting).await?;
        let flags = u32_at(&served.read::<4>().await?, 0);
        if flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
            return Err(broken("the client does not speak fixed newstyle"));
        }
        Ok(served)
    }

    async fn next_option(&mut self) -> Result<(u32, Vec<u8>)> {
        let header: [u8; 16] = self.read().await?;
        if u64_at(&header, 0) != IHAVEOPT {
            return Err(broken("an option has a wrong magic"));
        }
        let (kind, length) = (u32_at(&header, 8), u32_at(&header, 12));
        if length > MAX_OPTION_REPLY {
            return Err(broken(format!("an option is {length} bytes long")));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream.read_exact(&mut data).await.map_err(closed)?;
        Ok((kind, data))
    }

    /// One option; whether transmission begins.
    async fn option(&mut self) -> Result<bool> {
        let (kind, data) = self.next_option().await?;
        match kind {
            option::GO => {
                let mut export = info::EXPORT.to_be_bytes().to_vec();
                export.extend(self.offered.size.to_be_bytes());
                export.extend(self.offered.flags.to_be_bytes());
                self.answer(kind, option_reply::INFO, &export).await?;
                let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
                for bytes in self.offered.blocks {
                    blocks.extend(bytes.to_be_bytes());
                }
                self.answer(kind, option_reply::INFO, &blocks).await?;
                self.answer(kind, option_reply::ACK, &[]).await?;
                Ok(true)
            }
            option::STRUCTURED_REPLY if self.offered.structured && data.is_empty() => {
                self.answer(kind, option_reply::ACK, &[]).await?;
                Ok(false)
            }
            option::ABORT | option::EXPORT_NAME => {
                Err(broken("the client gives up, or speaks an old style"))
            }
            _ => {
                self.answer(kind, option_reply::ERR_UNSUP, &[]).await?;
                Ok(false)
            }
        }
    }

    async fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let length = u32::try_from(data.len()).map_err(|error| broken(error.to_string()))?;
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for number in [option, kind, length] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(data);
        self.write(&bytes).await
    }

    /// The next request, with the cookie of its reply. A write's bytes come next.
    ///
    /// # Errors
    /// [`Kind::NbdProtocol`], also for a range that the export does not have;
    /// [`Kind::NbdClosed`].
    pub(crate) async fn asked(&mut self) -> Result<(u64, Asked)> {
        let header: [u8; 28] = self.read().await?;
        if u32_at(&header, 0) != REQUEST_MAGIC {
            return Err(broken("a request has a wrong magic"));
        }
        let (kind, cookie, start) = (u16_at(&header, 6), u64_at(&header, 8), u64_at(&header, 16));
        let length = u32_at(&header, 24);
        let range = start..start.saturating_add(length.into());
        let writes = matches!(kind, command::WRITE | command::WRITE_ZEROES);
        if writes && (length == 0 || range.end > self.offered.size) {
            return Err(broken(format!(
                "a write of {range:?} to {} bytes",
                self.offered.size
            )));
        }
        let asked = match kind {
            command::WRITE if length > MAX_WRITE => {
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
    /// [`Kind::NbdClosed`].
    pub(crate) async fn payload(&mut self, into: &mut [u8]) -> Result<()> {
        self.stream.read_exact(into).await.map(drop).map_err(closed)
    }

    /// Tells that a request is done.
    ///
    /// # Errors
    /// [`Kind::NbdClosed`].
    pub(crate) async fn done(&mut self, cookie: u64) -> Result<()> {
        self.reply(cookie, 0).await
    }

    async fn reply(&mut self, cookie: u64, error: u32) -> Result<()> {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        self.write(&bytes).await
    }

    async fn read<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.map_err(closed)?;
        Ok(bytes)
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(closed)?;
        self.stream.flush().await.map_err(closed)
    }
}

#[cfg(test)]
mod tests;
