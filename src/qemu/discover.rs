//! The disks: which there are, under which stable name, and what can be done
//! with each.
//!
//! A disk's id is, in this order: the guest device's id; the backend's name; the
//! node's name where the user gave one; the device's path. It never is a name
//! that QEMU made up (`#block123`), which changes from start to start.

use crate::error::{Error, Kind, Result};
use crate::qemu::query::{self, BlockDevice, BlockNode};
use crate::qemu::{Qmp, step};

/// Drivers of nodes that stand for a whole image.
const FORMATS: &[&str] = &[
    "raw",
    "qcow2",
    "qcow",
    "qed",
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "luks",
    "parallels",
    "bochs",
];

/// Drivers of nodes that stand for storage itself; a device may sit on one directly.
const STORAGE: &[&str] = &[
    "file",
    "host_device",
    "nbd",
    "rbd",
    "iscsi",
    "nvme",
    "io_uring",
    "virtio-blk-vhost-vdpa",
];

/// A dirty bitmap of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Changes are recorded.
    pub recording: bool,
    /// A job or an export uses it.
    pub busy: bool,
    /// The image stores it.
    pub persistent: bool,
    /// It was not stored in order, and cannot be used.
    pub inconsistent: bool,
}

/// Why backups leave a disk out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The guest can eject it.
    Removable,
    /// It is opened read-only.
    ReadOnly,
    /// Nothing is in it.
    NoMedium,
    /// It holds firmware, or is made up by QEMU.
    UnsupportedDriver,
    /// A filter lies above its image.
    FilterNode,
    /// Another disk has the same id.
    AmbiguousId,
}

impl Reason {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Removable => "removable",
            Self::ReadOnly => "read_only",
            Self::NoMedium => "no_medium",
            Self::UnsupportedDriver => "unsupported_driver",
            Self::FilterNode => "filter_node",
            Self::AmbiguousId => "ambiguous_id",
        }
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its stable id: letters, digits, `.`, `_`, `-`; others of QEMU's become `_`.
    pub id: String,
    /// Its root node.
    pub node: String,
    /// The driver of that node.
    pub format: String,
    /// What is opened, as QEMU names it.
    pub file: Option<String>,
    /// Bytes that the guest sees.
    pub size: u64,
    /// The device's id or path.
    pub qdev: Option<String>,
    /// The image stores bitmaps.
    pub persistent_bitmaps: bool,
    /// The iothread that serves it.
    pub iothread: Option<String>,
    /// Its named dirty bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// Why backups leave it out.
    pub excluded: Option<Reason>,
}

/// All disks of a VM, or of a storage daemon.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn disks(qmp: &Qmp) -> Result<Vec<Disk>> {
    let devices = query::block_devices(qmp).await?;
    let mut disks = Vec::new();
    for device in devices {
        let (mut on, mut firmware) = (None, false);
        if let Some(qdev) = &device.qdev
            && device.inserted.is_some()
        {
            let path = qom_path(qdev);
            on = iothread(qmp, &path).await?;
            let kind = property(qmp, &path, "type").await?;
            firmware = kind.is_some_and(|kind| kind.starts_with("cfi.pflash"));
        }
        disks.push(from_device(device, on, firmware));
    }
    if disks.is_empty() {
        disks = query::named_block_nodes(qmp)
            .await?
            .into_iter()
            .filter_map(from_node)
            .collect();
    }
    mark_ambiguous(&mut disks);
    Ok(disks)
}

/// The path of a device that is named by its id, as `query-block` does for some.
fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') {
        qdev.to_owned()
    } else {
        format!("/machine/peripheral/{qdev}")
    }
}

/// The iothread that serves a device; `None` where it has none, or cannot have one.
async fn iothread(qmp: &Qmp, device: &str) -> Result<Option<String>> {
    // A virtio-blk's backend is a child of the device that has the property; a
    // SCSI disk is served by its controller, of which its bus is a child.
    let bus = property(qmp, device, "parent_bus").await?;
    let controller = bus.as_deref().and_then(|bus| bus.rsplit_once('/'));
    let places = [
        device,
        device.strip_suffix("/virtio-backend").unwrap_or(device),
        controller.map_or(device, |(path, _)| path),
    ];
    for path in places {
        for name in ["iothread", "iothread-vq-mapping"] {
            if let Some(found) = property(qmp, path, name).await? {
                let id = found.strip_prefix("/objects/").unwrap_or(&found);
                return Ok(Some(id.to_owned()));
            }
        }
    }
    Ok(None)
}

