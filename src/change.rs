//! What changes checkpoints: each request as the actions of one QMP transaction.
//! Pure: it sees the disks as they were discovered, and changes nothing.

use serde_json::Value;

use crate::chain::{self, Found};
use crate::checkpoint::{Checkpoint, GRANULARITIES, GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::plan;
use crate::qemu::discover::Disk;
use crate::qemu::step;

/// The disks of a request, by id; `None`: all that it can mean.
pub type Ids<'a> = Option<&'a [&'a str]>;

/// What is to be done.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// The disks that it is about, also where nothing has to be done.
    pub disks: Vec<String>,
    /// The actions of one transaction; none: it is done already.
    pub actions: Vec<Value>,
}

/// What is the same for all disks of a request.
#[derive(Clone, Debug)]
pub struct Made<'a> {
    /// The chain.
    pub chain: &'a Name,
    /// The name of the checkpoint that is made, or changed.
    pub name: &'a Name,
    /// Now: milliseconds since 1970 UTC.
    pub time_ms: u64,
}

/// New checkpoints on `ids`; without ids on all disks that are not excluded.
///
/// # Errors
/// Those of [`plan::choose`] and [`plan::new_checkpoint`]; [`Kind::InvalidRequest`]
/// for an odd granularity, or no disk.
pub fn create(
    disks: &[Disk],
    ids: Ids<'_>,
    made: &Made<'_>,
    granularity: Option<u64>,
    new_id: &dyn Fn() -> Id,
) -> Result<Change> {
    let eligible = if ids.is_some() {
        Disk::is_trackable
    } else {
        |disk: &Disk| disk.excluded.is_none()
    };
    let chosen = plan::choose(disks, ids, eligible)?;
    if chosen.is_empty() {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because("there are none")
        );
    }
    let grain = checked_granularity(granularity)?.unwrap_or(GRANULARITY);
    let mut change = Change::default();
    for disk in chosen {
        let checkpoint = plan::new_checkpoint(disk, made.chain, made.name, made.time_ms, new_id())?;
        change.add(disk, [add(disk, &checkpoint, grain, true)]);
    }
    Ok(change)
}

/// Checkpoints go. Returns what goes, as `disk/checkpoint`, too.
///
/// # Errors
/// Those of [`holders`]; [`Kind::CheckpointBusy`]; [`Kind::CheckpointUnusable`] for
/// one on a backing image.
pub fn delete(
    disks: &[Disk],
    ids: Ids<'_>,
    chain: &Name,
    names: &[Name],
) -> Result<(Vec<String>, Change)> {
    let mut change = Change::default();
    let mut deleted = Vec::new();
    for (index, name) in names.iter().enumerate() {
        if names[..index].contains(name) {
            continue;
        }
        for (disk, found) in holders(disks, ids, chain, std::slice::from_ref(name))? {
            for found in &found {
                own_bitmap(disk, found)?;
            }
            deleted.push(format!("{}/{name}", disk.id));
            // Two processes that made one at the same time have made two.
            let mut all = chain::checkpoints(disk);
            all.retain(|one| one.checkpoint.chain == *chain && one.checkpoint.name == *name);
            for found in all.iter().filter(|one| one.own.is_some()) {
                free(disk, found)?;
                let own = own_bitmap(disk, found)?;
                change.add(disk, [step::remove_bitmap(&disk.node, own)]);
            }
        }
    }
    Ok((deleted, change))
}

/// A checkpoint stops to record.
///
/// # Errors
/// Those of [`holders`]; [`Kind::CheckpointBusy`]; [`Kind::CheckpointUnusable`].
pub fn disable(disks: &[Disk], ids: Ids<'_>, chain: &Name, name: &Name) -> Result<Change> {
    let mut change = Change::default();
    for (disk, found) in holders(disks, ids, chain, std::slice::from_ref(name))? {
        for found in &found {
            let own = changeable(disk, found)?;
            let recording = found.own.is_some_and(|bitmap| bitmap.recording);
            change.add(
                disk,
                recording.then(|| step::disable_bitmap(&disk.node, own)),
            );
        }
    }
    Ok(change)
}

/// A checkpoint records again. What was written meanwhile is not in it, so it has no
/// point in time any more: as a bitmap's name cannot be changed, another takes its place.
///
/// # Errors
/// As [`disable`].
pub fn enable(disks: &[Disk], ids: Ids<'_>, chain: &Name, name: &Name) -> Result<Change> {
    let mut change = Change::default();
    for (disk, found) in holders(disks, ids, chain, std::slice::from_ref(name))? {
        for found in &found {
            let own = changeable(disk, found)?;
            let checkpoint = Checkpoint {
                id: None,
                ..found.checkpoint.clone()
            };
            if found.own.is_some_and(|bitmap| bitmap.recording) {
                change.add(disk, None);
            } else if found.checkpoint == checkpoint {
                change.add(disk, [step::enable_bitmap(&disk.node, own)]);
            } else {
                let name = checkpoint.bitmap();
                change.add(
                    disk,
                    [
                        add(disk, &checkpoint, found.granularity(), true),
                        step::merge_bitmap(&disk.node, &name, &disk.node, own),
                        step::remove_bitmap(&disk.node, own),
                    ],
                );
            }
        }
    }
    Ok(change)
}

