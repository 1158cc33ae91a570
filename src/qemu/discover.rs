//! The disks: which there are, under which stable name, and what can be done
//! with each.
//!
//! A disk's id is, in this order: the guest device's id; the backend's name; the
//! node's name where the user gave one; the device's path. It never is a name
//! that QEMU made up (`#block123`), which changes from start to start, nor that of
//! a filter of ours: a disk keeps its id while a session is open on it.

use crate::checkpoint::Mark;
use crate::error::{Kind, Result};
use crate::qemu::layer::{Bitmap, FORMATS, Layer, layers};
use crate::qemu::query::{self, BlockDevice, BlockNode, plain_file};
use crate::qemu::{Qmp, iothread, step};

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

/// The id of a disk that has no name to go by.
const UNNAMED: &str = "unnamed";

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
    /// A point in time of ours is open on it, or was left.
    InBackup,
    /// Another image is backed by it.
    BackingNode,
    /// Another disk has the same id.
    AmbiguousId,
    /// Its image is another QEMU's: this one waits for a migration, or has ended one.
    Inactive,
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
            Self::InBackup => "in_backup",
            Self::BackingNode => "backing_node",
            Self::AmbiguousId => "ambiguous_id",
            Self::Inactive => "inactive",
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
    /// by commas. Only known after [`find_iothreads`].
    pub iothread: Option<String>,
    /// Its device stops the guest when there is no room, rather than give it an error. Only
    /// known after [`find_stops`]: until then it may stop it for reads alone.
    pub stops_when_full: bool,
    /// Of its VM and its id.
    pub owner: Mark,
    /// Its images: its own, at the node above, then those below it. Empty without a medium.
    pub layers: Vec<Layer>,
    /// Why backups leave it out.
    pub excluded: Option<Reason>,
}

impl Disk {
    /// Whether its checkpoints can be changed: also while a point in time of ours
    /// is open on it.
    #[must_use]
    pub fn is_trackable(&self) -> bool {
        matches!(self.excluded, None | Some(Reason::InBackup))
    }

    /// The dirty bitmaps of its own image.
    #[must_use]
    pub fn bitmaps(&self) -> &[Bitmap] {
        self.layers.first().map_or(&[], |layer| &layer.bitmaps)
    }
}

/// All disks of a VM, or of a storage daemon.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn disks(qmp: &Qmp) -> Result<Vec<Disk>> {
    let nodes = query::named_block_nodes(qmp).await?;
    let devices = query::block_devices(qmp).await?;
    let status = where_known(query::status(qmp).await)?;
    let vm = Vm {
        identity: identity(qmp).await?,
        nodes: &nodes,
        inactive: is_away(qmp, status.as_deref()).await?,
    };
    let mut disks: Vec<Disk> = devices
        .into_iter()
        .map(|device| vm.disk_of_device(device))
        .collect();
    // A VM without disks may have nodes that no device uses; those are no disks. Only
    // a storage daemon has no run state.
    if disks.is_empty() && status.is_none() {
        disks = nodes
            .iter()
            .filter_map(|node| vm.disk_of_node(node))
            .collect();
    }
    mark_ambiguous(&mut disks);
    Ok(disks)
}

/// Asks which iothread serves each disk: some questions a disk.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn find_iothreads(qmp: &Qmp, disks: &mut [Disk]) -> Result<()> {
    for disk in disks {
        if let Some(device) = &disk.qdev {
            disk.iothread = iothread::of_device(qmp, device).await?;
        }
    }
    Ok(())
}

