//! Targets that are files or devices of this machine.
//!
//! ```text
//! new        hidden file --> formatted --> node --> closed --> synced, named
//! existing   open ----------------------> node --> closed --> synced
//! ```

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, fcntl_getfl};

use crate::error::{Error, Kind, Result};
use crate::file_node::{self, Way};
use crate::image::{self, Format};
use crate::qemu::step;
use crate::qemu::{job, note, query};
use crate::server::text;
use crate::session::random_id;
use crate::target::{Opened, Opening, refused};
use crate::teardown::{Teardown, Undo};
use crate::view::View;

/// How long QEMU gets to format an empty image.
const FORMAT_DEADLINE: Duration = Duration::from_secs(30);

/// Where an existing image is.
#[derive(Debug)]
pub enum Place {
    /// At an absolute path.
    Path(PathBuf),
    /// Open.
    File(File),
}

/// What is synced when QEMU has closed it: a file opened anew, before the first write. Linux
/// tells an opener once that written data was lost, and QEMU keeps silent about it.
#[derive(Debug)]
pub(super) struct Durable(File);

impl Durable {
    fn of(file: &File) -> std::io::Result<Self> {
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // One that we have no right to open is the host's: QEMU's flush has to do.
        again.or_else(|_denied| file.try_clone()).map(Self)
    }

    pub(super) async fn sync(self) -> std::io::Result<()> {
        let synced = tokio::task::spawn_blocking(move || self.0.sync_all()).await;
        synced.unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
    }
}

/// An increment alone is no disk: it must name what it completes.
pub(super) fn check_new(
    view: &View,
    path: &Path,
    format: Format,
    backing: Option<&(String, Format)>,
) -> Result<()> {
    let invalid = |why: &'static str| {
        Err(Error::new(Kind::InvalidRequest, "choosing the target").because(why))
    };
    match (view.is_incremental(), backing) {
        (true, None) => invalid("an incremental in a new file needs `backing`"),
        (true, Some(_)) if format == Format::Raw => {
            invalid("an incremental in a new file needs the format qcow2")
        }
        (true, Some((below, _))) => {
            let below = path.parent().unwrap_or(path).join(below);
            match std::fs::metadata(&below) {
                Ok(_) => Ok(()),
                Err(error) => Err(Error::new(
                    Kind::TargetMismatch,
                    format!("looking for the image below, {}", below.display()),
                )
                .because(error)),
            }
        }
        (false, Some(_)) => invalid("a full has no `backing`"),
        (false, None) => Ok(()),
    }
}

