//! Scratch: where QEMU keeps the old data of blocks that the guest overwrites
//! while a point in time is open.
//!
//! It is a qcow2 image without a backing image, in a file that has no name: its
//! room comes back by itself when QEMU or the session ends. Where descriptors can
//! be passed (QMP over a unix socket, to qemu-system) the file never has a name;
//! elsewhere it has one until QEMU has opened it.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::file_call::{self, Held};
use crate::file_node::{self, Way};
use crate::qemu::step::{self, Names};
use crate::qemu::{Qmp, query};
use crate::room::DEADLINE;
use crate::teardown::{Teardown, Undo};
use crate::{qcow2, room};

/// How long a file system gets to tell what a file takes: the guest may be waiting.
const LOOKED_AT_SOON: Duration = Duration::from_secs(2);

/// A disk's scratch file.
#[derive(Debug)]
pub enum Scratch {
    /// Held open to tell what it takes.
    Held(Held),
    /// Of a process that has ended: QEMU alone holds the file below this node.
    Node(String),
}

/// How much a disk's scratch may take, and where.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// The directory.
    pub dir: &'a Path,
    /// Most bytes; QEMU finds no more room then.
    pub cap: Option<u64>,
    /// Bytes to be taken beforehand; room that is given back stays with the file then.
    pub reserve: Option<u64>,
}

impl Scratch {
    /// Makes a scratch image of `size` bytes and opens it in QEMU as node
    /// [`Names::scratch`]. What it makes is on `teardown`.
    ///
    /// # Errors
    /// [`Kind::ScratchUnavailable`] when the file cannot be made, or has no room to
    /// reserve; else QEMU's.
    pub async fn open(
        qmp: &Qmp,
        names: &Names,
        size: u64,
        limits: &Limits<'_>,
        teardown: &mut Teardown,
    ) -> Result<Self> {
        let dir = limits.dir;
        let path = (!qmp.can_pass_fds()).then(|| path_of(dir, names));
        if let Some(path) = &path {
            teardown.push(Undo::File(path.clone()));
        }
        let made = make(dir.to_owned(), path.clone(), size, limits.cap).await;
        let file = made.map_err(|error| unavailable(dir, error))?;
        if let Some(bytes) = limits.reserve {
            room::reserve(&file, dir, bytes, limits.cap).await?;
        }
        let node = names.scratch_file();
        let keeps_room = limits.reserve.is_some();
        let options = |filename: &str| step::scratch_file(names, filename, keeps_room);
        let way = path.as_deref().map_or(Way::Open(&file), Way::Named);
        file_node::add(qmp, way, &names.job(), node, options, teardown).await?;
        if let Some(path) = path {
            let removed = file_call::remove(&path, |path| std::fs::remove_file(path)).await;
            removed.map_err(|error| unavailable(dir, error))?;
            teardown.forget(&Undo::File(path));
        }
        teardown.push(Undo::Node {
            node: names.scratch(),
        });
        qmp.execute_raw("blockdev-add", step::scratch(names, limits.cap))
            .await?;
        Ok(Self::Held(Held::new(file)))
    }

    /// Frees all its room: nothing reads or writes it any more.
    pub(crate) async fn empty(&self) {
        if let Self::Held(file) = self
            && let Err(error) = file.call(DEADLINE, |file| file.set_len(0)).await
        {
            tracing::warn!(error = error.chain(), "could not empty a scratch file");
        }
    }

    /// Bytes that the file takes now; 0 when that cannot be told.
    pub async fn allocated(&self, qmp: &Qmp) -> u64 {
        match self {
            Self::Held(file) => {
                let looked = file.call(LOOKED_AT_SOON, File::metadata).await;
                looked.map_or(0, |metadata| metadata.blocks().saturating_mul(512))
            }
            Self::Node(name) => {
                let nodes = query::named_block_nodes(qmp).await.unwrap_or_default();
                let node = nodes.iter().find(|node| node.node_name == *name);
                node.and_then(|node| node.image.actual_size).unwrap_or(0)
            }
        }
    }
}

fn lengthen(file: &File, length: u64) -> std::io::Result<()> {
    file.set_len(length.max(file.metadata()?.len()))
}

/// Makes an empty image, at `path` or without a name. One that comes up at `path` after this was
/// given up is removed.
async fn make(dir: PathBuf, path: Option<PathBuf>, size: u64, cap: Option<u64>) -> Result<File> {
    let given_up = CancellationToken::new();
    let _here = given_up.clone().drop_guard();
    let make = move || {
        let file = match &path {
            Some(path) => named_file(path)?,
            None => unnamed_file(&dir)?,
        };
        qcow2::format(&file, size, None)?;
        if let Some(cap) = cap {
            // QEMU opens no window beyond a file's end.
            lengthen(&file, cap)?;
        }
        if let Some(path) = path.filter(|_| given_up.is_cancelled()) {
            std::fs::remove_file(path)?;
        }
        Ok(file)
    };
    let make = move || {
        make().map_err(|error: std::io::Error| {
            Error::new(Kind::ScratchUnavailable, "making an image").because(error)
        })
    };
    file_call::within(DEADLINE, make).await
}

fn unnamed_file(dir: &Path) -> std::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // File systems without unnamed files: a name for an instant does as well.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = path_of(dir, &Names::new(&crate::session::random_id(), 0));
            let file = named_file(&path)?;
            std::fs::remove_file(path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}

fn path_of(dir: &Path, names: &Names) -> PathBuf {
    dir.join(format!("{}.scratch", names.job()))
}

fn named_file(path: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn unavailable(dir: &Path, error: Error) -> Error {
    Error::new(
        Kind::ScratchUnavailable,
        format!("making a scratch file in {}", dir.display()),
    )
    .because(error)
}
