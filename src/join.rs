//! Checkpoints that are made of others, or of the host's word: `merge` and `redefine`
//! as actions of one QMP transaction. Pure.

use serde_json::Value;

use crate::chain::{self, Found};
use crate::change::{Change, Ids, Made, add, checked_granularity, free, holders, intact, unknown};
use crate::checkpoint::{Checkpoint, GRANULARITY, Health, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::plan;
use crate::qemu::discover::Disk;
use crate::qemu::step;

/// Checkpoints `from` are joined into one. It takes over the point in time of the
/// oldest of them that can serve as base: what changed since is in that one, and so
/// in the result.
///
/// # Errors
/// Those of [`holders`]; [`Kind::CheckpointExists`], [`Kind::CheckpointBusy`],
/// [`Kind::CheckpointUnusable`], [`Kind::TooManyCheckpoints`]; [`Kind::InvalidRequest`]
/// for nothing to join.
pub fn merge(
    disks: &[Disk],
    ids: Ids<'_>,
    made: &Made<'_>,
    from: &[Name],
    delete_sources: bool,
) -> Result<Change> {
    if from.is_empty() {
        return Err(
            Error::new(Kind::InvalidRequest, "merging checkpoints").because("`from` is empty")
        );
    }
    let mut change = Change::default();
    for (disk, found) in holders(disks, ids, made.chain, from)? {
        let replaced = from.contains(made.name);
        if !replaced
            && chain::find(disk, made.chain, made.name, None).is_some_and(|one| one.own.is_some())
        {
            return Err(
                Error::new(Kind::CheckpointExists, "naming the merged checkpoint")
                    .because(format!(
                        "chain {} has a checkpoint {}",
                        made.chain, made.name
                    ))
                    .on_disk(disk.id.clone()),
            );
        }
        for found in &found {
            intact(disk, found)?;
        }
        let usable = found.iter().filter(|one| one.health == Health::Usable);
        let oldest = usable.min_by_key(|one| one.checkpoint.time_ms);
        let first = oldest.or(found.first());
        let checkpoint = Checkpoint {
            chain: made.chain.clone(),
            name: made.name.clone(),
            size: disk.size,
            time_ms: first.map_or(made.time_ms, |one| one.checkpoint.time_ms),
            id: oldest.and_then(|one| one.checkpoint.id.clone()),
            owner: disk.owner.clone(),
            image: plan::own_image(disk)?,
        };
        let goes = |one: &&Found<'_>| delete_sources || one.checkpoint.name == *made.name;
        let result = Join {
            recording: found
                .iter()
                .any(|one| one.own.is_some_and(|own| own.recording)),
            granularity: found
                .iter()
                .map(Found::granularity)
                .min()
                .unwrap_or(GRANULARITY),
            from: found.iter().flat_map(parts).collect(),
            removed: found.iter().filter(goes).filter_map(own_name).collect(),
            checkpoint,
        };
        change.add(disk, result.actions(disk)?);
    }
    Ok(change)
}

/// What `redefine` takes a disk's changes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// The bitmaps that the disk has of that name.
    Recorded,
    /// A bitmap that was made for this: its node and name.
    Painted(String, String),
}

/// The point in time that the host says the changes are since.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its identity.
    pub id: Id,
    /// When it was; `None`: as of the checkpoint that is replaced, else now.
    pub time_ms: Option<u64>,
}

/// One disk's checkpoint is made, or made anew, by the host's word.
///
/// # Errors
/// [`Kind::UnknownCheckpoint`], [`Kind::CheckpointUnusable`] with [`Changes::Recorded`];
/// [`Kind::CheckpointBusy`], [`Kind::TooManyCheckpoints`], [`Kind::InvalidRequest`].
pub fn redefine(
    disk: &Disk,
    made: &Made<'_>,
    Point { id, time_ms }: Point,
    changes: &Changes,
    granularity: Option<u64>,
) -> Result<Vec<Value>> {
    let there: Vec<Found<'_>> = chain::checkpoints(disk)
        .into_iter()
        .filter(|one| one.checkpoint.chain == *made.chain && one.checkpoint.name == *made.name)
        .collect();
    for found in &there {
        free(disk, found)?;
    }
    let (from, grain) = match changes {
        Changes::Painted(node, name) => (vec![(node.clone(), name.clone())], GRANULARITY),
        Changes::Recorded if there.is_empty() => {
            return Err(unknown(made.chain, made.name).on_disk(disk.id.clone()));
        }
        Changes::Recorded => {
            for found in &there {
                intact(disk, found)?;
            }
            let grain = there.iter().map(Found::granularity).min();
            (
                there.iter().flat_map(parts).collect(),
                grain.unwrap_or(GRANULARITY),
            )
        }
    };
    let oldest = there.iter().map(|one| one.checkpoint.time_ms).min();
    let mut checkpoint = Checkpoint {
        chain: made.chain.clone(),
        name: made.name.clone(),
        size: disk.size,
        time_ms: time_ms.or(oldest).unwrap_or(made.time_ms),
        id: Some(id),
        owner: disk.owner.clone(),
        image: plan::own_image(disk)?,
    };
    // The name of its bitmap must differ from those that it takes the place of.
    while there.iter().any(|one| one.checkpoint == checkpoint) {
        checkpoint.time_ms = checkpoint.time_ms.wrapping_add(1);
    }
    Join {
        checkpoint,
        recording: true,
        granularity: checked_granularity(granularity)?.unwrap_or(grain),
        from,
        removed: there.iter().filter_map(own_name).collect(),
    }
    .actions(disk)
}