impl Opening<'_> {
    pub(super) async fn new_file(
        &self,
        path: PathBuf,
        format: Format,
        backing: Option<(String, Format)>,
        teardown: &mut Teardown,
    ) -> Result<Opened> {
        let partial = image::partial_path(&path, &random_id())?;
        // First, so that a file that nobody will name can be found.
        let id = self.names.partial();
        teardown.push(Undo::Object { id: id.clone() });
        note::add(self.qmp, &id, text(&partial)?).await?;
        let file = image::create(&partial, &path)?;
        teardown.push(Undo::File(partial.clone()));
        let unwritable = |error| image::unwritable(&path, error);
        let durable = Durable::of(&file).map_err(unwritable)?;
        if format == Format::Raw {
            file.set_len(self.size).map_err(unwritable)?;
        }
        self.file_node(Some(&file), &partial, false, teardown)
            .await?;
        if format == Format::Qcow2 {
            let below = backing.as_ref();
            let below = below.map(|(file, format)| (file.as_str(), format.driver()));
            let create = step::format_target(self.names, self.size, below);
            let id = self.names.format_target();
            teardown.push(Undo::Job { id: id.clone() });
            let formatted = job::run(self.qmp, "blockdev-create", create, &id, FORMAT_DEADLINE);
            formatted.await.map_err(|error| match error.kind() {
                Kind::QemuRefused => image::unwritable(&path, error),
                _ => error,
            })?;
        }
        self.image(format, None, teardown).await?;
        Ok(Opened {
            // An unwritten cluster is a hole in raw, and unallocated in qcow2.
            is_zero: true,
            durable: Some(durable),
            new: Some((partial, path)),
            ..Opened::default()
        })
    }

    pub(super) async fn existing(
        &self,
        place: Place,
        format: Format,
        is_zero: bool,
        teardown: &mut Teardown,
    ) -> Result<Opened> {
        let (mut file, path) = match place {
            Place::File(file) if !self.qmp.can_pass_fds() => {
                drop(file);
                return Err(Error::new(
                    Kind::QemuUnsupported,
                    "passing the target's descriptor to this QEMU",
                ));
            }
            Place::File(file) => (file, PathBuf::new()),
            Place::Path(path) => (open_existing(&path)?, path),
        };
        let looking = |kind| Error::new(kind, "looking at the target");
        let unreadable = |error| looking(Kind::TargetUnwritable).because(error);
        let mismatch = |why: &'static str| Err(looking(Kind::TargetMismatch).because(why));
        let kind = file.metadata().map_err(unreadable)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return mismatch("it is no regular file, and no block device");
        }
        let mode = fcntl_getfl(&file).map_err(|error| unreadable(error.into()))?;
        if mode & OFlags::ACCMODE != OFlags::RDWR {
            return mismatch("its descriptor cannot both read and write");
        }
        self.not_in_use(&file).await?;
        let durable = Durable::of(&file).map_err(unreadable)?;
        let size = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        let is_device = kind.is_block_device();
        // Devices come in sizes of their own; the disk lies at the start of a larger one.
        let part = is_device && format == Format::Raw && size > self.size;
        self.file_node(Some(&file), &path, is_device, teardown)
            .await?;
        self.image(format, part.then_some(self.size), teardown)
            .await?;
        Ok(Opened {
            is_zero,
            can_empty: format == Format::Raw && !is_device,
            durable: Some(durable),
            ..Opened::default()
        })
    }

    /// QEMU's locks do not always tell: they can be switched off.
    async fn not_in_use(&self, file: &File) -> Result<()> {
        let Some(this) = identity(file.metadata().ok()) else {
            return Ok(());
        };
        for node in query::named_block_nodes(self.qmp).await? {
            if identity(std::fs::metadata(&node.file).ok()).as_ref() == Some(&this) {
                return Err(
                    Error::new(Kind::TargetRefused, "looking at the target").because(format!(
                        "QEMU has it in use already, as node {}",
                        node.node_name
                    )),
                );
            }
        }
        Ok(())
    }

    async fn file_node(
        &self,
        file: Option<&File>,
        path: &Path,
        is_device: bool,
        teardown: &mut Teardown,
    ) -> Result<()> {
        let way = match file {
            Some(file) if self.qmp.can_pass_fds() => Way::Open(file),
            _ => Way::Named(path),
        };
        let (names, node) = (self.names, self.names.target_file());
        let options = |filename: &str| step::target_file(names, filename, is_device);
        file_node::add(self.qmp, way, &names.push(), node, options, teardown)
            .await
            .map_err(refused)
    }

    async fn image(
        &self,
        format: Format,
        size: Option<u64>,
        teardown: &mut Teardown,
    ) -> Result<()> {
        teardown.push(Undo::Node {
            node: self.names.target(),
        });
        let image = step::target_image(self.names, format.driver(), size);
        let added = self.qmp.execute_raw("blockdev-add", image).await;
        added.map(drop).map_err(refused)
    }
}

/// What two names of one file or device have in common.
fn identity(metadata: Option<std::fs::Metadata>) -> Option<(bool, u64, u64)> {
    let metadata = metadata?;
    let is_device = metadata.file_type().is_block_device();
    Some(if is_device {
        (true, metadata.rdev(), 0)
    } else {
        (false, metadata.dev(), metadata.ino())
    })
}

fn open_existing(path: &Path) -> Result<File> {
    if !path.is_absolute() {
        return Err(Error::new(Kind::InvalidRequest, "choosing the target")
            .because("its path is not absolute"));
    }
    // Not blocking: a FIFO that nobody reads would.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => Ok(File::from(fd)),
        Err(error) => Err(image::unwritable(path, std::io::Error::from(error))),
    }
}
