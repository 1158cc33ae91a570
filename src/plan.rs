//! What a backup will do, disk by disk, and why. Pure: it sees the disks as
//! they were discovered, and changes nothing.

use crate::chain;
use crate::checkpoint::{Checkpoint, FullReason, GRANULARITY, Id, MAX_CHECKPOINTS, Name};
use crate::error::{Error, Kind, Result};
use crate::qemu::discover::Disk;

/// Most disks of one backup. QEMU has no such limit; the reply has to fit a line.
pub const MAX_DISKS: usize = 256;

/// What the host asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The chain of all checkpoints that are named here.
    pub chain: Name,
    /// The disks, in this order; `None`: all that are not excluded.
    pub disks: Option<Vec<Choice>>,
    /// The checkpoint that incrementals are relative to; `None`: full.
    pub base: Option<Name>,
    /// The checkpoint to create.
    pub checkpoint: Option<Name>,
    /// Fail where a base cannot serve, instead of going full.
    pub strict: bool,
    /// Keep what did not change since the base readable.
    pub keep_unchanged: bool,
    /// How long the session outlives its process, to be taken over: milliseconds.
    pub keep_ms: u64,
}

/// A disk that the host asks for.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Its id.
    pub disk: String,
    /// Its own base; `None`: the backup's.
    pub base: Option<Option<Name>>,
    /// The identity of the base, as the host knows it.
    pub base_id: Option<Id>,
}

/// What will be done with a disk.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The disk.
    pub disk: Disk,
    /// The base that was asked for.
    pub wanted: Option<Name>,
    /// The base; `None`: full.
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
    /// Its bitmaps, as (node, name): what changed since is what any of them holds.
    pub bitmaps: Vec<(String, String)>,
    /// Bytes that one bit stands for, of the finest of them.
    pub granularity: u64,
    /// Bytes that changed since, in whole granules.
    pub dirty_bytes: u64,
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

/// Plans a backup at `time_ms`; `new_id` makes an identity for each new checkpoint.
///
/// # Errors
/// [`Kind::UnknownDisk`], [`Kind::DiskExcluded`], [`Kind::CheckpointExists`],
/// [`Kind::TooManyCheckpoints`], [`Kind::InvalidRequest`] for no disk at all, one named
/// twice, or too many; [`Kind::BaseUnusable`] with `strict`.
pub fn plan(
    disks: &[Disk],
    wish: &Wish,
    time_ms: u64,
    new_id: &dyn Fn() -> Id,
) -> Result<Vec<DiskPlan>> {
    let named = wish.disks.as_ref();
    let ids = named.map(|named| {
        named
            .iter()
            .map(|one| one.disk.as_str())
            .collect::<Vec<_>>()
    });
    let chosen = choose(disks, ids.as_deref(), |disk| disk.excluded.is_none())?;
    if chosen.is_empty() || chosen.len() > MAX_DISKS {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because(format!(
                "a backup has 1 to {MAX_DISKS} disks, and this one {}",
                chosen.len()
            )),
        );
    }
    let plan_one = |(index, disk): (usize, &Disk)| {
        let choice = named.and_then(|named| named.get(index));
        let (base, reason) = choose_base(disks, disk, wish, choice)?;
        let checkpoint = wish.checkpoint.as_ref();
        let checkpoint =
            checkpoint.map(|name| new_checkpoint(disk, &wish.chain, name, time_ms, new_id()));
        Ok(DiskPlan {
            disk: disk.clone(),
            wanted: wanted(wish, choice).cloned(),
            base,
            reason,
            checkpoint: checkpoint.transpose()?,
        })
    };
    chosen.into_iter().enumerate().map(plan_one).collect()
}

/// The disks of these ids, in this order; without ids all that are `eligible`.
///
/// # Errors
/// [`Kind::UnknownDisk`]; [`Kind::DiskExcluded`] for one that is not eligible, or where
/// none of those that there are is;
/// [`Kind::InvalidRequest`] for one named twice.
pub fn choose<'a>(
    disks: &'a [Disk],
    ids: Option<&[&str]>,
    eligible: fn(&Disk) -> bool,
) -> Result<Vec<&'a Disk>> {
    let left_out = |error: Error, disk: &Disk| {
        let why = disk.excluded.map_or("", |reason| reason.name());
        error.because(format!("it is left out: {why}"))
    };
    let Some(ids) = ids else {
        let chosen: Vec<&Disk> = disks.iter().filter(|disk| eligible(disk)).collect();
        return match disks.first() {
            Some(first) if chosen.is_empty() => {
                let error = Error::new(Kind::DiskExcluded, "choosing the disks: there is no other");
                Err(left_out(error.on_disk(first.id.clone()), first))
            }
            _ => Ok(chosen),
        };
    };
    let mut chosen: Vec<&Disk> = Vec::new();
    for id in ids {
        let error = |kind| Error::new(kind, "choosing the disks").on_disk(*id);
        let Some(disk) = disks.iter().find(|disk| disk.id == *id) else {
            return Err(error(Kind::UnknownDisk));
        };
        if !eligible(disk) {
            return Err(left_out(error(Kind::DiskExcluded), disk));
        }
        if chosen.iter().any(|other| other.id == disk.id) {
            return Err(error(Kind::InvalidRequest).because("it is named twice"));
        }
        chosen.push(disk);
    }
    Ok(chosen)
}

