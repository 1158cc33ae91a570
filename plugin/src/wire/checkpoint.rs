//! Checkpoints between the wire's words and the engine's.

use qemu_fleece_engine::chain::{self, Entry, Found, Scope};
use qemu_fleece_engine::checkpoint::{Checkpoint, Health as EngineHealth};
use qemu_fleece_engine::manage::Listed;
use qemu_fleece_engine::qemu::discover::Disk;
use qemu_fleece_engine::qemu::layer::Bitmap;
use qemu_fleece_engine::redefine::{self, Word};
use qemu_fleece_engine::repair::{Repaired, Report};
use qemu_fleece_protocol::checkpoint::{
    Changed, ChangedWord, CheckpointInfo, DiskCheckpoints, DisksResult, Health, RedefineDisk,
    RepairResult, RepairedDisk,
};
use qemu_fleece_protocol::{Code, MAX_EXTENTS, WireError};

use super::{from_id, id, to_tracking};

/// The host's word on a disk.
pub(crate) fn from_word(word: RedefineDisk) -> Result<Word, WireError> {
    let invalid = |why: String| {
        let mut error = WireError::new(Code::InvalidParams, why);
        error.data.disk = Some(word.disk.clone());
        error
    };
    let changed = match &word.changed {
        Changed::Word(ChangedWord::All) => redefine::Changed::All,
        Changed::Word(ChangedWord::Recorded) => redefine::Changed::Recorded,
        Changed::Extents(extents) if extents.len() > MAX_EXTENTS => {
            return Err(invalid(format!("there are more than {MAX_EXTENTS} ranges")));
        }
        Changed::Extents(extents) => {
            let range = |(offset, length): &(u64, u64)| {
                let end = offset.checked_add(*length);
                let end =
                    end.ok_or_else(|| invalid(format!("no disk reaches to {offset} + {length}")));
                Ok(*offset..end?)
            };
            let ranges = extents.iter().map(range).collect::<Result<_, WireError>>();
            redefine::Changed::Ranges(ranges?)
        }
    };
    Ok(Word {
        id: word.id.as_deref().map(from_id).transpose()?,
        time_ms: word.time_ms,
        changed,
        disk: word.disk,
    })
}

fn to_health(health: EngineHealth) -> Health {
    match health {
        EngineHealth::Usable => Health::Usable,
        EngineHealth::Inconsistent => Health::Inconsistent,
        EngineHealth::Missing => Health::Missing,
        EngineHealth::NotRecording => Health::NotRecording,
        EngineHealth::Gap => Health::Gap,
        EngineHealth::Foreign => Health::Foreign,
        EngineHealth::SizeChanged => Health::SizeChanged,
        EngineHealth::OnBackingImage => Health::OnBackingImage,
        EngineHealth::Mismatch => Health::Mismatch,
        EngineHealth::Busy => Health::Busy,
    }
}

/// A checkpoint of which nothing is known but its name.
fn bare(name: &str, health: Health) -> CheckpointInfo {
    CheckpointInfo {
        checkpoint: name.to_owned(),
        health,
        chain: None,
        id: None,
        time_ms: None,
        dirty_bytes: None,
        granularity: None,
        persistent: None,
        recording: None,
        memory_bytes: None,
    }
}

fn of_checkpoint(checkpoint: &Checkpoint, health: Health) -> CheckpointInfo {
    CheckpointInfo {
        chain: Some(checkpoint.chain.to_string()),
        id: id(checkpoint),
        time_ms: Some(checkpoint.time_ms),
        ..bare(checkpoint.name.as_str(), health)
    }
}

fn with_bitmap(info: CheckpointInfo, disk: &Disk, bitmap: &Bitmap) -> CheckpointInfo {
    CheckpointInfo {
        dirty_bytes: (!bitmap.inconsistent).then_some(bitmap.count.min(disk.size)),
        granularity: Some(bitmap.granularity),
        persistent: Some(bitmap.persistent),
        recording: Some(bitmap.recording),
        memory_bytes: Some(disk.size.div_ceil(bitmap.granularity.max(1)).div_ceil(8)),
        ..info
    }
}

fn to_found(disk: &Disk, found: &Found<'_>) -> CheckpointInfo {
    let info = of_checkpoint(&found.checkpoint, to_health(found.health));
    let bitmap = found.own.or(found.parts.first().map(|part| part.bitmap));
    let info = match bitmap {
        Some(bitmap) => with_bitmap(info, disk, bitmap),
        None => info,
    };
    CheckpointInfo {
        dirty_bytes: found.dirty_bytes(disk),
        ..info
    }
}

fn to_entry(disk: &Disk, entry: &Entry<'_>) -> CheckpointInfo {
    match entry {
        Entry::Ours(found) => to_found(disk, found),
        Entry::Missing(chain, name) => CheckpointInfo {
            chain: Some(chain.to_string()),
            ..bare(name.as_str(), Health::Missing)
        },
        Entry::Foreign(bitmap) => with_bitmap(bare(&bitmap.name, Health::Foreign), disk, bitmap),
    }
}

pub(crate) fn to_listed(listed: &Listed) -> DisksResult {
    let Listed { all, told, scope } = listed;
    let asked = |disk: &Disk| told.as_ref().is_none_or(|told| told.contains(&disk.id));
    let disks = chain::list(all, scope).into_iter();
    DisksResult {
        disks: disks
            .filter(|(disk, _)| asked(disk))
            .map(|(disk, entries)| DiskCheckpoints {
                disk: disk.id.clone(),
                size: disk.size,
                tracking: to_tracking(disk),
                checkpoints: entries.iter().map(|entry| to_entry(disk, entry)).collect(),
            })
            .collect(),
    }
}

fn to_repaired_disk(repaired: &Repaired, disk: &Disk, entries: &[Entry<'_>]) -> RepairedDisk {
    let (mut lost, mut usable, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
    for entry in entries {
        match entry {
            Entry::Foreign(bitmap) => foreign.push(bitmap.name.clone()),
            Entry::Ours(found) if found.health == EngineHealth::Usable => {
                usable.push(to_found(disk, found));
            }
            entry => lost.push(to_entry(disk, entry)),
        }
    }
    RepairedDisk {
        disk: repaired.disk.clone(),
        removed: repaired.removed.clone(),
        lost,
        usable,
        foreign,
        leftovers: repaired.leftovers.clone(),
    }
}

pub(crate) fn to_repaired(report: &Report, scope: &Scope) -> RepairResult {
    let listed = chain::list(&report.before, scope);
    let of = |disk: &Disk| report.disks.iter().find(|one| one.disk == disk.id);
    let told = listed
        .iter()
        .filter_map(|(disk, entries)| Some(to_repaired_disk(of(disk)?, disk, entries)));
    RepairResult {
        disks: told.collect(),
        open_backups: report.open.clone(),
    }
}
