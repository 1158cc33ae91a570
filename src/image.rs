//! Image files: their formats, and how a new one comes to its name.
//!
//! ```text
//! hidden file made --> opened anew --> written by others, closed --> synced --> named
//! ```
//! A new image is written beside its place under a hidden name, and gets its own only when
//! it is complete and on stable storage: what looks like an image is one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::file_call;

/// How long a file system gets to name an image that is on stable storage.
const NAMING_DEADLINE: Duration = Duration::from_secs(30);

/// What a qcow2 image starts with; its version comes next.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Bytes of a qcow2 header up to and with its incompatible features.
const QCOW2_HEADER: usize = 80;

/// The incompatible feature "external data file".
const DATA_FILE_BIT: u64 = 1 << 2;

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes as they are, sparse.
    Raw,
    /// QEMU's format, version 3.
    Qcow2,
}

impl Format {
    /// QEMU's name of its driver.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Whether a qcow2 image keeps its data in another file. Its header names that file, QEMU opens
/// it with the image, whatever it is, and writes there what is written to the image. An image
/// that is no qcow2 has none.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn has_data_file(image: &File) -> io::Result<bool> {
    let mut header = [0; QCOW2_HEADER];
    match image.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    }
    let features = header.last_chunk().map(|bytes| u64::from_be_bytes(*bytes));
    let version = header[..8]
        .last_chunk()
        .map(|bytes| u32::from_be_bytes(*bytes));
    Ok(header.starts_with(QCOW2_MAGIC)
        && version.is_some_and(|version| version >= 3)
        && features.is_some_and(|features| features & DATA_FILE_BIT != 0))
}

/// What is synced when others have written a file and closed it: the file opened anew, before
/// the first write. Linux tells each opener once that written data was lost, and QEMU keeps
/// silent about it.
#[derive(Debug)]
pub(crate) struct Durable {
    /// `None` once it is closed.
    file: Option<File>,
}

impl Durable {
    /// Of a file that nobody has written to. `claims`, a block device only: nobody else can
    /// mount it, or claim it in another way, as long as this is open.
    ///
    /// # Errors
    /// The file system's; `EBUSY` for what somebody else has claimed.
    pub(crate) fn of(file: &File, claims: bool) -> io::Result<Self> {
        let mut flags = OFlags::RDONLY | OFlags::CLOEXEC;
        flags.set(OFlags::EXCL, claims);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(fd.into()),
            // A file that we have no right to open is the host's: QEMU's flush has to do.
            Err(_denied) if !claims => file.try_clone(),
            Err(error) => Err(error.into()),
        };
        file.map(|file| Self { file: Some(file) })
    }

    /// Brings the file to stable storage, which may take its time, and closes it.
    ///
    /// # Errors
    /// [`Kind::TargetUnwritable`]; [`Kind::Cancelled`]: a thread goes on syncing.
    pub(crate) async fn sync(mut self, cancel: &CancellationToken) -> Result<()> {
        let doing = "syncing an image";
        let failed = move |error| Error::new(Kind::TargetUnwritable, doing).because(error);
        let file = self.file.take();
        let synced = file_call::unbounded(move || {
            file.map_or(Ok(()), |file| file.sync_all()).map_err(failed)
        });
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, doing)),
            synced = synced => synced,
        }
    }

    /// Closes the file, which is of no use.
    pub(crate) async fn close(mut self) {
        if let Some(file) = self.file.take() {
            file_call::close(file).await;
        }
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        // A call like any other: not for this thread.
        if let (Some(file), Ok(runtime)) = (self.file.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(file));
        }
    }
}

/// The hidden name beside `target`, of the operation `id`. Nothing is at `target` yet, and its
/// file system has `deadline` to say so.
///
/// # Errors
/// [`Kind::InvalidRequest`] for a path that can be no file's; [`Kind::TargetExists`]; those of
/// [`unusable`]; [`Kind::TargetTimeout`].
pub(crate) async fn partial_path(target: &Path, id: &str, deadline: Duration) -> Result<PathBuf> {
    let invalid = |why: &'static str| {
        Error::new(Kind::InvalidRequest, format!("making {}", target.display())).because(why)
    };
    if !target.is_absolute() {
        return Err(invalid("the path is not absolute"));
    }
    let (Some(dir), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(invalid("the path names no file"));
    };
    if name.to_str().is_none() {
        return Err(invalid("the name is not UTF-8"));
    }
    // Without the name, which may be as long as a name can be.
    let partial = dir.join(format!(".qf-{id}.partial"));
    let target = target.to_owned();
    let look = move || match target.symlink_metadata() {
        Ok(_) => Err(exists(&target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(partial),
        Err(error) => Err(unusable(&target, error)),
    };
    file_call::within(deadline, look).await
}

/// Makes the hidden file of `target`, for us alone, `size` bytes long; its file system has
/// `deadline` to do so.
///
/// # Errors
/// Those of [`unusable`]; [`Kind::TargetTimeout`]. It may be there then; one that comes up
/// after that, or after this is dropped, is removed.
pub(crate) async fn create(
    partial: &Path,
    target: &Path,
    size: u64,
    deadline: Duration,
) -> Result<(File, Durable)> {
    let (partial, target) = (partial.to_owned(), target.to_owned());
    let given_up = CancellationToken::new();
    let _here = given_up.clone().drop_guard();
    let create = move || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)?;
        file.set_len(size)?;
        let durable = Durable::of(&file, false)?;
        if given_up.is_cancelled() {
            std::fs::remove_file(&partial)?;
        }
        Ok((file, durable))
    };
    let create = move || create().map_err(|error| unusable(&target, error));
    file_call::within(deadline, create).await
}