/// A device's property; `None` where it has no such one.
async fn property(qmp: &Qmp, path: &str, name: &str) -> Result<Option<String>> {
    match query::property(qmp, path, name).await {
        Err(error) if error.kind() == Kind::QemuRefused => Ok(None),
        Err(error) => Err(Error::new(error.kind(), "looking at a disk's device").because(error)),
        found => found,
    }
}

fn from_device(device: BlockDevice, iothread: Option<String>, firmware: bool) -> Disk {
    let BlockDevice {
        device: backend,
        qdev,
        removable,
        inserted,
    } = device;
    let given = qdev.as_deref().and_then(device_id);
    let node = inserted
        .as_ref()
        .map(|node| node.node_name.as_str())
        .filter(|name| !name.starts_with('#'));
    let backend = Some(backend.as_str()).filter(|name| !name.is_empty() && !name.starts_with('#'));
    let id = sane(
        given
            .or(backend)
            .or(node)
            .or(qdev.as_deref())
            .unwrap_or("unnamed"),
    );
    let Some(node) = inserted else {
        return Disk {
            id,
            node: String::new(),
            format: String::new(),
            file: None,
            size: 0,
            qdev,
            persistent_bitmaps: false,
            iothread,
            bitmaps: Vec::new(),
            excluded: Some(if removable {
                Reason::Removable
            } else {
                Reason::NoMedium
            }),
        };
    };
    let excluded = match &node {
        _ if removable => Some(Reason::Removable),
        _ if firmware => Some(Reason::UnsupportedDriver),
        node => exclude(node),
    };
    disk(id, node, qdev, iothread, excluded)
}

/// A storage daemon has no devices: each image that the user named is a disk.
fn from_node(node: BlockNode) -> Option<Disk> {
    let named = !node.node_name.starts_with('#') && !node.node_name.starts_with(step::PREFIX);
    if !named || !FORMATS.contains(&node.drv.as_str()) {
        return None;
    }
    let excluded = exclude(&node);
    Some(disk(sane(&node.node_name), node, None, None, excluded))
}

fn exclude(node: &BlockNode) -> Option<Reason> {
    let driver = node.drv.as_str();
    if node.ro {
        Some(Reason::ReadOnly)
    } else if driver == "vvfat" || driver.starts_with("null") {
        Some(Reason::UnsupportedDriver)
    } else if !FORMATS.contains(&driver) && !STORAGE.contains(&driver) {
        Some(Reason::FilterNode)
    } else {
        None
    }
}

fn disk(
    id: String,
    node: BlockNode,
    qdev: Option<String>,
    iothread: Option<String>,
    excluded: Option<Reason>,
) -> Disk {
    let compat = node
        .image
        .format_specific
        .as_ref()
        .and_then(|special| special.data["compat"].as_str());
    // qcow2's older form, compat=0.10, has no room for bitmaps.
    let persistent_bitmaps = node.drv == "qcow2" && compat.is_some_and(|compat| compat != "0.10");
    let bitmaps = node.dirty_bitmaps.into_iter().filter_map(|bitmap| {
        Some(Bitmap {
            name: bitmap.name.filter(|name| !name.is_empty())?,
            count: bitmap.count,
            granularity: bitmap.granularity,
            recording: bitmap.recording,
            busy: bitmap.busy,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
        })
    });
    Disk {
        id,
        format: node.drv,
        file: Some(node.file),
        size: node.image.virtual_size,
        qdev,
        persistent_bitmaps,
        iothread,
        bitmaps: bitmaps.collect(),
        excluded,
        node: node.node_name,
    }
}

/// The id in a device's path: `/machine/peripheral/ID` and what is below it, or
/// the id itself. Devices without one are `/machine/peripheral-anon/device[N]`.
fn device_id(qdev: &str) -> Option<&str> {
    match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().filter(|id| !id.is_empty()),
        None if qdev.starts_with('/') => None,
        None => Some(qdev),
    }
}

fn sane(name: &str) -> String {
    let legal = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-');
    name.trim_start_matches('/')
        .chars()
        .map(|letter| if legal(letter) { letter } else { '_' })
        .collect()
}

/// Two disks of one id are both left out: a host could not tell them apart.
fn mark_ambiguous(disks: &mut [Disk]) {
    let ids: Vec<String> = disks.iter().map(|disk| disk.id.clone()).collect();
    for disk in disks {
        if ids.iter().filter(|id| **id == disk.id).count() > 1 {
            disk.excluded = Some(Reason::AmbiguousId);
        }
    }
}
