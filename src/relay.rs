//! Bytes between QEMU and a server of the host's, both ways.
//!
//! QEMU waits for a peer that hangs whenever it has to wait for all I/O, and then its
//! guest waits too. So no such peer has a socket of QEMU's: we stand between, and let go
//! of QEMU when the peer hangs. Nothing is kept here but one buffer a direction.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Bytes of a buffer: what a unix socket takes at a time.
const BUFFER: usize = 256 * 1024;

/// A connection of any kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The sockets that are open, of the whole process: a descriptor may come twice.
static OPEN: Mutex<BTreeSet<SocketId>> = Mutex::new(BTreeSet::new());

/// What all descriptors of one socket have in common.
pub(crate) type SocketId = (u64, u64);

/// A connected socket that came from elsewhere, and is the host's until it is opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    is_unix: bool,
    id: SocketId,
}

impl Socket {
    /// Looks at a descriptor, and changes nothing of it.
    ///
    /// # Errors
    /// It is no stream socket of a unix or TCP kind.
    pub fn check(fd: OwnedFd) -> io::Result<Self> {
        let kind = rustix::net::sockopt::socket_type(&fd)?;
        let family = rustix::net::sockopt::socket_domain(&fd)?;
        if kind != SocketType::STREAM {
            return Err(io::Error::other("it is no stream socket"));
        }
        let is_unix = family == AddressFamily::UNIX;
        if !is_unix && family != AddressFamily::INET && family != AddressFamily::INET6 {
            return Err(io::Error::other("it is no unix or TCP socket"));
        }
        let stat = rustix::fs::fstat(&fd)?;
        let id = (stat.st_dev, stat.st_ino);
        Ok(Self { fd, is_unix, id })
    }

    pub(crate) fn id(&self) -> SocketId {
        self.id
    }

    /// Whether it is open already, by another descriptor.
    pub(crate) fn is_open(&self) -> bool {
        open_sockets().contains(&self.id)
    }

    /// # Errors
    /// As [`Socket::open`] where it is open already.
    pub(crate) fn check_closed(&self) -> io::Result<()> {
        if self.is_open() { Err(busy()) } else { Ok(()) }
    }

    /// Takes it over: from here on it ends with what hangs it up.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] where it is open already; the system's.
    pub fn open(self) -> io::Result<(Box<dyn Stream>, Hangup)> {
        let fd = self.fd.try_clone()?;
        if !open_sockets().insert(self.id) {
            return Err(busy());
        }
        let hangup = Hangup { fd, id: self.id };
        rustix::io::ioctl_fionbio(&self.fd, true)?;
        let stream: Box<dyn Stream> = if self.is_unix {
            Box::new(UnixStream::from_std(self.fd.into())?)
        } else {
            Box::new(TcpStream::from_std(self.fd.into())?)
        };
        Ok((stream, hangup))
    }
}

/// Hangs up when it goes: others may have descriptors of the socket, which keep it open.
#[derive(Debug)]
pub struct Hangup {
    fd: OwnedFd,
    id: SocketId,
}

impl Drop for Hangup {
    fn drop(&mut self) {
        // It fails where the other side has hung up.
        let _ended = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        open_sockets().remove(&self.id);
    }
}

fn busy() -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        "another push or export uses it",
    )
}

fn open_sockets() -> MutexGuard<'static, BTreeSet<SocketId>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries bytes between QEMU and `peer` until both have ended, or one broke.
///
/// # Errors
/// The first read or write that failed.
pub(crate) async fn relay(
    qemu: &mut (impl Stream + ?Sized),
    peer: &mut (impl Stream + ?Sized),
) -> io::Result<()> {
    let (from_qemu, to_qemu) = tokio::io::split(qemu);
    let (from_peer, to_peer) = tokio::io::split(peer);
    tokio::try_join!(carry(from_qemu, to_peer), carry(from_peer, to_qemu))?;
    Ok(())
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..bytes]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_one_says_the_other_hears_and_the_end_too() {
        let (mut qemu, mut left) = tokio::io::duplex(16);
        let (mut right, mut peer) = tokio::io::duplex(16);
        let relayed = tokio::spawn(async move { relay(&mut left, &mut right).await });
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

    /// Whoever refuses a request has not touched the host's connection.
    #[tokio::test]
    async fn a_socket_is_the_hosts_until_it_is_opened() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let copy = || Socket::check(theirs.try_clone().unwrap().into()).unwrap();
        drop(copy());
        io::Write::write_all(&mut &theirs, b"still here").unwrap();
        let mut heard = [0; 10];
        io::Read::read_exact(&mut ours, &mut heard).unwrap();
        assert_eq!(&heard, b"still here");
        drop(copy().open().unwrap());
        let error = io::Write::write_all(&mut &theirs, b"gone").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(io::Read::read(&mut ours, &mut heard).unwrap(), 0);
    }

    #[tokio::test]
    async fn a_socket_is_opened_once_at_a_time() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let copy = || Socket::check(theirs.try_clone().unwrap().into()).unwrap();
        let (mut first, hangup) = copy().open().unwrap();
        assert!(copy().is_open());
        let again = copy().open().err().unwrap();
        assert_eq!(again.kind(), io::ErrorKind::ResourceBusy);
        // Which did it no harm.
        first.write_all(b"still here").await.unwrap();
        let mut heard = [0; 10];
        io::Read::read_exact(&mut ours, &mut heard).unwrap();
        assert_eq!(&heard, b"still here");
        drop((first, hangup));
        assert!(!copy().is_open());
        copy().open().unwrap();
    }

    #[test]
    fn descriptors_that_are_no_connection() {
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for (fd, why) in [(datagram.into(), "no stream"), (file.into(), "non-socket")] {
            let error = Socket::check(fd).unwrap_err().to_string();
            assert!(error.to_lowercase().contains(why), "{error}");
        }
    }
}
