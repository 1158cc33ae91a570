//! The callers of QEMU's NBD server: who is connected to its socket, as the kernel tells
//! (`proc(5)`).
//!
//! ```text
//! Num       RefCount Protocol Flags    Type St Inode Path
//! 00000000: 00000002 00000000 00010000 0001 01  4711 /run/qf-1-nbd/nbd.sock   listens
//! 00000000: 00000003 00000000 00000000 0001 03  4712 /run/qf-1-nbd/nbd.sock   was accepted
//! 00000000: 00000002 00000000 00000000 0001 02     0 /run/qf-1-nbd/nbd.sock   was not yet
//! ```
//! A connection has its listener's path for as long as the listener's process holds it, also
//! when the caller is gone. Who was not accepted does not count: QEMU does that at once, where it
//! serves that socket at all. Callers of another network namespace are not told.
//!
//! Below 8.2 a QEMU that is told to stop its server waits for a client that negotiates, and does
//! not listen to it meanwhile: it stands still for ever, and its guest with it. One who only
//! looked whether somebody listens is such a client, until QEMU has seen that he is gone.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::file_call;
use crate::qemu::{Qmp, query};

/// The first QEMU that can stop its server while a client negotiates with it: 8.2, by its commit
/// 06e0f098, "io: follow coroutine AioContext in qio\_channel\_yield()".
const STOPS_BESIDE_CALLERS: (u32, u32) = (8, 2);

/// How long callers get to be gone: QEMU gives each ten seconds to negotiate.
const DEADLINE: Duration = Duration::from_secs(20);

/// How often it is looked at meanwhile, and how long one look may take.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOK_DEADLINE: Duration = Duration::from_secs(2);

/// The kernel's table of this network namespace.
const TABLE: &str = "/proc/net/unix";

/// How much of it is read: some hundred thousand sockets.
const TABLE_BYTES: u64 = 32 * 1024 * 1024;

/// The state of a socket that is connected to another one, and a process's.
const CONNECTED: &[u8] = b"03";

/// Which field of a line tells its state.
const STATE: usize = 5;

/// Waits until nobody is connected to the server, where this QEMU needs that.
///
/// # Errors
/// [`Kind::NbdServerBusy`] while somebody stays: the server is not to be stopped;
/// [`Kind::Internal`] where the kernel does not tell.
pub(crate) async fn see_off(qmp: &Qmp, socket: &Path) -> Result<()> {
    // Whoever called before this is answered has been accepted.
    let version = query::version(qmp).await?;
    if (version.major, version.minor) >= STOPS_BESIDE_CALLERS {
        return Ok(());
    }
    let end = Instant::now() + DEADLINE;
    loop {
        let path = socket.to_owned();
        match file_call::within(LOOK_DEADLINE, move || count(&path)).await? {
            0 => return Ok(()),
            callers if Instant::now() >= end => {
                let why = format!("connections that stay: {callers}; QEMU would wait for ever");
                return Err(Error::new(Kind::NbdServerBusy, "stopping the NBD server").because(why));
            }
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// How many connections the listener of this path has.
fn count(socket: &Path) -> Result<usize> {
    let mut table = Vec::new();
    let read = File::open(TABLE).and_then(|file| file.take(TABLE_BYTES).read_to_end(&mut table));
    let unknown =
        |why: std::io::Error| Error::new(Kind::Internal, format!("reading {TABLE}")).because(why);
    if read.map_err(unknown)? as u64 == TABLE_BYTES {
        return Err(unknown(std::io::ErrorKind::FileTooLarge.into()));
    }
    let path = socket.as_os_str().as_bytes();
    let lines = table.split(|byte| *byte == b'\n');
    Ok(lines.filter(|line| is_connection(line, path)).count())
}

fn is_connection(line: &[u8], path: &[u8]) -> bool {
    let Some(before) = line.strip_suffix(path).filter(|line| line.ends_with(b" ")) else {
        return false;
    };
    let fields = before.split(|byte| *byte == b' ');
    let mut fields = fields.filter(|field| !field.is_empty());
    fields.nth(STATE) == Some(CONNECTED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn counts_what_the_listener_holds() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("one that waits.sock");
        assert_eq!(0, count(&socket).unwrap());
        let listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(0, count(&socket).unwrap(), "it listens only");
        let caller = UnixStream::connect(&socket).unwrap();
        assert_eq!(0, count(&socket).unwrap(), "not accepted yet");
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(1, count(&socket).unwrap());
        drop(caller);
        assert_eq!(
            1,
            count(&socket).unwrap(),
            "the caller is gone, its connection is not"
        );
        assert_eq!(
            0,
            count(&dir.path().join("waits.sock")).unwrap(),
            "a path's end"
        );
        drop(accepted);
        assert_eq!(0, count(&socket).unwrap());
    }

    #[test]
    fn lines_of_another_shape_are_nobodys() {
        for line in [
            "",
            "Num RefCount",
            " /a",
            "1: 2 3 4 5 /a",
            "1: 2 3 4 5 01 6 /a",
        ] {
            assert!(!is_connection(line.as_bytes(), b"/a"), "{line}");
        }
        assert!(is_connection(b"1: 2 3 4 5 03 6 /a", b"/a"));
    }
}
