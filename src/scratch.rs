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
use std::time::Duration;

use qapi::qmp::block_resize;
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Kind, Result};
use crate::file_node::{self, Way};
use crate::qemu::step::{self, Names};
use crate::qemu::{Qmp, job, query};
use crate::room;
use crate::teardown::{Teardown, Undo};

/// How long QEMU gets to format an empty image.
const FORMAT_DEADLINE: Duration = Duration::from_secs(30);

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
        let node = names.scratch_file();
        let keeps_room = limits.reserve.is_some();
        let options = |filename: &str| step::scratch_file(names, filename, keeps_room);
        let file = if qmp.can_pass_fds() {
            let file = unnamed_file(dir)?;
            file_node::add(qmp, Way::Open(&file), &names.job(), node, options, teardown).await?;
            file
        } else {
            let (file, path) = named_file(dir, names)?;
            teardown.push(Undo::File(path.clone()));
            file_node::add(
                qmp,
                Way::Named(&path),
                &names.job(),
                node,
                options,
                teardown,
            )
            .await?;
            std::fs::remove_file(&path).map_err(|error| unavailable(dir, error))?;
            teardown.forget(&Undo::File(path));
            file
        };
        teardown.push(Undo::Job {
            id: names.create_job(),
        });
        job::run(
            qmp,
            "blockdev-create",
            step::format_scratch(names, size),
            &names.create_job(),
            FORMAT_DEADLINE,
        )
        .await?;
        teardown.forget(&Undo::Job {
            id: names.create_job(),
        });
        if let Some(bytes) = limits.reserve {
            room::reserve(&file, dir, bytes, limits.cap).await?;
        }
        if let Some(cap) = limits.cap {
            // Longer than the image is: QEMU opens no window beyond a file's end.
            let node_name = Some(names.scratch_file());
            let size = i64::try_from(cap).unwrap_or(i64::MAX);
            let device = None;
            qmp.execute(&block_resize {
                device,
                node_name,
                size,
            })
            .await?;
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
