//! The disks: which there are, under which stable name, and what can be done
//! with each.
//!
//! A disk's id is, in this order: the guest device's id; the backend's name; the
//! node's name where the user gave one; the device's path. It never is a name
//! that QEMU made up (`#block123`), which changes from start to start, nor that of
//! a filter of ours: a disk keeps its id while a session is open on it.

use crate::error::Result;
use crate::qemu::query::{self, BlockDevice, BlockNode};
use crate::qemu::{Qmp, Refusal, iothread, step};

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
    "nfs",
    "ssh",
    "gluster",
    "http",
    "https",
    "nvme",
    "io_uring",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
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
    /// A filter lies above its image; also one of ours, of an open or lost session.
    FilterNode,
    /// Another image is backed by it.
    BackingNode,
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
            Self::BackingNode => "backing_node",
            Self::AmbiguousId => "ambiguous_id",
        }
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its stable id: letters, digits, `.`, `_`, `-`; others of QEMU's become `_`.
    pub id: String,
    /// Its root node; below filters of ours.
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
    /// The id of the iothread that serves it or its controller; several are joined
    /// by commas.
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
    let nodes = query::named_block_nodes(qmp).await?;
    let mut disks = Vec::new();
    for device in query::block_devices(qmp).await? {
        let iothread = match &device.qdev {
            Some(device) => iothread::of_device(qmp, device).await?,
            None => None,
        };
        disks.push(from_device(device, &nodes, iothread));
    }
    // A VM without disks may have nodes that no device uses; those are no disks.
    if disks.is_empty() && is_storage_daemon(qmp).await? {
        disks = nodes
            .iter()
            .filter_map(|node| from_node(node, &nodes))
            .collect();
    }
    mark_ambiguous(&mut disks);
    Ok(disks)
}

/// Only a VM has a run state.
async fn is_storage_daemon(qmp: &Qmp) -> Result<bool> {
    use std::error::Error as _;
    match query::status(qmp).await {
        Ok(_) => Ok(false),
        Err(error) => match error
            .source()
            .and_then(|source| source.downcast_ref::<Refusal>())
        {
            Some(refusal) if refusal.class == "CommandNotFound" => Ok(true),
            _ => Err(error),
        },
    }
}

/// The image under a filter of ours, which QEMU names like its image. QEMU 10.0
/// does not tell which node is whose child.
fn under_our_filter<'a>(filter: &BlockNode, nodes: &'a [BlockNode]) -> Option<&'a BlockNode> {
    let mut found = nodes.iter().filter(|node| {
        node.file == filter.file
            && !node.node_name.starts_with(step::PREFIX)
            && FORMATS.contains(&node.drv.as_str())
    });
    // Two of them would be a guess.
    found.next().filter(|_| found.next().is_none())
}

fn from_device(device: BlockDevice, nodes: &[BlockNode], iothread: Option<String>) -> Disk {
    let BlockDevice {
        device: backend,
        qdev,
        removable,
        inserted,
    } = device;
    let filtered = inserted
        .as_ref()
        .is_some_and(|node| node.node_name.starts_with(step::PREFIX));
    let inserted = match inserted {
        Some(filter) if filtered => {
            Some(under_our_filter(&filter, nodes).cloned().unwrap_or(filter))
        }
        inserted => inserted,
    };
    let given = qdev.as_deref().and_then(device_id);
    let node = inserted
        .as_ref()
        .map(|node| node.node_name.as_str())
        .filter(|name| !name.starts_with('#') && !name.starts_with(step::PREFIX));
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
        _ if qdev.as_deref().is_some_and(is_firmware) => Some(Reason::UnsupportedDriver),
        _ if filtered => Some(Reason::FilterNode),
        node => exclude(node),
    };
    disk(id, node, qdev, iothread, excluded)
}

/// A board's flash, as `/machine/system.flash0`. A user's device is further down,
/// whatever its id is.
fn is_firmware(qdev: &str) -> bool {
    qdev.strip_prefix("/machine/")
        .is_some_and(|name| !name.contains('/') && name.contains("flash"))
}

/// A storage daemon has no devices: each image that the user named is a disk.
fn from_node(node: &BlockNode, nodes: &[BlockNode]) -> Option<Disk> {
    let named = !node.node_name.starts_with('#') && !node.node_name.starts_with(step::PREFIX);
    if !named || !FORMATS.contains(&node.drv.as_str()) {
        return None;
    }
    let backs = nodes
        .iter()
        .any(|above| above.backing_file.as_ref() == Some(&node.file));
    let excluded = if backs {
        Some(Reason::BackingNode)
    } else {
        exclude(node)
    };
    Some(disk(
        sane(&node.node_name),
        node.clone(),
        None,
        None,
        excluded,
    ))
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
