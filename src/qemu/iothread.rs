//! Which iothread serves a device.
//!
//! The answer decides whether an old QEMU may be asked for a backup at all: an
//! iothread that is overlooked there ends the VM. So the controllers above the
//! device are asked too: a SCSI disk has none of its own.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::qemu::{Qmp, query};

/// Buses between a device and the machine: a PCI bridge more or less is no matter.
const MAX_BUSES: usize = 8;

/// The id of the iothread of a device, which is given by its id or path; several are
/// joined by commas (`iothread-vq-mapping`, since QEMU 9.0); `None` where there is none.
///
/// # Errors
/// QEMU's other than "no such object or property"; the monitor's.
pub(super) async fn of_device(qmp: &Qmp, device: &str) -> Result<Option<String>> {
    let mut path = query::device_path(device);
    for _ in 0..MAX_BUSES {
        // What is inside of a device, as a virtio device's backend, has it above.
        for owner in lineage(&path) {
            if let Some(found) = of_object(qmp, owner).await? {
                return Ok(Some(found));
            }
        }
        match get(qmp, &path, "parent_bus").await? {
            Value::String(bus) if bus.starts_with('/') => path = bus,
            _ => return Ok(None),
        }
        // A bus is a child of its controller, which may be on a bus itself.
        match path.rsplit_once('/') {
            Some((controller, _)) if is_device(controller) => path = controller.to_owned(),
            _ => return Ok(None),
        }
    }
    Ok(None)
}

fn is_device(path: &str) -> bool {
    lineage(path).next().is_some()
}

/// The path and what it is inside of, without the machine's own containers.
fn lineage(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| Some(path.rsplit_once('/')?.0))
        .take_while(|path| path.split('/').count() > 3)
}

async fn of_object(qmp: &Qmp, path: &str) -> Result<Option<String>> {
    let one = get(qmp, path, "iothread").await?;
    // It is told as a path, `/objects/io0`; the mapping below tells ids.
    if let Some(path) = one.as_str().filter(|path| !path.is_empty()) {
        let id = path.strip_prefix("/objects/").unwrap_or(path);
        return Ok(Some(id.to_owned()));
    }
    let mapping = get(qmp, path, "iothread-vq-mapping").await?;
    let names: BTreeSet<&str> = mapping
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["iothread"].as_str())
        .collect();
    let joined = names.into_iter().collect::<Vec<_>>().join(",");
    Ok(Some(joined).filter(|names| !names.is_empty()))
}

/// The property, or null where there is none.
async fn get(qmp: &Qmp, path: &str, property: &str) -> Result<Value> {
    match query::property(qmp, path, property).await {
        Err(error) if error.kind() == Kind::QemuRefused => Ok(Value::Null),
        Err(error) => Err(Error::new(error.kind(), "looking for a disk's iothread").because(error)),
        found => found,
    }
}
