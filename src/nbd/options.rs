//! "Option haggling", the server's side: the greeting, and a client's options one by one.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, MAX_OPTION_REPLY, NBDMAGIC, OPTION_REPLY_MAGIC,
    option, u32_at, u64_at,
};

/// Most options of one client: programs send a handful.
pub(super) const MAX_OPTIONS: usize = 64;

/// Bytes that stand behind the answer to NBD_OPT_EXPORT_NAME, for old clients.
const ZEROES: usize = 124;

pub(super) fn broken(what: impl Into<String>) -> Error {
    Error::new(Kind::NbdProtocol, "serving an NBD client").because(what.into())
}

pub(super) fn closed(error: std::io::Error) -> Error {
    Error::new(Kind::NbdClosed, "serving an NBD client").because(error)
}

/// A client that has been greeted.
#[derive(Debug)]
pub(super) struct Options<S> {
    stream: S,
    flags: u32,
    taken: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Options<S> {
    /// Greets.
    ///
    /// # Errors
    /// [`Kind::NbdClosed`].
    pub(super) async fn greet(stream: S) -> Result<Self> {
        let mut options = Self {
            stream,
            flags: 0,
            taken: 0,
        };
        let mut greeting = NBDMAGIC.to_be_bytes().to_vec();
        greeting.extend(IHAVEOPT.to_be_bytes());
        greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        options.write(&greeting).await?;
        options.flags = u32_at(&options.read::<4>().await?, 0);
        Ok(options)
    }

    /// The next option, and its data.
    ///
    /// # Errors
    /// [`Kind::NbdProtocol`], also for one that is too long, for one too many, and for one
    /// that the client cannot be answered; [`Kind::NbdClosed`].
    pub(super) async fn next(&mut self) -> Result<(u32, Vec<u8>)> {
        if self.taken == MAX_OPTIONS {
            return Err(broken(format!("more than {MAX_OPTIONS} options")));
        }
        self.taken += 1;
        let header: [u8; 16] = self.read().await?;
        if u64_at(&header, 0) != IHAVEOPT {
            return Err(broken("an option has a wrong magic"));
        }
        let (kind, length) = (u32_at(&header, 8), u32_at(&header, 12));
        if self.flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 && kind != option::EXPORT_NAME {
            return Err(broken("the client does not speak fixed newstyle"));
        }
        if length > MAX_OPTION_REPLY {
            return Err(broken(format!("an option is {length} bytes long")));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream.read_exact(&mut data).await.map_err(closed)?;
        Ok((kind, data))
    }

    /// Replies to an option, with a type of [`crate::nbd::wire::option_reply`].
    ///
    /// # Errors
    /// [`Kind::NbdClosed`].
    pub(super) async fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let length = u32::try_from(data.len()).map_err(|error| broken(error.to_string()))?;
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for number in [option, kind, length] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(data);
        self.write(&bytes).await
    }

    /// Replies to NBD_OPT_EXPORT_NAME: the export's bytes, and transmission flags.
    ///
    /// # Errors
    /// [`Kind::NbdClosed`].
    pub(super) async fn enter(&mut self, size: u64, flags: u16) -> Result<()> {
        let mut bytes = size.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        if self.flags & u32::from(FLAG_NO_ZEROES) == 0 {
            bytes.resize(bytes.len() + ZEROES, 0);
        }
        self.write(&bytes).await
    }

    /// For who serves what follows.
    pub(super) fn into_stream(self) -> S {
        self.stream
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
