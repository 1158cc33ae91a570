//! Room for scratch: where it may lie, whether there is enough, and how much it may take.
//!
//! What the guest overwrites while a point in time is open has to be kept. At most that is
//! all that is to be read; in practice a small part of it. So a share is asked for before
//! anything is opened, and [`crate::guard`] watches the rest.
//!
//! A disk whose device cannot stop its guest on a full disk (NVMe; `werror=report`; a
//! storage daemon's) would get an I/O error instead where QEMU cannot give up the copy (below
//! 10.1), or must not, because the host has its guests wait: for such a disk all the room that
//! it can ever need is taken beforehand, in an incremental too.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::plan::DiskPlan;
use crate::qemu::discover::Disk;
use crate::qemu::query::plain_file;
use crate::saved::SavedScratch;

/// The part of all that could be needed that has to be free: one in so many.
const SHARE: u64 = 8;

/// Least room that a disk's scratch may be given: an empty image, and some clusters.
pub const LEAST: u64 = 1024 * 1024;

/// How long a file system gets to answer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// What to do when there is no room left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// Give up the point in time of the disk that needs it: its guest goes on at once.
    #[default]
    GiveUp,
    /// Let the guest stand still until there is room.
    Wait,
}

/// What the host says of scratch.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The directory.
    pub dir: PathBuf,
    /// The host has named it.
    pub is_named: bool,
    /// Most bytes for each disk.
    pub disk_max_bytes: Option<u64>,
    /// Most bytes for all disks together.
    pub max_bytes: Option<u64>,
    /// Bytes that have to be free at the start; `None`: a share of what could be needed.
    pub min_free_bytes: Option<u64>,
    /// What to do when there is no room left.
    pub on_full: OnFull,
}

/// What there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Free bytes of the file system.
    pub free_bytes: u64,
    /// Bytes that had to be free.
    pub asked_bytes: u64,
    /// Most bytes that all disks together could ever need.
    pub most_bytes: u64,
}

impl Wish {
    /// As another process finds it.
    #[must_use]
    pub(crate) fn saved(&self) -> SavedScratch {
        SavedScratch {
            dir: self.dir.clone(),
            disk_max_bytes: self.disk_max_bytes,
            max_bytes: self.max_bytes,
            waits: self.on_full == OnFull::Wait,
        }
    }

    /// As another process left it.
    #[must_use]
    pub(crate) fn resumed(saved: &SavedScratch) -> Self {
        Self {
            dir: saved.dir.clone(),
            is_named: true,
            disk_max_bytes: saved.disk_max_bytes,
            max_bytes: saved.max_bytes,
            min_free_bytes: Some(0),
            on_full: if saved.waits {
                OnFull::Wait
            } else {
                OnFull::GiveUp
            },
        }
    }

    /// Most bytes for one disk.
    #[must_use]
    pub fn cap(&self) -> Option<u64> {
        self.disk_max_bytes.into_iter().chain(self.max_bytes).min()
    }
}

/// Most bytes that are to be read of a disk, as its scratch keeps them. It may take more: what
/// changes until the instant, and what is copied before it is given back.
#[must_use]
pub fn most_of(plan: &DiskPlan) -> u64 {
    let size = plan.disk.size;
    let base = plan.base.as_ref();
    kept(base.map_or(size, |base| base.dirty_bytes.min(size)), size)
}

/// Bytes that a disk's scratch can never exceed, whatever is to be read.
#[must_use]
pub fn all_of(disk: &Disk) -> u64 {
    kept(disk.size, disk.size)
}

/// What `data` of a disk of `size` bytes take in scratch.
fn kept(data: u64, size: u64) -> u64 {
    // Tables of qcow2: 8 bytes a cluster of 64 KiB, 2 for its count, both in whole clusters.
    data.saturating_add(size / 4096).saturating_add(LEAST)
}