/// Bitmaps that become one.
struct Join {
    checkpoint: Checkpoint,
    recording: bool,
    granularity: u64,
    /// (node, name)
    from: Vec<(String, String)>,
    /// On the disk's own image.
    removed: Vec<String>,
}

impl Join {
    fn actions(self, disk: &Disk) -> Result<Vec<Value>> {
        let target = self.checkpoint.bitmap();
        let there = disk.bitmaps().iter().find(|bitmap| bitmap.name == target);
        let mut actions = Vec::new();
        match there {
            None => {
                plan::room_for_one(disk, self.removed.len())?;
                actions.push(add(
                    disk,
                    &self.checkpoint,
                    self.granularity,
                    self.recording,
                ));
            }
            Some(bitmap) if self.recording && !bitmap.recording => {
                actions.push(step::enable_bitmap(&disk.node, &target));
            }
            Some(_) => {}
        }
        let itself = |(node, name): &&(String, String)| *node == disk.node && *name == target;
        for (node, name) in self.from.iter().filter(|from| !itself(from)) {
            actions.push(step::merge_bitmap(&disk.node, &target, node, name));
        }
        for name in self.removed.iter().filter(|name| **name != target) {
            actions.push(step::remove_bitmap(&disk.node, name));
        }
        Ok(actions)
    }
}

fn parts(found: &Found<'_>) -> Vec<(String, String)> {
    let parts = found.parts.iter();
    parts
        .map(|part| (part.node.to_owned(), part.bitmap.name.clone()))
        .collect()
}