impl Change {
    pub(crate) fn add(&mut self, disk: &Disk, actions: impl IntoIterator<Item = Value>) {
        if !self.disks.contains(&disk.id) {
            self.disks.push(disk.id.clone());
        }
        self.actions.extend(actions);
    }
}

/// The disks that have all of these checkpoints, with them: of `ids` each must.
///
/// # Errors
/// Those of [`plan::choose`]; [`Kind::UnknownCheckpoint`], also where no disk has them.
pub fn holders<'a>(
    disks: &'a [Disk],
    ids: Ids<'_>,
    chain: &Name,
    names: &[Name],
) -> Result<Vec<(&'a Disk, Vec<Found<'a>>)>> {
    let mut holders = Vec::new();
    let mut lacking = None;
    for disk in plan::choose(disks, ids, Disk::is_trackable)? {
        let find =
            |name: &Name| chain::find(disk, chain, name, None).ok_or_else(|| unknown(chain, name));
        match names.iter().map(find).collect::<Result<Vec<_>>>() {
            Ok(found) => holders.push((disk, found)),
            Err(error) if ids.is_some() => return Err(error.on_disk(disk.id.clone())),
            Err(error) => lacking = Some(error),
        }
    }
    match lacking {
        Some(error) if holders.is_empty() => Err(error),
        None if holders.is_empty() => Err(Error::new(
            Kind::UnknownCheckpoint,
            "looking for a checkpoint",
        )
        .because("there is no disk")),
        _ => Ok(holders),
    }
}

pub(crate) fn unknown(chain: &Name, name: &Name) -> Error {
    Error::new(Kind::UnknownCheckpoint, "looking for a checkpoint")
        .because(format!("chain {chain} has no checkpoint {name}"))
}

/// The bitmap on the disk's own image, which can be changed.
fn own_bitmap<'a>(disk: &Disk, found: &Found<'a>) -> Result<&'a str> {
    let own = found.own.map(|bitmap| bitmap.name.as_str());
    own.ok_or_else(|| {
        Error::new(
            Kind::CheckpointUnusable,
            format!("changing checkpoint {}", found.checkpoint.name),
        )
        .because("it is on a backing image, which QEMU has opened read-only")
        .on_disk(disk.id.clone())
    })
}

pub(crate) fn free(disk: &Disk, found: &Found<'_>) -> Result<()> {
    if found.parts.iter().any(|part| part.bitmap.busy) {
        return Err(Error::new(
            Kind::CheckpointBusy,
            format!("changing checkpoint {}", found.checkpoint.name),
        )
        .because("a job or an export uses its bitmap")
        .on_disk(disk.id.clone()));
    }
    Ok(())
}

pub(crate) fn intact(disk: &Disk, found: &Found<'_>) -> Result<()> {
    free(disk, found)?;
    if found.parts.iter().any(|part| part.bitmap.inconsistent) {
        return Err(Error::new(
            Kind::CheckpointUnusable,
            format!("reading checkpoint {}", found.checkpoint.name),
        )
        .because("it is inconsistent: it can only be deleted or repaired")
        .on_disk(disk.id.clone()));
    }
    Ok(())
}

fn changeable<'a>(disk: &Disk, found: &Found<'a>) -> Result<&'a str> {
    intact(disk, found)?;
    own_bitmap(disk, found)
}

pub(crate) fn add(
    disk: &Disk,
    checkpoint: &Checkpoint,
    granularity: u64,
    recording: bool,
) -> Value {
    step::add_bitmap(
        &disk.node,
        &checkpoint.bitmap(),
        granularity,
        disk.persistent_bitmaps,
        !recording,
    )
}

