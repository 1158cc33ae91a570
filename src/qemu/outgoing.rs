//! A command on its way to QEMU, sent piece by piece.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

/// The rest of one line, and the descriptor that goes with its first byte.
#[derive(Debug)]
pub(super) struct Outgoing {
    rest: VecDeque<u8>,
    fd: Option<OwnedFd>,
    flushed: bool,
}

impl Outgoing {
    pub(super) fn new(line: Vec<u8>, fd: Option<OwnedFd>) -> Self {
        Self {
            rest: line.into(),
            fd,
            flushed: false,
        }
    }

    pub(super) fn is_sent(&self) -> bool {
        self.flushed
    }

    /// Sends a piece. Cancel-safe: bytes that were not sent are still here, and so
    /// is a descriptor.
    ///
    /// `socket` is the stream under `writer`; a line with a descriptor needs it.
    pub(super) async fn send_some(
        &mut self,
        writer: &mut (impl AsyncWrite + Unpin),
        socket: Option<&UnixStream>,
    ) -> Result<()> {
        if self.rest.is_empty() {
            writer.flush().await?;
            self.flushed = true;
            return Ok(());
        }
        let length = match (&self.fd, socket) {
            (Some(fd), Some(socket)) => {
                // QEMU keeps a descriptor for the command whose bytes it came with:
                // it goes alone with the first byte, so that a partial write cannot
                // hand it to another command.
                let first = [self.rest.front().copied().unwrap_or_default()];
                send_fd(socket, &first, fd.as_fd()).await?;
                self.fd = None;
                1
            }
            (Some(_), None) => return Err(ErrorKind::Unsupported.into()),
            (None, _) => writer.write(self.rest.as_slices().0).await?,
        };
        if length == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        self.rest.drain(..length);
        Ok(())
    }
}

async fn send_fd(socket: &UnixStream, byte: &[u8], fd: BorrowedFd<'_>) -> Result<()> {
    let send = || {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Error::from(ErrorKind::InvalidInput));
        }
        let bytes = [IoSlice::new(byte)];
        rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    };
    socket.async_io(Interest::WRITABLE, send).await
}