/// Asks which devices stop the guest when there is no room: one question a disk that may.
///
/// # Errors
/// The monitor's.
pub async fn find_stops(qmp: &Qmp, disks: impl Iterator<Item = &mut Disk>) -> Result<()> {
    for disk in disks.filter(|disk| disk.stops_when_full) {
        let Some(device) = &disk.qdev else { continue };
        let path = query::device_path(device);
        match query::property(qmp, &path, "werror").await {
            // QEMU tells an io-status also of one that only stops for reads.
            Ok(policy) => disk.stops_when_full = policy != "report" && policy != "ignore",
            Err(error) if error.kind() == Kind::QemuRefused => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What the VM is known by: its UUID, else its name, else nothing; a storage
/// daemon has neither.
async fn identity(qmp: &Qmp) -> Result<String> {
    if let Some(uuid) = where_known(query::uuid(qmp).await)? {
        return Ok(uuid);
    }
    Ok(where_known(query::name(qmp).await)?.unwrap_or_default())
}

/// A storage daemon does not know the commands that only a VM can answer.
///
/// # Errors
/// All others.
pub fn where_known<T>(answer: Result<Option<T>>) -> Result<Option<T>> {
    match answer {
        Err(error) if query::is_unknown_command(&error) => Ok(None),
        answer => answer,
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

/// What is the same for all disks.
struct Vm<'a> {
    identity: String,
    nodes: &'a [BlockNode],
    /// The images are another QEMU's.
    inactive: bool,
}

/// Whether another QEMU may write to the images of a VM in this run state: bitmaps here
/// would not record it. From 10.0 on nodes tell it too.
async fn is_away(qmp: &Qmp, status: Option<&str>) -> Result<bool> {
    match status {
        Some("inmigrate" | "finish-migrate") => Ok(true),
        // Also after a migration that failed, if the VM was paused.
        Some("postmigrate") => Ok(query::migration(qmp).await?.as_deref() == Some("completed")),
        _ => Ok(false),
    }
}

impl Vm<'_> {
    fn disk_of_device(&self, device: BlockDevice) -> Disk {
        let BlockDevice {
            device: backend,
            qdev,
            removable,
            io_status,
            inserted,
        } = device;
        let ours = |node: &BlockNode| node.node_name.starts_with(step::PREFIX);
        let filtered = inserted.as_ref().is_some_and(ours);
        let inserted = inserted.map(|node| match under_our_filter(&node, self.nodes) {
            Some(image) if filtered => image.clone(),
            _ => node,
        });
        let given = qdev.as_deref().and_then(device_id);
        let node = inserted
            .as_ref()
            .filter(|node| !ours(node))
            .map(|node| node.node_name.as_str())
            .filter(|name| !name.starts_with('#'));
        let backend =
            Some(backend.as_str()).filter(|name| !name.is_empty() && !name.starts_with('#'));
        let id = sane(
            given
                .or(backend)
                .or(node)
                .or(qdev.as_deref())
                .unwrap_or_default(),
        );
        let excluded = match &inserted {
            _ if removable => Some(Reason::Removable),
            None => Some(Reason::NoMedium),
            Some(node) if self.inactive || node.active == Some(false) => Some(Reason::Inactive),
            _ if qdev.as_deref().is_some_and(is_firmware) => Some(Reason::UnsupportedDriver),
            Some(node) if ours(node) => Some(Reason::FilterNode),
            _ if filtered => Some(Reason::InBackup),
            Some(node) => exclude(node),
        };
        Disk {
            stops_when_full: io_status.is_some(),
            ..self.disk(id, inserted, qdev, excluded)
        }
    }

    /// A storage daemon has no devices: each image that the user named is a disk.
    fn disk_of_node(&self, node: &BlockNode) -> Option<Disk> {
        let named = !node.node_name.starts_with('#') && !node.node_name.starts_with(step::PREFIX);
        if !named || !FORMATS.contains(&node.drv.as_str()) {
            return None;
        }
        let file = plain_file(&node.file);
        let backs = self.nodes.iter().any(|above| {
            let below = above.backing_file.as_deref().map(plain_file);
            below.as_ref() == Some(&file)
        });
        let filtered = self.nodes.iter().any(|above| {
            above.drv == "copy-before-write"
                && above.node_name.starts_with(step::PREFIX)
                && above.file == node.file
        });
        let excluded = match exclude(node) {
            _ if backs => Some(Reason::BackingNode),
            _ if node.active == Some(false) => Some(Reason::Inactive),
            None if filtered => Some(Reason::InBackup),
            excluded => excluded,
        };
        Some(self.disk(sane(&node.node_name), Some(node.clone()), None, excluded))
    }

    fn disk(
        &self,
        id: String,
        node: Option<BlockNode>,
        qdev: Option<String>,
        excluded: Option<Reason>,
    ) -> Disk {
        Disk {
            owner: Mark::of(&[&self.identity, &id]),
            id,
            qdev,
            iothread: None,
            stops_when_full: false,
            excluded,
            persistent_bitmaps: node.as_ref().is_some_and(stores_bitmaps),
            layers: node
                .as_ref()
                .map_or_else(Vec::new, |node| layers(node, self.nodes)),
            file: node.as_ref().map(|node| node.file.clone()),
            size: node.as_ref().map_or(0, |node| node.image.virtual_size),
            format: node
                .as_ref()
                .map_or_else(String::new, |node| node.drv.clone()),
            node: node.map_or_else(String::new, |node| node.node_name),
        }
    }
}

/// qcow2's older form, compat=0.10, has no room for bitmaps.
fn stores_bitmaps(node: &BlockNode) -> bool {
    let special = node.image.format_specific.as_ref();
    let compat = special.and_then(|special| special.data["compat"].as_str());
    node.drv == "qcow2" && compat.is_some_and(|compat| compat != "0.10")
}

/// A board's flash, as `/machine/system.flash0`. A user's device is further down,
/// whatever its id is.
fn is_firmware(qdev: &str) -> bool {
    qdev.strip_prefix("/machine/")
        .is_some_and(|name| !name.contains('/') && name.contains("flash"))
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

/// The id in a device's path: `/machine/peripheral/ID` and what is below it, or
/// the id itself. Devices without one are `/machine/peripheral-anon/device[N]`.
fn device_id(qdev: &str) -> Option<&str> {
    match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().filter(|id| !id.is_empty()),
        None if qdev.starts_with('/') => None,
        None => Some(qdev),
    }
}

/// Whether a text could be a disk's id.
#[must_use]
pub fn is_id(text: &str) -> bool {
    sane(text) == text
}

fn sane(name: &str) -> String {
    let legal = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-');
    let name = name.trim_start_matches('/');
    // Hosts make names of files of it.
    if matches!(name, "" | "." | "..") {
        return UNNAMED.to_owned();
    }
    name.chars()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_name_that_a_host_can_use() {
        for (name, id) in [
            ("vda", "vda"),
            (
                "/machine/peripheral-anon/device[0]",
                "machine_peripheral-anon_device_0_",
            ),
            ("ä b", "__b"),
            ("", UNNAMED),
            ("/", UNNAMED),
            (".", UNNAMED),
            ("/..", UNNAMED),
            ("...", "..."),
        ] {
            assert_eq!(sane(name), id);
            assert!(is_id(id) && (name == id || !is_id(name)), "{name:?}");
        }
    }
}
