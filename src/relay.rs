//! Bytes between QEMU and a program of the host's, both ways.
//!
//! QEMU waits for a peer that hangs whenever it has to wait for all I/O, and then its
//! guest waits too. So no such peer has a socket of QEMU's: we stand between, and let go
//! of QEMU when the peer hangs. Nothing is kept here but one buffer a direction.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Bytes of a buffer: what a unix socket takes at a time.
const BUFFER: usize = 256 * 1024;

/// A connection of any kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Hangs up when it goes: others may have descriptors of the socket, which keep it open.
#[derive(Debug)]
pub struct Hangup(OwnedFd);

impl Drop for Hangup {
    fn drop(&mut self) {
        // It fails where the other side has hung up.
        let _ended = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

/// A connected socket that came from elsewhere, to be kept with what hangs it up.
///
/// # Errors
/// It is no stream socket of a unix or TCP kind.
pub fn socket(fd: OwnedFd) -> io::Result<(Box<dyn Stream>, Hangup)> {
    let kind = rustix::net::sockopt::socket_type(&fd)?;
    let family = rustix::net::sockopt::socket_domain(&fd)?;
    if kind != SocketType::STREAM {
        return Err(io::Error::other("it is no stream socket"));
    }
    let hangup = Hangup(fd.try_clone()?);
    rustix::io::ioctl_fionbio(&fd, true)?;
    if family == AddressFamily::UNIX {
        return Ok((Box::new(UnixStream::from_std(fd.into())?), hangup));
    }
    if family == AddressFamily::INET || family == AddressFamily::INET6 {
        return Ok((Box::new(TcpStream::from_std(fd.into())?), hangup));
    }
    Err(io::Error::other("it is no unix or TCP socket"))
}

/// Carries bytes between QEMU and `peer` until both have ended, or one broke. With
/// `patience`, the peer has that long to take what QEMU sent it.
///
/// # Errors
/// The first read or write that failed; `TimedOut` for a peer that takes nothing.
pub(crate) async fn relay(
    qemu: &mut (impl Stream + ?Sized),
    peer: &mut (impl Stream + ?Sized),
    patience: Option<Duration>,
) -> io::Result<()> {
    let (from_qemu, to_qemu) = tokio::io::split(qemu);
    let (from_peer, to_peer) = tokio::io::split(peer);
    tokio::try_join!(
        carry(from_qemu, to_peer, patience),
        carry(from_peer, to_qemu, None)
    )?;
    Ok(())
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    patience: Option<Duration>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return to.shutdown().await;
        }
        let mut rest = &buffer[..bytes];
        while !rest.is_empty() {
            let written = to.write(rest);
            let written = match patience {
                Some(patience) => tokio::time::timeout(patience, written).await??,
                None => written.await?,
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = &rest[written..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_one_says_the_other_hears_and_the_end_too() {
        let (mut qemu, mut left) = tokio::io::duplex(16);
        let (mut right, mut peer) = tokio::io::duplex(16);
        let relayed = tokio::spawn(async move { relay(&mut left, &mut right, None).await });
        qemu.write_all(b"question").await.unwrap();
        let mut heard = [0; 8];
        peer.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"question");
        peer.write_all(b"answer").await.unwrap();
        drop(peer);
        let mut answer = Vec::new();
        qemu.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        drop(qemu);
        relayed.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (mut qemu, mut left) = tokio::io::duplex(1024);
        let (mut right, _peer) = tokio::io::duplex(16);
        qemu.write_all(&[1; 100]).await.unwrap();
        let patience = Some(Duration::from_millis(20));
        let error = relay(&mut left, &mut right, patience).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