pub(crate) fn checked_granularity(granularity: Option<u64>) -> Result<Option<u64>> {
    match granularity {
        Some(grain) if !grain.is_power_of_two() || !GRANULARITIES.contains(&grain) => Err(
            Error::new(Kind::InvalidRequest, "reading a granularity").because(format!(
                "it is a power of two from {} to {}",
                GRANULARITIES.start(),
                GRANULARITIES.end()
            )),
        ),
        granularity => Ok(granularity),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::{bitmap, checkpoint, disk, name};
    use crate::checkpoint::MAX_CHECKPOINTS;
    use crate::qemu::discover::Reason;
    use crate::qemu::layer::Bitmap;

    fn created(disks: &[Disk], ids: Ids<'_>, text: &str) -> Result<Change> {
        let (chain, name) = (name("c"), name(text));
        let made = Made {
            chain: &chain,
            name: &name,
            time_ms: 9,
        };
        create(disks, ids, &made, None, &|| Id::parse("new").unwrap())
    }

    fn kinds(change: &Change) -> Vec<&str> {
        let kind = |action: &Value| -> Option<usize> { action["type"].as_str().map(str::len) };
        assert!(change.actions.iter().all(|action| kind(action).is_some()));
        let kinds = change.actions.iter();
        kinds
            .filter_map(|action| action["type"].as_str()?.strip_prefix("block-dirty-bitmap-"))
            .collect()
    }

    #[test]
    fn a_checkpoint_is_made_on_all_disks_or_none() {
        let fresh = disk(&[("f", &[])]);
        let second = Disk {
            id: "e".into(),
            ..disk(&[("g", &[bitmap(&checkpoint("a", 1, "g"))])])
        };
        let third = Disk {
            id: "r".into(),
            excluded: Some(Reason::ReadOnly),
            ..disk(&[("h", &[])])
        };
        let disks = [fresh, second, third];
        let all = created(&disks, None, "b").unwrap();
        assert_eq!(
            (all.disks.as_slice(), kinds(&all)),
            (
                ["d".to_owned(), "e".to_owned()].as_slice(),
                vec!["add", "add"]
            )
        );
        let refused = |ids: Ids<'_>, text: &str| {
            let error = created(&disks, ids, text).unwrap_err();
            (error.kind(), error.disk().map(str::to_owned))
        };
        assert_eq!(
            refused(None, "a"),
            (Kind::CheckpointExists, Some("e".into()))
        );
        assert_eq!(
            refused(Some(&["d", "r"]), "b"),
            (Kind::DiskExcluded, Some("r".into()))
        );
        assert_eq!(
            refused(Some(&["d", "x"]), "b"),
            (Kind::UnknownDisk, Some("x".into()))
        );
        assert_eq!(
            refused(Some(&["d", "d"]), "b"),
            (Kind::InvalidRequest, Some("d".into()))
        );
        assert_eq!(refused(Some(&[]), "b").0, Kind::InvalidRequest);
    }

    #[test]
    fn a_disk_has_room_for_so_many_and_no_more() {
        let many: Vec<Bitmap> = (0..MAX_CHECKPOINTS)
            .map(|n| bitmap(&checkpoint(&format!("n{n}"), n as u64, "f")))
            .collect();
        let full = [disk(&[("f", &many)])];
        assert_eq!(
            created(&full, None, "b").unwrap_err().kind(),
            Kind::TooManyCheckpoints
        );
        let room = [disk(&[("f", &many[1..])])];
        assert!(created(&room, None, "b").is_ok());
    }

    #[test]
    fn recording_again_costs_the_point_in_time() {
        let a = checkpoint("a", 1, "f");
        let (chain, name) = (name("c"), name("a"));
        let on = disk(&[("f", &[bitmap(&a)])]);
        let off = disk(&[(
            "f",
            &[Bitmap {
                recording: false,
                ..bitmap(&a)
            }],
        )]);
        let gap = Checkpoint { id: None, ..a };
        let gap_off = disk(&[(
            "f",
            &[Bitmap {
                recording: false,
                ..bitmap(&gap)
            }],
        )]);
        let told = |change: &Change| {
            kinds(change)
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let enabled =
            |disk: &Disk| enable(std::slice::from_ref(disk), None, &chain, &name).unwrap();
        let disabled =
            |disk: &Disk| told(&disable(std::slice::from_ref(disk), None, &chain, &name).unwrap());
        assert_eq!(told(&enabled(&on)), Vec::<String>::new());
        assert_eq!(told(&enabled(&off)), ["add", "merge", "remove"]);
        assert_eq!(enabled(&off).actions[0]["data"]["name"], gap.bitmap());
        assert_eq!(told(&enabled(&gap_off)), ["enable"]);
        assert_eq!(disabled(&on), ["disable"]);
        assert_eq!(disabled(&off), Vec::<String>::new());
    }

    #[test]
    fn only_what_can_go_is_deleted() {
        let a = checkpoint("a", 1, "base");
        let (chain, names) = (name("c"), [name("a"), name("a")]);
        let deleted = |disk: &Disk| delete(std::slice::from_ref(disk), None, &chain, &names);
        let lost = Bitmap {
            inconsistent: true,
            ..bitmap(&a)
        };
        let (told, change) = deleted(&disk(&[("base", &[lost])])).unwrap();
        assert_eq!(
            (told, kinds(&change)),
            (vec!["d/a".to_owned()], vec!["remove"])
        );
        let twice = [bitmap(&a), bitmap(&checkpoint("a", 2, "base"))];
        let (told, change) = deleted(&disk(&[("base", &twice)])).unwrap();
        assert_eq!((told.len(), kinds(&change)), (1, vec!["remove", "remove"]));
        let busy = Bitmap {
            busy: true,
            ..bitmap(&a)
        };
        let kind = |disk: &Disk| deleted(disk).unwrap_err().kind();
        assert_eq!(kind(&disk(&[("base", &[busy])])), Kind::CheckpointBusy);
        assert_eq!(
            kind(&disk(&[("top", &[]), ("base", &[bitmap(&a)])])),
            Kind::CheckpointUnusable
        );
        assert_eq!(kind(&disk(&[("base", &[])])), Kind::UnknownCheckpoint);
    }
}
