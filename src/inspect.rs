//! What is there: a VM, its disks, and objects of ours. Changes nothing.

use crate::error::Result;
use crate::qemu::discover::{self, Disk, where_known};
use crate::qemu::{Qmp, query, step};

/// What a look at a VM, or a storage daemon, shows.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// QEMU's version, as `10.0.2`.
    pub version: String,
    /// The VM's name, where it has one.
    pub name: Option<String>,
    /// The VM's UUID, where it has one.
    pub uuid: Option<String>,
    /// QMP's run state; none in a storage daemon.
    pub status: Option<String>,
    /// All disks, also excluded ones.
    pub disks: Vec<Disk>,
    /// Temporary objects of ours, of any session, living or dead.
    pub our_objects: Vec<String>,
}

/// Looks.
///
/// # Errors
/// QEMU's and the monitor's.
pub async fn inspect(qmp: &Qmp) -> Result<Inspection> {
    let version = query::version(qmp).await?;
    let mut disks = discover::disks(qmp).await?;
    discover::find_iothreads(qmp, &mut disks).await?;
    Ok(Inspection {
        version: format!("{}.{}.{}", version.major, version.minor, version.micro),
        name: where_known(query::name(qmp).await)?,
        uuid: where_known(query::uuid(qmp).await)?,
        status: where_known(query::status(qmp).await)?,
        our_objects: our_objects(qmp, &disks).await?,
        disks,
    })
}

async fn our_objects(qmp: &Qmp, disks: &[Disk]) -> Result<Vec<String>> {
    let ours = |name: &str| name.starts_with(step::PREFIX);
    let nodes = query::named_block_nodes(qmp)
        .await?
        .into_iter()
        .map(|node| ("node", node.node_name));
    let jobs = query::jobs(qmp)
        .await?
        .into_iter()
        .map(|job| ("job", job.id));
    let exports = query::block_exports(qmp)
        .await?
        .into_iter()
        .map(|export| ("export", export.id));
    let bitmaps = disks.iter().flat_map(|disk| {
        disk.bitmaps()
            .iter()
            .map(|bitmap| ("bitmap", bitmap.name.clone()))
    });
    let all = nodes.chain(jobs).chain(exports).chain(bitmaps);
    Ok(all
        .filter(|(_, name)| ours(name))
        .map(|(kind, name)| format!("{kind} {name}"))
        .collect())
}
