//! Scratch: where QEMU keeps the old data of blocks that the guest overwrites
//! while a point in time is open.
//!
//! It is a qcow2 image without a backing image, in a file that has no name: its
//! room comes back by itself when QEMU or the session ends. Where descriptors can
//! be passed (QMP over a unix socket, to qemu-system) the file never has a name;
//! elsewhere it has one until QEMU has opened it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Kind, Result};
use crate::file_node::{self, Way};
use crate::qemu::step::{self, Names};
use crate::qemu::{Qmp, query};
use crate::teardown::{Teardown, Undo};
use crate::{qcow2, room};

/// A disk's scratch file.
#[derive(Debug)]
pub enum Scratch {
    /// Held open to tell what it takes.
    Held(File),
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
        let (file, path) = if qmp.can_pass_fds() {
            (unnamed_file(dir)?, None)
        } else {
            let (file, path) = named_file(dir, names)?;
            teardown.push(Undo::File(path.clone()));
            (file, Some(path))
        };
        qcow2::format(&file, size, None).map_err(|error| unavailable(dir, error))?;
        if let Some(bytes) = limits.reserve {
            room::reserve(&file, dir, bytes, limits.cap).await?;
        }
        if let Some(cap) = limits.cap {
            // QEMU opens no window beyond a file's end.
            lengthen(&file, cap).map_err(|error| unavailable(dir, error))?;
        }
        let node = names.scratch_file();
        let keeps_room = limits.reserve.is_some();
        let options = |filename: &str| step::scratch_file(names, filename, keeps_room);
        let way = path.as_deref().map_or(Way::Open(&file), Way::Named);
        file_node::add(qmp, way, &names.job(), node, options, teardown).await?;
        if let Some(path) = path {
            std::fs::remove_file(&path).map_err(|error| unavailable(dir, error))?;
            teardown.forget(&Undo::File(path));
        }
        teardown.push(Undo::Node {
            node: names.scratch(),
        });
        qmp.execute_raw("blockdev-add", step::scratch(names, limits.cap))
            .await?;
        Ok(Self::Held(file))
    }

    /// Frees all its room: nothing reads or writes it any more.
    pub(crate) fn empty(&self) {
        if let Self::Held(file) = self
            && let Err(error) = file.set_len(0)
        {
            tracing::warn!(%error, "could not empty a scratch file");
        }
    }

    /// Bytes that the file takes now; 0 when that cannot be told.
    pub async fn allocated(&self, qmp: &Qmp) -> u64 {
        match self {
            Self::Held(file) => file
                .metadata()
                .map_or(0, |metadata| metadata.blocks().saturating_mul(512)),
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

fn unnamed_file(dir: &Path) -> Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // File systems without unnamed files: a name for an instant does as well.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let (file, path) = named_file(dir, &Names::new(&crate::session::random_id(), 0))?;
            std::fs::remove_file(path).map_err(|error| unavailable(dir, error))?;
            Ok(file)
        }
        Err(error) => Err(unavailable(dir, std::io::Error::from(error))),
    }
}

fn named_file(dir: &Path, names: &Names) -> Result<(File, PathBuf)> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = dir.join(format!("{}.scratch", names.job()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| unavailable(dir, error))?;
    Ok((file, path))
}

fn unavailable(dir: &Path, error: std::io::Error) -> Error {
    Error::new(
        Kind::ScratchUnavailable,
        format!("making a scratch file in {}", dir.display()),
    )
    .because(error)
}