/// Gives an image that is on stable storage its name, unless something has it by now, and
/// brings the name there too.
///
/// # Errors
/// [`Kind::TargetExists`], [`Kind::TargetUnwritable`]: the hidden file may be left then, and
/// nothing at `target` but what [`Error::leftovers`] tells; [`Kind::TargetTimeout`].
pub(crate) async fn publish(partial: PathBuf, target: PathBuf) -> Result<()> {
    let left = format!("file {}: it may come up later", target.display());
    let named = file_call::within(NAMING_DEADLINE, move || name(&partial, &target)).await;
    named.map_err(|error| match error.kind() {
        Kind::TargetTimeout => error.leaving(vec![left]),
        _ => error,
    })
}

fn name(partial: &Path, target: &Path) -> Result<()> {
    let renamed = renameat_with(CWD, partial, CWD, target, RenameFlags::NOREPLACE);
    let (named, is_linked) = match renamed {
        // Not every file system can, NFS for one. A link replaces nothing either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            (std::fs::hard_link(partial, target), true)
        }
        renamed => (renamed.map_err(io::Error::from), false),
    };
    named.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => exists(target),
        _ => unwritable(target, error),
    })?;
    let settle = || {
        if is_linked {
            std::fs::remove_file(partial)?;
        }
        File::open(target.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    settle().map_err(|error| {
        let error = unwritable(target, error);
        // A name that may be gone after a crash is none.
        match std::fs::remove_file(target) {
            Ok(()) => error,
            Err(kept) => error.leaving(vec![format!("file {}: {kept}", target.display())]),
        }
    })
}

fn exists(target: &Path) -> Error {
    Error::new(Kind::TargetExists, format!("making {}", target.display()))
}

/// An image that cannot be written.
pub(crate) fn unwritable(
    path: &Path,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::new(
        Kind::TargetUnwritable,
        format!("writing {}", path.display()),
    )
    .because(error)
}

/// An image that cannot be made or opened: [`Kind::TargetMismatch`] where nothing like it
/// can be there, [`Kind::TargetRefused`] without the right to it, or where it is claimed,
/// else [`Kind::TargetUnwritable`].
pub(crate) fn unusable(path: &Path, error: io::Error) -> Error {
    let kind = match Errno::from_io_error(&error) {
        Some(
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::NAMETOOLONG
            | Errno::LOOP
            | Errno::NXIO
            | Errno::NODEV
            | Errno::ROFS,
        ) => Kind::TargetMismatch,
        Some(Errno::ACCESS | Errno::PERM | Errno::BUSY | Errno::TXTBSY) => Kind::TargetRefused,
        _ => Kind::TargetUnwritable,
    };
    Error::new(kind, format!("using {}", path.display())).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn qcow2(version: u32, features: u64) -> Vec<u8> {
        let mut header = [QCOW2_MAGIC, &version.to_be_bytes()].concat();
        header.resize(QCOW2_HEADER - 8, 0);
        header.extend(features.to_be_bytes());
        header
    }

    #[test]
    fn only_the_header_of_a_qcow2_tells_of_a_data_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        for (bytes, has) in [
            (qcow2(3, 4), true),
            (qcow2(3, u64::MAX), true),
            (qcow2(3, 0), false),
            (qcow2(3, !4), false),
            // What stands there is no field of version 2.
            (qcow2(2, 4), false),
            ([&[0; 4], &qcow2(3, 4)[4..]].concat(), false),
            (qcow2(3, 4)[..79].to_vec(), false),
            (Vec::new(), false),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            let file = File::open(&path).unwrap();
            assert_eq!(has_data_file(&file).unwrap(), has, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn a_hidden_file_is_new_and_ours_alone_and_no_link_is_followed() {
        const SOON: Duration = Duration::from_secs(20);
        let folder = tempfile::tempdir().unwrap();
        let (target, theirs) = (folder.path().join("target"), folder.path().join("theirs"));
        let partial = partial_path(&target, "x", SOON).await.unwrap();
        std::fs::write(&theirs, "precious").unwrap();
        for planted in [&theirs, &folder.path().join("nothing")] {
            symlink(planted, &partial).unwrap();
            create(&partial, &target, 0, SOON).await.unwrap_err();
            std::fs::remove_file(&partial).unwrap();
        }
        assert_eq!(std::fs::read(&theirs).unwrap(), b"precious");
        assert!(!folder.path().join("nothing").exists());
        let (file, durable) = create(&partial, &target, 0, SOON).await.unwrap();
        durable.close().await;
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        // Nor when it gets its name.
        symlink(&theirs, &target).unwrap();
        let error = name(&partial, &target).unwrap_err();
        assert_eq!(error.kind(), Kind::TargetExists);
        assert_eq!(std::fs::read(&theirs).unwrap(), b"precious");
        assert!(partial.exists() && target.is_symlink());
    }
}
