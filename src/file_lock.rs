//! Locks that tell who writes a file: one at a time, in all processes.
//!
//! They belong to the open file description, as QEMU's do, and lie beside those of QEMU, so
//! that neither hinders the other. Whoever dies lets go.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::io::Errno;

/// The byte that is ours; QEMU's are 100 to 107 and 200 to 207.
const OURS: libc::off_t = 300;

/// Claims a file that is open for writing, until it is closed. On a file system without
/// locks there is nobody to tell.
///
/// # Errors
/// The file system's; [`io::ErrorKind::ResourceBusy`]: another one has claimed it.
pub(crate) fn claim(file: &File) -> io::Result<()> {
    let lock = lock(OURS, 1);
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map_err(io::Error::from) {
        Ok(_) => Ok(()),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::AGAIN | Errno::ACCESS) => Err(Errno::BUSY.into()),
            Some(Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            _ => Err(error),
        },
    }
}

/// Whether nobody uses a file, neither one of us nor a QEMU: `false` where nobody can know.
pub(crate) fn is_abandoned(file: &File) -> bool {
    // To its end, and of all there will be.
    let mut found = lock(0, 0);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut found));
    asked.is_ok() && i32::from(found.l_type) == libc::F_UNLCK
}

fn lock(start: libc::off_t, length: libc::off_t) -> libc::flock {
    libc::flock {
        #[allow(clippy::cast_possible_truncation, reason = "a constant, and small")]
        l_type: libc::F_WRLCK as libc::c_short,
        #[allow(clippy::cast_possible_truncation, reason = "a constant, and small")]
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        // As the kernel wants it of these.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap()
    }

    #[test]
    fn one_at_a_time_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (first, second) = (open(&path), open(&path));
        assert!(is_abandoned(&second));
        claim(&first).unwrap();
        claim(&first).unwrap();
        assert!(is_abandoned(&first) && !is_abandoned(&second));
        let busy = claim(&second).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        assert!(is_abandoned(&second));
        claim(&second).unwrap();
    }
}
