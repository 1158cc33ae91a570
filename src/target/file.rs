//! Targets that are files or devices of this machine.
//!
//! ```text
//! new        hidden file --> formatted --> node --> closed --> synced, named
//! existing   open ----------------------> node --> closed --> synced
//! ```

use std::fs::{File, Metadata};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fcntl_getfl};

use crate::error::{Error, Kind, Result};
use crate::file_node::{self, Way};
use crate::hidden;
use crate::image::{self, Durable, Format};
use crate::qemu::step;
use crate::qemu::{note, query};
use crate::server::text;
use crate::session::random_id;
use crate::target::{DATA_ELSEWHERE, Opened, Opening, refused};
use crate::teardown::{Teardown, Undo};
use crate::{file_call, qcow2};

/// Where an existing image is.
#[derive(Debug)]
pub enum Place {
    /// At an absolute path.
    Path(PathBuf),
    /// Open.
    File(File),
}

/// An existing image or device, open.
struct Found {
    file: File,
    durable: Durable,
    identity: Identity,
    size: u64,
    is_device: bool,
}

impl Opening<'_> {
    /// A call to a file system, which may hang.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.unless_cancelled(file_call::within(self.timeout, call))
            .await
    }

    /// An increment alone is no disk: it must name what it completes.
    pub(super) async fn check_new(
        &self,
        path: &Path,
        format: Format,
        backing: Option<&(String, Format)>,
    ) -> Result<()> {
        let invalid = |why: &'static str| {
            Err(Error::new(Kind::InvalidRequest, "choosing the target").because(why))
        };
        match (self.is_incremental, backing) {
            (true, None) => invalid("an incremental in a new file needs `backing`"),
            (true, Some(_)) if format == Format::Raw => {
                invalid("an incremental in a new file needs the format qcow2")
            }
            (true, Some((below, _))) => {
                let below = path.parent().unwrap_or(path).join(below);
                let look = move || match std::fs::metadata(&below) {
                    Ok(_) => Ok(()),
                    Err(error) => Err(image::unusable(&below, error)),
                };
                self.call(look).await
            }
            (false, Some(_)) => invalid("a full has no `backing`"),
            (false, None) => Ok(()),
        }
    }

    pub(super) async fn new_file(
        &self,
        path: PathBuf,
        format: Format,
        backing: Option<(String, Format)>,
        teardown: &mut Teardown,
    ) -> Result<Opened> {
        let id = random_id();
        let partial = hidden::partial_path(&path, &id, self.timeout);
        let partial = self.unless_cancelled(partial).await?;
        // First, so that a file that nobody will name can be found.
        let id = self.names.partial();
        teardown.push(Undo::Object { id: id.clone() });
        note::add(self.qmp, &id, text(&partial)?).await?;
        teardown.push(Undo::File(partial.clone()));
        let below = backing.map(|(file, format)| (file, format.driver()));
        let created = hidden::create(&partial, &path, format, self.size, below, self.timeout);
        let (file, durable) = self.unless_cancelled(created).await?;
        let added = self.file_node(&file, &partial, false, teardown).await;
        file_call::close(file).await;
        added?;
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
        if matches!(place, Place::File(_)) && !self.qmp.can_pass_fds() {
            return Err(Error::new(
                Kind::QemuUnsupported,
                "passing the target's descriptor to this QEMU",
            ));
        }
        let path = match &place {
            Place::Path(path) if !path.is_absolute() => {
                return Err(Error::new(Kind::InvalidRequest, "choosing the target")
                    .because("its path is not absolute"));
            }
            Place::Path(path) => path.clone(),
            Place::File(_) => PathBuf::new(),
        };
        let Found {
            file,
            durable,
            identity,
            size,
            is_device,
        } = self.call(move || find(place, format)).await?;
        // Devices come in sizes of their own; the disk lies at the start of a larger one.
        let part = is_device && format == Format::Raw && size > self.size;
        let added = async {
            self.not_in_use(identity).await?;
            self.file_node(&file, &path, is_device, teardown).await?;
            let part = part.then_some(self.size);
            self.image(format, part, teardown).await
        };
        let added = added.await;
        file_call::close(file).await;
        let opened = Opened {
            is_zero,
            can_empty: format == Format::Raw && !is_device,
            durable: Some(durable),
            ..Opened::default()
        };
        match added {
            Ok(()) => Ok(opened),
            Err(error) => {
                opened.discard().await;
                Err(error)
            }
        }
    }

    /// QEMU's locks do not always tell: they can be switched off.
    async fn not_in_use(&self, identity: Identity) -> Result<()> {
        let mut nodes = query::named_block_nodes(self.qmp).await?.into_iter();
        let is_it = move |metadata: Metadata| Identity::of(&metadata) == identity;
        let look = move || Ok(nodes.find(|node| std::fs::metadata(&node.file).is_ok_and(is_it)));
        match self.call(look).await? {
            None => Ok(()),
            Some(node) => Err(
                Error::new(Kind::TargetRefused, "looking at the target").because(format!(
                    "QEMU has it in use already, as node {}",
                    node.node_name
                )),
            ),
        }
    }

    async fn file_node(
        &self,
        file: &File,
        path: &Path,
        is_device: bool,
        teardown: &mut Teardown,
    ) -> Result<()> {
        let way = if self.qmp.can_pass_fds() {
            Way::Open(file)
        } else {
            Way::Named(path)
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
#[derive(Clone, Copy, PartialEq, Eq)]
enum Identity {
    Device(u64),
    File(u64, u64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File(metadata.dev(), metadata.ino())
        }
    }
}

/// Opens an existing image or device, and claims a device. One that came open is the host's to
/// claim.
fn find(place: Place, format: Format) -> Result<Found> {
    let (mut file, path) = match place {
        Place::Path(path) => (open(&path)?, Some(path)),
        Place::File(file) => (file, None),
    };
    let shown = path.as_deref().unwrap_or(Path::new("the descriptor"));
    let unusable = |error| image::unusable(shown, error);
    let metadata = file.metadata().map_err(unusable)?;
    let is_device = metadata.file_type().is_block_device();
    if !is_device && !metadata.is_file() {
        return mismatch("it is no regular file, and no block device");
    }
    let mode = fcntl_getfl(&file).map_err(|error| unusable(error.into()))?;
    if mode & OFlags::ACCMODE != OFlags::RDWR {
        return mismatch("its descriptor cannot both read and write");
    }
    if format == Format::Qcow2 && qcow2::has_data_file(&file).map_err(unusable)? {
        return mismatch(DATA_ELSEWHERE);
    }
    Ok(Found {
        identity: Identity::of(&metadata),
        durable: Durable::of(&file, is_device && path.is_some()).map_err(unusable)?,
        size: file.seek(SeekFrom::End(0)).map_err(unusable)?,
        file,
        is_device,
    })
}

fn open(path: &Path) -> Result<File> {
    let unusable = |error| image::unusable(path, error);
    let kind = std::fs::metadata(path).map_err(unusable)?.file_type();
    // To open anything else may wait, or do something.
    if !kind.is_file() && !kind.is_block_device() {
        return mismatch("it is no regular file, and no block device");
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => Ok(File::from(fd)),
        Err(error) => Err(unusable(error.into())),
    }
}

fn mismatch<T>(why: &'static str) -> Result<T> {
    Err(Error::new(Kind::TargetMismatch, "looking at the target").because(why))
}
