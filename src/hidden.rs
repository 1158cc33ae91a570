//! A new image, from its making to its name.
//!
//! ```text
//! hidden file made, claimed --> written by others, closed --> synced --> named, let go
//!              \__ its maker dies: removed by the next one made there
//! ```
//! It is written beside its place under a hidden name, and gets its own only when it is
//! complete and on stable storage: what looks like an image is one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::error::{Error, Kind, Result};
use crate::image::{Durable, Format, unusable, unwritable};
use crate::{file_call, file_lock, qcow2};

/// How long a file system gets to name an image that is on stable storage.
const NAMING_DEADLINE: Duration = Duration::from_secs(30);

/// The hidden name of a new image: with an id between them.
const PARTIAL_START: &str = ".qf-";
const PARTIAL_END: &str = ".partial";

/// Most entries of a directory that are looked at for hidden files.
const LOOKED_AT: usize = 10_000;

/// How long somebody may look whether a hidden file is abandoned.
const LOOKED_AT_SOON: Duration = Duration::from_millis(10);

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
    let partial = dir.join(format!("{PARTIAL_START}{id}{PARTIAL_END}"));
    let target = target.to_owned();
    let look = move || match target.symlink_metadata() {
        Ok(_) => Err(exists(&target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(partial),
        Err(error) => Err(unusable(&target, error)),
    };
    file_call::within(deadline, look).await
}

/// Makes the hidden file of `target`, for us alone: an empty image of `size` bytes that names
/// the image and format `below` it. Its file system has `deadline` to do so.
///
/// # Errors
/// Those of [`unusable`]; [`Kind::TargetTimeout`]. It may be there then; one that comes up
/// after that, or after this is dropped, is removed.
pub(crate) async fn create(
    partial: &Path,
    target: &Path,
    format: Format,
    size: u64,
    below: Option<(String, &'static str)>,
    deadline: Duration,
) -> Result<(File, Durable)> {
    let (partial, target) = (partial.to_owned(), target.to_owned());
    let given_up = CancellationToken::new();
    let _here = given_up.clone().drop_guard();
    let create = move || {
        remove_abandoned(partial.parent().unwrap_or(Path::new("/")));
        let (file, durable) = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&partial)?;
            let durable = loop {
                match Durable::of(&file, false) {
                    Err(error)
                        if error.kind() == io::ErrorKind::ResourceBusy
                            && !given_up.is_cancelled() =>
                    {
                        std::thread::sleep(LOOKED_AT_SOON);
                    }
                    claimed => break claimed?,
                }
            };
            // Before it was claimed, somebody may have taken it for abandoned.
            if file.metadata()?.nlink() > 0 {
                break (file, durable);
            }
        };
        match format {
            Format::Raw => file.set_len(size)?,
            Format::Qcow2 => {
                let below = below
                    .as_ref()
                    .map(|(name, format)| (name.as_str(), *format));
                qcow2::format(&file, size, below)?;
            }
        }
        if given_up.is_cancelled() {
            std::fs::remove_file(&partial)?;
        }
        Ok((file, durable))
    };
    let create = move || create().map_err(|error| unusable(&target, error));
    file_call::within(deadline, create).await
}

/// Removes the hidden files in `dir` whose makers have died, and that no QEMU writes: what the
/// right or the locks are missing for stays.
fn remove_abandoned(dir: &Path) {
    let Ok(entries) = dir.read_dir() else { return };
    for entry in entries.take(LOOKED_AT).flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(PARTIAL_START) || !name.ends_with(PARTIAL_END) {
            continue;
        }
        let path = entry.path();
        let removed = remove_if_abandoned(&path);
        debug!(path = %path.display(), ?removed, "a hidden file of another process");
    }
}

fn remove_if_abandoned(path: &Path) -> io::Result<bool> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    // Its maker looks again when it has the lock.
    file_lock::claim(&file)?;
    let is_abandoned = file_lock::is_abandoned(&file);
    if is_abandoned {
        std::fs::remove_file(path)?;
    }
    Ok(is_abandoned)
}