/// Whether scratch may lie there, and finds room.
///
/// # Errors
/// [`Kind::ScratchUnavailable`], [`Kind::InvalidRequest`] for a limit under [`LEAST`].
pub(crate) async fn find(wish: &Wish, plans: &[DiskPlan]) -> Result<Room> {
    if wish.cap().is_some_and(|cap| cap < LEAST) {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing room for scratch")
                .because(format!("the least is {LEAST} bytes for a disk")),
        );
    }
    let each = wish.disk_max_bytes.unwrap_or(u64::MAX);
    let most = plans.iter().map(|plan| most_of(plan).min(each));
    let most = most.fold(0, u64::saturating_add);
    let most_bytes = wish.max_bytes.map_or(most, |max| most.min(max));
    let asked_bytes = wish.min_free_bytes.unwrap_or(most_bytes / SHARE);
    let images = plans
        .iter()
        .filter(|_| !wish.is_named)
        .filter_map(|plan| plan.disk.file.as_deref().map(plain_file))
        .map(PathBuf::from)
        .collect();
    let dir = wish.dir.clone();
    let looked = tokio::task::spawn_blocking(move || look(&dir, images));
    let free_bytes = match tokio::time::timeout(DEADLINE, looked).await {
        Ok(Ok(free)) => free?,
        Ok(Err(panic)) => return Err(Error::new(Kind::Internal, doing(&wish.dir)).because(panic)),
        Err(_elapsed) => return Err(unfit(&wish.dir, "its file system hangs")),
    };
    if free_bytes < asked_bytes {
        let why = format!("{free_bytes} bytes are free there, and {asked_bytes} are asked for");
        return Err(unfit(&wish.dir, why));
    }
    Ok(Room {
        free_bytes,
        asked_bytes,
        most_bytes,
    })
}

fn doing(dir: &Path) -> String {
    format!("looking for room for scratch in {}", dir.display())
}

fn unfit(dir: &Path, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::ScratchUnavailable, doing(dir)).because(why)
}

/// The free bytes of a directory where scratch may lie. `images`: beside none of them.
fn look(dir: &Path, images: Vec<PathBuf>) -> Result<u64> {
    let unusable = |error: std::io::Error| unfit(dir, error);
    let there = std::fs::metadata(dir).map_err(unusable)?;
    if !there.is_dir() {
        return Err(unfit(dir, "it is no directory"));
    }
    // Devices' nodes lie in memory: a file there would take the machine's.
    let is_dev = std::fs::metadata("/dev").is_ok_and(|dev| dev.dev() == there.dev());
    let is_root = std::fs::metadata("/").is_ok_and(|root| root.dev() == there.dev());
    if is_dev && !is_root {
        return Err(unfit(dir, "it holds the nodes of devices"));
    }
    for image in images {
        if is_beside(&image, dir, &there) {
            let why = format!(
                "the image {} lies there too: name it in the request if that is meant",
                image.display()
            );
            return Err(unfit(dir, why));
        }
    }
    let system = rustix::fs::statvfs(dir).map_err(|error| unusable(error.into()))?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

/// Whether an image lies in the directory `dir`, which is `there`: by its name, or as the file
/// that this leads to.
fn is_beside(image: &Path, dir: &Path, there: &Metadata) -> bool {
    let Some(name) = image.file_name() else {
        return false;
    };
    if image.is_relative() {
        // To a directory that only QEMU knows: a file of this name here may well be it. What is
        // no file has a colon in its name, as `nbd://` has.
        let is_file = !image.to_string_lossy().contains(':');
        return is_file && dir.join(name).symlink_metadata().is_ok();
    }
    let real = image.canonicalize().ok();
    [Some(image), real.as_deref()]
        .into_iter()
        .filter_map(|path| std::fs::metadata(path?.parent()?).ok())
        .any(|above| (above.dev(), above.ino()) == (there.dev(), there.ino()))
}

/// Takes all that a disk's scratch can ever need, so that it is never full.
///
/// # Errors
/// [`Kind::ScratchUnavailable`], also where it may not take so much.
pub(crate) async fn reserve(file: &File, dir: &Path, bytes: u64, cap: Option<u64>) -> Result<()> {
    if let Some(cap) = cap.filter(|cap| *cap < bytes) {
        return Err(unreserved(dir, bytes, format!("it may take {cap} only")));
    }
    let file = file.try_clone().map_err(|error| unfit(dir, error))?;
    let reserved = tokio::task::spawn_blocking(move || {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, bytes)
    });
    match reserved.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let why = std::io::Error::from(error).to_string();
            Err(unreserved(dir, bytes, why))
        }
        Err(panic) => Err(Error::new(Kind::Internal, doing(dir)).because(panic)),
    }
}

fn unreserved(dir: &Path, bytes: u64, why: String) -> Error {
    let needed = "the disk's device cannot stop the guest when scratch is full, and would \
                  give it an I/O error; QEMU 10.1 would not, unless it is to wait, nor would \
                  virtio-blk or virtio-scsi with werror=enospc";
    let why = format!("{bytes} bytes cannot be reserved there: {why}. They are needed: {needed}");
    unfit(dir, why)
}
