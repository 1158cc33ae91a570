//! Image files: their formats, and how what others write to them becomes durable.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::{file_call, file_lock};

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

/// What is synced when others have written a file and closed it: the file opened anew, before
/// the first write. Linux tells each opener once that written data was lost, and QEMU keeps
/// silent about it. It holds the file's lock too: QEMU's own let two write one raw image, and
/// leave it when its maker dies.
#[derive(Debug)]
pub(crate) struct Durable {
    /// `None` once it is closed.
    file: Option<File>,
}

impl Durable {
    /// Of a file that is open for writing, and that nobody has written to. `claims`, a block
    /// device only: nobody can mount it, or claim it in another way, as long as this is open.
    ///
    /// # Errors
    /// The file system's; `EBUSY` for what somebody else has claimed, or writes as we do.
    pub(crate) fn of(file: &File, claims: bool) -> io::Result<Self> {
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
        flags.set(OFlags::EXCL, claims);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(fd.into()),
            // A file that we have no right to open is the host's: QEMU's flush has to do.
            Err(_denied) if !claims => file.try_clone(),
            Err(error) => Err(error.into()),
        }?;
        file_lock::claim(&file)?;
        Ok(Self { file: Some(file) })
    }

    /// Brings the file to stable storage, which may take its time. It stays claimed as long as
    /// what is returned lives.
    ///
    /// # Errors
    /// [`Kind::TargetUnwritable`]; [`Kind::Cancelled`]: a thread goes on syncing.
    pub(crate) async fn sync(mut self, cancel: &CancellationToken) -> Result<Self> {
        let doing = "syncing an image";
        let failed = move |error| Error::new(Kind::TargetUnwritable, doing).because(error);
        let file = self.file.take();
        let synced = file_call::unbounded(move || {
            file.as_ref()
                .map_or(Ok(()), File::sync_all)
                .map_err(failed)?;
            Ok(Self { file })
        });
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, doing)),
            synced = synced => synced,
        }
    }

    /// Closes the file, which is of no more use.
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