/// Gives an image that is on stable storage its name, unless something has it by now, and
/// brings the name there too. It is `claimed` until then, or the next one made there would
/// remove it.
///
/// # Errors
/// [`Kind::TargetExists`], [`Kind::TargetUnwritable`]: the hidden file may be left then, and
/// nothing at `target` but what [`Error::leftovers`] tells; [`Kind::TargetTimeout`].
pub(crate) async fn publish(claimed: Durable, partial: PathBuf, target: PathBuf) -> Result<()> {
    let left = format!("file {}: it may come up later", target.display());
    let name = move || {
        let named = name(&partial, &target);
        drop(claimed);
        named
    };
    let named = file_call::within(NAMING_DEADLINE, name).await;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[tokio::test]
    async fn a_hidden_file_is_new_and_ours_alone_and_no_link_is_followed() {
        const SOON: Duration = Duration::from_secs(20);
        let folder = tempfile::tempdir().unwrap();
        let (target, theirs) = (folder.path().join("target"), folder.path().join("theirs"));
        let partial = partial_path(&target, "x", SOON).await.unwrap();
        std::fs::write(&theirs, "precious").unwrap();
        for planted in [&theirs, &folder.path().join("nothing")] {
            symlink(planted, &partial).unwrap();
            create(&partial, &target, Format::Raw, 0, None, SOON)
                .await
                .unwrap_err();
            std::fs::remove_file(&partial).unwrap();
        }
        assert_eq!(std::fs::read(&theirs).unwrap(), b"precious");
        assert!(!folder.path().join("nothing").exists());
        let (file, durable) = create(&partial, &target, Format::Raw, 0, None, SOON)
            .await
            .unwrap();
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

    #[tokio::test]
    async fn a_hidden_file_stays_as_long_as_its_maker_lives() {
        const SOON: Duration = Duration::from_secs(20);
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        let mut made = Vec::new();
        for id in ["1", "2"] {
            let partial = partial_path(&target, id, SOON).await.unwrap();
            let (file, durable) = create(&partial, &target, Format::Raw, 0, None, SOON)
                .await
                .unwrap();
            made.push((partial, file, durable));
        }
        // What others put there, and what is no file, stays too.
        let others = [".qf-x", "x.partial", "qf-x.partial"].map(|name| folder.path().join(name));
        for other in &others {
            std::fs::write(other, "").unwrap();
        }
        symlink("target", folder.path().join(".qf-link.partial")).unwrap();
        std::fs::create_dir(folder.path().join(".qf-folder.partial")).unwrap();
        let (dead, file, durable) = made.pop().unwrap();
        durable.close().await;
        drop(file);
        remove_abandoned(folder.path());
        assert!(!dead.exists());
        assert!(made[0].0.exists() && others.iter().all(|other| other.exists()));
        assert_eq!(folder.path().read_dir().unwrap().count(), 6);
    }

    /// A cleaner that comes between the making of a file and its claim costs nothing, nor does
    /// one that comes before it has its name.
    #[tokio::test]
    async fn makers_and_cleaners_do_not_disturb_each_other() {
        const SOON: Duration = Duration::from_secs(20);
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().to_owned();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let cleaner = std::thread::spawn(move || {
            while !stopped.is_cancelled() {
                remove_abandoned(&dir);
            }
        });
        let target = folder.path().join("target");
        for id in 0..200 {
            let partial = partial_path(&target, &id.to_string(), SOON).await.unwrap();
            let (file, durable) = create(&partial, &target, Format::Qcow2, 1, None, SOON)
                .await
                .unwrap();
            drop(file);
            assert!(partial.exists());
            let durable = durable.sync(&CancellationToken::new()).await.unwrap();
            publish(durable, partial, target.clone()).await.unwrap();
            std::fs::remove_file(&target).unwrap();
        }
        stop.cancel();
        cleaner.join().unwrap();
    }
}
