//! What a backup will do, disk by disk, and why. Pure: it sees the disks as
//! they were discovered, and changes nothing.

use crate::checkpoint::{Checkpoint, FullReason, GRANULARITY, Name};
use crate::error::{Error, Kind, Result};
use crate::qemu::discover::{Bitmap, Disk};

/// Most disks of one backup. QEMU has no such limit; the reply has to fit a line.
pub const MAX_DISKS: usize = 256;

/// What the host asks for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// The disks, in this order, each with its own base (`None`: the backup's);
    /// `None`: all that are not excluded.
    pub disks: Option<Vec<(String, Option<Option<Name>>)>>,
    /// The checkpoint that incrementals are relative to; `None`: full.
    pub base: Option<Name>,
    /// The checkpoint to create.
    pub checkpoint: Option<Name>,
    /// Fail where a base cannot serve, instead of going full.
    pub strict: bool,
}

/// What will be done with a disk.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The disk.
    pub disk: Disk,
    /// The base that was asked for.
    pub wanted: Option<Name>,
    /// The bitmap of the base; `None`: full.
    pub base: Option<Base>,
    /// Why it is full although a base was asked for.
    pub reason: Option<FullReason>,
    /// The checkpoint to create.
    pub checkpoint: Option<Checkpoint>,
}

/// A base that can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The checkpoint.
    pub name: Name,
    /// Its bitmap on the disk's node.
    pub bitmap: String,
    /// Bytes that one of its bits stands for.
    pub granularity: u64,
}

impl DiskPlan {
    /// The grain of change tracking that the stream tells of.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.base
            .as_ref()
            .map_or(GRANULARITY, |base| base.granularity)
    }
}

/// Plans a backup at `time_ms`.
///
/// # Errors
/// [`Kind::UnknownDisk`], [`Kind::DiskExcluded`], [`Kind::CheckpointExists`],
/// [`Kind::InvalidRequest`] for no disk at all, one named twice, or too many;
/// [`Kind::BaseUnusable`] with `strict`.
pub fn plan(disks: &[Disk], wish: &Wish, time_ms: u64) -> Result<Vec<DiskPlan>> {
    let chosen = choose(disks, wish)?;
    if chosen.is_empty() || chosen.len() > MAX_DISKS {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because(format!(
                "a backup has 1 to {MAX_DISKS} disks, and this one {}",
                chosen.len()
            )),
        );
    }
    chosen
        .into_iter()
        .map(|(disk, wanted)| plan_disk(disk, wanted, wish, time_ms))
        .collect()
}

fn choose<'a>(disks: &'a [Disk], wish: &Wish) -> Result<Vec<(&'a Disk, Option<Name>)>> {
    let Some(named) = &wish.disks else {
        let eligible = disks.iter().filter(|disk| disk.excluded.is_none());
        return Ok(eligible.map(|disk| (disk, wish.base.clone())).collect());
    };
    let mut chosen: Vec<(&Disk, Option<Name>)> = Vec::new();
    for (id, base) in named {
        let Some(disk) = disks.iter().find(|disk| disk.id == *id) else {
            return Err(Error::new(Kind::UnknownDisk, "choosing the disks").on_disk(id.clone()));
        };
        if let Some(reason) = &disk.excluded {
            return Err(Error::new(Kind::DiskExcluded, "choosing the disks")
                .because(format!("backups leave it out: {}", reason.name()))
                .on_disk(id.clone()));
        }
        if chosen.iter().any(|(other, _)| other.id == disk.id) {
            return Err(
                Error::new(Kind::InvalidRequest, "choosing the disks: named twice")
                    .on_disk(id.clone()),
            );
        }
        chosen.push((disk, base.clone().unwrap_or_else(|| wish.base.clone())));
    }
    Ok(chosen)
}

fn plan_disk(disk: &Disk, wanted: Option<Name>, wish: &Wish, time_ms: u64) -> Result<DiskPlan> {
    if let Some(name) = &wish.checkpoint
        && find(disk, name).is_some()
    {
        return Err(
            Error::new(Kind::CheckpointExists, "naming the new checkpoint")
                .because(format!("the disk has a checkpoint {name}"))
                .on_disk(disk.id.clone()),
        );
    }
    let found = wanted.as_ref().map(|name| usable_base(disk, name));
    let (base, reason) = match found {
        None => (None, None),
        Some(Ok(base)) => (Some(base), None),
        Some(Err(reason)) if wish.strict => {
            return Err(Error::new(Kind::BaseUnusable(reason), "checking the base")
                .on_disk(disk.id.clone()));
        }
        Some(Err(reason)) => (None, Some(reason)),
    };
    let checkpoint = wish.checkpoint.clone().map(|name| Checkpoint {
        name,
        size: disk.size,
        time_ms,
    });
    Ok(DiskPlan {
        disk: disk.clone(),
        wanted,
        base,
        reason,
        checkpoint,
    })
}

/// The disk's checkpoint of that name, with its bitmap.
#[must_use]
pub fn find<'a>(disk: &'a Disk, name: &Name) -> Option<(Checkpoint, &'a Bitmap)> {
    checkpoints(disk).find(|(checkpoint, _)| checkpoint.name == *name)
}

/// All our checkpoints on the disk.
pub fn checkpoints(disk: &Disk) -> impl Iterator<Item = (Checkpoint, &Bitmap)> {
    disk.bitmaps
        .iter()
        .filter_map(|bitmap| Some((Checkpoint::from_bitmap(&bitmap.name)?, bitmap)))
}

/// Why a checkpoint cannot serve as base now; `None`: it can.
#[must_use]
pub fn unusable(disk: &Disk, checkpoint: &Checkpoint, bitmap: &Bitmap) -> Option<FullReason> {
    if bitmap.inconsistent {
        Some(FullReason::BaseInconsistent)
    } else if bitmap.busy {
        Some(FullReason::BaseBusy)
    } else if !bitmap.recording {
        Some(FullReason::BaseNotRecording)
    } else if checkpoint.size != disk.size {
        Some(FullReason::SizeChanged)
    } else {
        None
    }
}

fn usable_base(disk: &Disk, name: &Name) -> Result<Base, FullReason> {
    let (checkpoint, bitmap) = find(disk, name).ok_or(FullReason::BaseMissing)?;
    match unusable(disk, &checkpoint, bitmap) {
        Some(reason) => Err(reason),
        None => Ok(Base {
            name: name.clone(),
            bitmap: bitmap.name.clone(),
            granularity: bitmap.granularity,
        }),
    }
}
