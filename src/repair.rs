//! One call after a crash: what is of no use goes, and what is left is told.
//!
//! It removes inconsistent checkpoints of ours, for which QEMU allows nothing else,
//! and bitmaps that a session has begun and nobody will end: those whose session has
//! neither job nor node in QEMU any more. A session has its nodes before its bitmaps,
//! and loses its bitmaps last, so one that lives loses nothing by this that it would
//! not remove itself.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::chain::Scope;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::plan;
use crate::qemu::discover::{self, Disk};
use crate::qemu::layer::Bitmap;
use crate::qemu::{Qmp, query, step};

/// What has become of a disk.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// Its id.
    pub disk: String,
    /// Bitmaps that were removed.
    pub removed: Vec<String>,
    /// Bitmaps that should have gone, with the reason why they are still there.
    pub leftovers: Vec<String>,
}

/// What there was to repair.
#[derive(Clone, Debug)]
pub struct Report {
    /// All disks, as they were: what was removed is told with them.
    pub before: Vec<Disk>,
    /// The disks that were asked for.
    pub disks: Vec<Repaired>,
    /// Sessions that are open in QEMU.
    pub open: Vec<String>,
}

/// Repairs the checkpoints of a scope on these disks (`None`: all).
///
/// # Errors
/// [`Kind::UnknownDisk`](crate::Kind::UnknownDisk),
/// [`Kind::InvalidRequest`](crate::Kind::InvalidRequest); QEMU's and the monitor's.
/// What could not be removed is no error.
pub async fn repair(qmp: &Qmp, ids: Option<&[String]>, scope: &Scope) -> Result<Report> {
    let before = discover::disks(qmp).await?;
    let ids = ids.map(|ids| ids.iter().map(String::as_str).collect::<Vec<_>>());
    let chosen = plan::choose(&before, ids.as_deref(), |_| true)?;
    let open = open_sessions(qmp).await?;
    let mut removals = Vec::new();
    for disk in &chosen {
        let useless = disk
            .bitmaps()
            .iter()
            .filter(|bitmap| is_useless(bitmap, scope, &open));
        removals.extend(useless.map(|bitmap| (*disk, bitmap)));
    }
    let failed = remove(qmp, &removals).await?;
    let all = discover::disks(qmp).await?;
    let disks = chosen.iter().map(|disk| {
        let now = all.iter().find(|other| other.id == disk.id);
        let is_there = |name: &str| {
            now.is_some_and(|now| now.bitmaps().iter().any(|bitmap| bitmap.name == name))
        };
        let mine = removals.iter().filter(|(of, _)| of.id == disk.id);
        let (left, gone): (Vec<&Bitmap>, Vec<&Bitmap>) = mine
            .map(|(_, bitmap)| *bitmap)
            .partition(|bitmap| is_there(&bitmap.name));
        let why = |bitmap: &&Bitmap| {
            let failure = failed
                .iter()
                .find(|(node, name, _)| *node == disk.node && *name == bitmap.name);
            let why = failure.map_or("it is still there", |(_, _, why)| why);
            format!("{}: {why}", bitmap.name)
        };
        Repaired {
            disk: disk.id.clone(),
            removed: gone.iter().map(|bitmap| bitmap.name.clone()).collect(),
            leftovers: left.iter().map(why).collect(),
        }
    });
    Ok(Report {
        disks: disks.collect(),
        open: open.into_iter().collect(),
        before: before.clone(),
    })
}

fn is_useless(bitmap: &Bitmap, scope: &Scope, open: &BTreeSet<String>) -> bool {
    match step::session_of(&bitmap.name) {
        Some(session) => !open.contains(session),
        None => {
            bitmap.inconsistent
                && Checkpoint::from_bitmap(&bitmap.name)
                    .is_some_and(|checkpoint| scope.has(&checkpoint))
        }
    }
}

/// Sessions of which there is more than bitmaps.
async fn open_sessions(qmp: &Qmp) -> Result<BTreeSet<String>> {
    let nodes = query::named_block_nodes(qmp).await?;
    let jobs = query::jobs(qmp).await?;
    let exports = query::block_exports(qmp).await?;
    let names = nodes.into_iter().map(|node| node.node_name);
    let names = names
        .chain(jobs.into_iter().map(|job| job.id))
        .chain(exports.into_iter().map(|export| export.id));
    Ok(names
        .filter_map(|name| step::session_of(&name).map(str::to_owned))
        .collect())
}

/// Removes bitmaps, all at once; where QEMU refuses that, one by one. What it
/// refused then: (node, name, why).
async fn remove(qmp: &Qmp, removals: &[(&Disk, &Bitmap)]) -> Result<Vec<(String, String, String)>> {
    let action = |(disk, bitmap): &(&Disk, &Bitmap)| step::remove_bitmap(&disk.node, &bitmap.name);
    let actions: Vec<Value> = removals.iter().map(action).collect();
    if actions.is_empty() {
        return Ok(Vec::new());
    }
    let all = qmp
        .execute_raw("transaction", step::transaction(actions))
        .await;
    if all.is_ok() {
        return Ok(Vec::new());
    }
    let mut failed = Vec::new();
    for removal in removals {
        let one = step::transaction(vec![action(removal)]);
        if let Err(error) = qmp.execute_raw("transaction", one).await {
            let (disk, bitmap) = removal;
            failed.push((disk.node.clone(), bitmap.name.clone(), error.chain()));
        }
    }
    Ok(failed)
}