fn wanted<'a>(wish: &'a Wish, choice: Option<&'a Choice>) -> Option<&'a Name> {
    match choice.and_then(|choice| choice.base.as_ref()) {
        Some(own) => own.as_ref(),
        None => wish.base.as_ref(),
    }
}

fn choose_base(
    disks: &[Disk],
    disk: &Disk,
    wish: &Wish,
    choice: Option<&Choice>,
) -> Result<(Option<Base>, Option<FullReason>)> {
    let Some(name) = wanted(wish, choice) else {
        return Ok((None, None));
    };
    let id = choice.and_then(|choice| choice.base_id.as_ref());
    match usable_base(disks, disk, &wish.chain, name, id) {
        Ok(base) => Ok((Some(base), None)),
        Err(reason) if wish.strict => {
            Err(Error::new(Kind::BaseUnusable(reason), "checking the base")
                .on_disk(disk.id.clone()))
        }
        Err(reason) => Ok((None, Some(reason))),
    }
}

fn usable_base(
    disks: &[Disk],
    disk: &Disk,
    chain: &Name,
    name: &Name,
    id: Option<&Id>,
) -> Result<Base, FullReason> {
    let Some(found) = chain::find(disk, chain, name, id) else {
        // It was there where the host knows its identity, or, on a disk that keeps
        // nothing, where another disk still has it.
        let elsewhere = || {
            disks
                .iter()
                .any(|other| chain::find(other, chain, name, None).is_some())
        };
        let lost = id.is_some() || !disk.persistent_bitmaps && elsewhere();
        return Err(if lost {
            FullReason::BitmapLost
        } else {
            FullReason::BaseMissing
        });
    };
    if let Some(reason) = found.health.full_reason() {
        return Err(reason);
    }
    let bitmaps = found.parts.iter();
    Ok(Base {
        name: name.clone(),
        bitmaps: bitmaps
            .map(|part| (part.node.to_owned(), part.bitmap.name.clone()))
            .collect(),
        granularity: found.granularity(),
        dirty_bytes: found.dirty_bytes(disk).unwrap_or(disk.size),
    })
}

/// A checkpoint that the disk can be given now.
///
/// # Errors
/// [`Kind::CheckpointExists`], [`Kind::TooManyCheckpoints`].
pub fn new_checkpoint(
    disk: &Disk,
    chain: &Name,
    name: &Name,
    time_ms: u64,
    id: Id,
) -> Result<Checkpoint> {
    let doing = "naming the new checkpoint";
    let there = chain::find(disk, chain, name, None);
    if there.is_some_and(|found| found.own.is_some()) {
        return Err(Error::new(Kind::CheckpointExists, doing)
            .because(format!("chain {chain} has a checkpoint {name}"))
            .on_disk(disk.id.clone()));
    }
    room_for_one(disk, 0)?;
    Ok(Checkpoint {
        chain: chain.clone(),
        name: name.clone(),
        size: disk.size,
        time_ms,
        id: Some(id),
        owner: disk.owner.clone(),
        image: own_image(disk)?,
    })
}

/// Whether the disk can have one checkpoint more, once it has lost `fewer`.
///
/// # Errors
/// [`Kind::TooManyCheckpoints`].
pub fn room_for_one(disk: &Disk, fewer: usize) -> Result<()> {
    let ours =
        |bitmap: &&crate::qemu::layer::Bitmap| Checkpoint::from_bitmap(&bitmap.name).is_some();
    let count = disk.bitmaps().iter().filter(ours).count();
    if count.saturating_sub(fewer) < MAX_CHECKPOINTS {
        return Ok(());
    }
    Err(Error::new(Kind::TooManyCheckpoints, "adding a checkpoint")
        .because(format!(
            "the disk has {count}, with those of other chains; the limit is {MAX_CHECKPOINTS}"
        ))
        .on_disk(disk.id.clone()))
}

/// What the disk's own image is known by.
///
/// # Errors
/// [`Kind::DiskExcluded`]: it has none.
pub fn own_image(disk: &Disk) -> Result<crate::checkpoint::Mark> {
    let none =
        || Error::new(Kind::DiskExcluded, "looking for the disk's image").on_disk(disk.id.clone());
    disk.layers
        .first()
        .map(|layer| layer.image.clone())
        .ok_or_else(none)
}
