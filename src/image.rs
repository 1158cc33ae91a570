//! Image files: their formats, and how a new one comes to its name.
//!
//! A new image is written beside its place under a hidden name, and gets its own only when
//! it is complete and on stable storage: what looks like an image is one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};

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

/// The hidden name beside `target`, of the operation `id`.
///
/// # Errors
/// [`Kind::InvalidRequest`] for a path that can be no file's; [`Kind::TargetExists`].
pub(crate) fn partial_path(target: &Path, id: &str) -> Result<PathBuf> {
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
    if target.symlink_metadata().is_ok() {
        return Err(exists(target));
    }
    // Without the name, which may be as long as a name can be.
    Ok(dir.join(format!(".qf-{id}.partial")))
}

/// Makes the hidden file of `target`, for us alone.
///
/// # Errors
/// [`Kind::TargetUnwritable`].
pub(crate) fn create(partial: &Path, target: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)
        .map_err(|error| unwritable(target, error))
}

/// Gives the image its name, on stable storage, unless something has it by now.
///
/// # Errors
/// [`Kind::TargetExists`], [`Kind::TargetUnwritable`]; the hidden file is left then.
pub(crate) async fn publish(partial: PathBuf, target: PathBuf) -> Result<()> {
    // Syncing a large image takes its time, in which others must go on.
    let named = tokio::task::spawn_blocking(move || name(&partial, &target)).await;
    named.unwrap_or_else(|panic| Err(Error::new(Kind::Internal, "naming an image").because(panic)))
}

fn name(partial: &Path, target: &Path) -> Result<()> {
    let dir = target.parent().unwrap_or(Path::new("/"));
    let sync = |path: &Path| {
        File::open(path)
            .and_then(|file| file.sync_all())
            .map_err(|error| unwritable(target, error))
    };
    sync(partial)?;
    match renameat_with(CWD, partial, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => sync(dir),
        Err(Errno::EXIST) => Err(exists(target)),
        Err(error) => Err(unwritable(target, std::io::Error::from(error))),
    }
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