fn own_name(found: &Found<'_>) -> Option<String> {
    found.own.map(|bitmap| bitmap.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::{SIZE, bitmap, checkpoint, disk, name};
    use crate::qemu::layer::Bitmap;

    /// (what, bitmap, from) of each action.
    fn told(actions: &[Value]) -> Vec<(String, String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let short = |name: String| match Checkpoint::from_bitmap(&name) {
            Some(one) => format!(
                "{}:{}",
                one.name,
                one.id.map_or("-".into(), |id| id.as_str().to_owned())
            ),
            None => name,
        };
        let one = |action: &Value| {
            let data = &action["data"];
            let what = text(&action["type"]).replace("block-dirty-bitmap-", "");
            let what = match (what.as_str(), &data["disabled"]) {
                ("add", Value::Bool(true)) => "add disabled".to_owned(),
                _ => what,
            };
            let from = &data["bitmaps"][0];
            let target = text(if data["target"].is_null() {
                &data["name"]
            } else {
                &data["target"]
            });
            let from = match text(&from["node"]) {
                node if node.is_empty() => node,
                node => format!("{node} {}", short(text(&from["name"]))),
            };
            (what, short(target), from)
        };
        actions.iter().map(one).collect()
    }

    fn assert_told(actions: &[Value], expected: &[(&str, &str, &str)]) {
        let owned = |(what, bitmap, from): &(&str, &str, &str)| {
            ((*what).to_owned(), (*bitmap).to_owned(), (*from).to_owned())
        };
        assert_eq!(
            told(actions),
            expected.iter().map(owned).collect::<Vec<_>>()
        );
    }

    fn merged(disk: &Disk, into: &str, from: &[&str], delete: bool) -> Result<Vec<Value>> {
        let (chain, into) = (name("c"), name(into));
        let made = Made {
            chain: &chain,
            name: &into,
            time_ms: 9,
        };
        let from: Vec<Name> = from.iter().map(|from| name(from)).collect();
        merge(std::slice::from_ref(disk), None, &made, &from, delete).map(|change| change.actions)
    }

    #[test]
    fn the_result_is_of_the_oldest_that_can_serve() {
        let (a, b) = (checkpoint("a", 1, "f"), checkpoint("b", 2, "f"));
        let both = disk(&[("f", &[bitmap(&a), bitmap(&b)])]);
        assert_told(
            &merged(&both, "m", &["b", "a"], false).unwrap(),
            &[
                ("add", "m:a1", ""),
                ("merge", "m:a1", "node-f b:b2"),
                ("merge", "m:a1", "node-f a:a1"),
            ],
        );
        let frozen = Bitmap {
            recording: false,
            ..bitmap(&a)
        };
        let older_frozen = disk(&[("f", &[frozen.clone(), bitmap(&b)])]);
        assert_told(
            &merged(&older_frozen, "m", &["a", "b"], true).unwrap(),
            &[
                ("add", "m:b2", ""),
                ("merge", "m:b2", "node-f a:a1"),
                ("merge", "m:b2", "node-f b:b2"),
                ("remove", "a:a1", ""),
                ("remove", "b:b2", ""),
            ],
        );
        assert_told(
            &merged(&disk(&[("f", &[frozen])]), "m", &["a"], false).unwrap(),
            &[("add disabled", "m:-", ""), ("merge", "m:-", "node-f a:a1")],
        );
    }

    #[test]
    fn one_of_the_sources_can_be_the_result() {
        let (a, b) = (checkpoint("a", 1, "f"), checkpoint("b", 2, "f"));
        let both = disk(&[("f", &[bitmap(&a), bitmap(&b)])]);
        assert_told(
            &merged(&both, "a", &["a", "b"], true).unwrap(),
            &[("merge", "a:a1", "node-f b:b2"), ("remove", "b:b2", "")],
        );
        assert_told(
            &merged(&both, "b", &["a", "b"], false).unwrap(),
            &[
                ("add", "b:a1", ""),
                ("merge", "b:a1", "node-f a:a1"),
                ("merge", "b:a1", "node-f b:b2"),
                ("remove", "b:b2", ""),
            ],
        );
        let exists = merged(&both, "b", &["a"], false).unwrap_err();
        assert_eq!(exists.kind(), Kind::CheckpointExists);
    }

    #[test]
    fn a_backing_images_half_is_taken_along() {
        let a = bitmap(&checkpoint("a", 1, "base"));
        let overlay = disk(&[
            ("top", std::slice::from_ref(&a)),
            ("base", std::slice::from_ref(&a)),
        ]);
        let actions = merged(&overlay, "a", &["a"], false).unwrap();
        assert_told(
            &actions,
            &[
                ("add", "a:a1", ""),
                ("merge", "a:a1", "node-top a:a1"),
                ("merge", "a:a1", "node-base a:a1"),
                ("remove", "a:a1", ""),
            ],
        );
        // The new one is known to be made in the overlay.
        let made = Checkpoint::from_bitmap(actions[0]["data"]["name"].as_str().unwrap()).unwrap();
        assert_eq!(made.image, overlay.layers[0].image);
        let only_below = disk(&[("top", &[]), ("base", &[a])]);
        assert_told(
            &merged(&only_below, "a", &["a"], false).unwrap(),
            &[
                ("add disabled", "a:-", ""),
                ("merge", "a:-", "node-base a:a1"),
            ],
        );
    }

    #[test]
    fn what_is_broken_or_in_use_is_not_joined() {
        let a = checkpoint("a", 1, "f");
        let with = |change: fn(&mut Bitmap)| {
            let mut one = bitmap(&a);
            change(&mut one);
            merged(&disk(&[("f", &[one])]), "m", &["a"], false)
                .unwrap_err()
                .kind()
        };
        assert_eq!(
            with(|one| one.inconsistent = true),
            Kind::CheckpointUnusable
        );
        assert_eq!(with(|one| one.busy = true), Kind::CheckpointBusy);
        let good = disk(&[("f", &[bitmap(&a)])]);
        let unknown = merged(&good, "m", &["b"], false).unwrap_err();
        assert_eq!(unknown.kind(), Kind::UnknownCheckpoint);
        let nothing = merged(&good, "m", &[], false).unwrap_err();
        assert_eq!(nothing.kind(), Kind::InvalidRequest);
    }

    #[test]
    fn a_redefined_checkpoint_takes_the_place_of_all_others_of_its_name() {
        let lost = Bitmap {
            inconsistent: true,
            recording: false,
            ..bitmap(&checkpoint("a", 20, "f"))
        };
        let disk = disk(&[("f", &[lost])]);
        let (chain, a) = (name("c"), name("a"));
        let made = Made {
            chain: &chain,
            name: &a,
            time_ms: 9,
        };
        let painted = Changes::Painted("p".into(), "painted".into());
        let point = |time_ms| Point {
            id: Id::parse("new").unwrap(),
            time_ms,
        };
        let actions = redefine(&disk, &made, point(None), &painted, Some(4096)).unwrap();
        assert_told(
            &actions,
            &[
                ("add", "a:new", ""),
                ("merge", "a:new", "p painted"),
                ("remove", "a:a20", ""),
            ],
        );
        assert_eq!(actions[0]["data"]["granularity"], 4096);
        let there = Checkpoint::from_bitmap(actions[0]["data"]["name"].as_str().unwrap()).unwrap();
        assert_eq!((there.time_ms, there.size), (20, SIZE));
        let recorded = redefine(&disk, &made, point(None), &Changes::Recorded, None).unwrap_err();
        assert_eq!(recorded.kind(), Kind::CheckpointUnusable);
        // The very same again has another name all the same.
        let same = Point {
            id: Id::parse("a20").unwrap(),
            time_ms: Some(20),
        };
        let actions = redefine(&disk, &made, same, &painted, None).unwrap();
        let there = Checkpoint::from_bitmap(actions[0]["data"]["name"].as_str().unwrap()).unwrap();
        assert_eq!(there.time_ms, 21);
        for grain in [0, 512, 65537, 1 << 40] {
            let odd = redefine(&disk, &made, point(None), &painted, Some(grain)).unwrap_err();
            assert_eq!(odd.kind(), Kind::InvalidRequest);
        }
    }
}
