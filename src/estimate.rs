//! What a backup would be, without a point in time.

use crate::error::Result;
use crate::plan::{self, DiskPlan, Wish};
use crate::qemu::Qmp;
use crate::qemu::discover::{self, Reason};
use crate::session::{new_id, now_ms};

/// What a backup of a disk would be.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// The plan.
    pub plan: DiskPlan,
    /// Most bytes that it could read.
    pub changed_bytes: u64,
    /// Bytes that it would read, by the best that can be known.
    pub read_bytes: u64,
}

/// Plans `wish` and opens nothing.
///
/// # Errors
/// Those of [`plan::plan`]; QEMU's and the monitor's.
pub async fn estimate(qmp: &Qmp, wish: &Wish) -> Result<Vec<Estimate>> {
    let mut disks = discover::disks(qmp).await?;
    for disk in &mut disks {
        // A point in time that is open now, or was left, is no matter for the next one.
        disk.excluded = disk.excluded.filter(|reason| *reason != Reason::InBackup);
    }
    let plans = plan::plan(&disks, wish, now_ms(), &new_id)?;
    Ok(plans.into_iter().map(of_disk).collect())
}

fn of_disk(plan: DiskPlan) -> Estimate {
    let disk = &plan.disk;
    let changed_bytes = plan
        .base
        .as_ref()
        .map_or(disk.size, |base| base.dirty_bytes);
    // Files hold metadata too, and may be compressed: a guess, cut to what can be.
    let allocated = disk.layers.iter().map(|layer| layer.allocated);
    let allocated = allocated.sum::<Option<u64>>().unwrap_or(disk.size);
    let read_bytes = match plan.base {
        Some(_) => changed_bytes,
        None => allocated.min(disk.size),
    };
    Estimate {
        changed_bytes,
        read_bytes,
        plan,
    }
}
