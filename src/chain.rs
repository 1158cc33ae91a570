//! What a disk's dirty bitmaps say of the checkpoints of a chain. Pure.
//!
//! A checkpoint is usually one bitmap on the disk's own image. After an external
//! snapshot it lies on a backing image; where the overlay was given a bitmap of the
//! very same name in the snapshot's transaction, as libvirt does, the two together
//! are the checkpoint:
//!
//! ```text
//!              1      2      3      4         X  the bitmap
//! own image   [X]     X      X      -         [] the image that it was made in,
//! below              [X]     -     [X]           as its name says
//! ```
//! 1 and 2 are usable. 3 is a `mismatch`: the older half went with a `block-stream`,
//! and the bitmap that is left began at the snapshot, although its name says
//! otherwise; the same picture is an image that was moved. 4 is `on_backing_image`.

use crate::checkpoint::{Checkpoint, Health, Id, Name};
use crate::qemu::discover::Disk;
use crate::qemu::layer::Bitmap;

/// One bitmap of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// The node that it is on.
    pub node: &'a str,
    /// The bitmap.
    pub bitmap: &'a Bitmap,
}

/// A checkpoint on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// What its bitmaps' name says.
    pub checkpoint: Checkpoint,
    /// Its bitmap on the disk's own image.
    pub own: Option<&'a Bitmap>,
    /// All its bitmaps, the own one first.
    pub parts: Vec<Part<'a>>,
    /// Whether it can serve as base.
    pub health: Health,
}

impl Found<'_> {
    /// Bytes that one bit stands for: of the finest of its bitmaps.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        let grains = self.parts.iter().map(|part| part.bitmap.granularity);
        grains.min().unwrap_or(crate::checkpoint::GRANULARITY)
    }

    /// Bytes that changed since, in whole granules; an area by which the disk has
    /// grown counts. `None` where it cannot be known.
    #[must_use]
    pub fn dirty_bytes(&self, disk: &Disk) -> Option<u64> {
        if matches!(self.health, Health::Inconsistent | Health::OnBackingImage) {
            return None;
        }
        let counts = self.parts.iter().map(|part| part.bitmap.count);
        let recorded = counts.fold(0_u64, u64::saturating_add);
        let grown = disk.size.saturating_sub(self.checkpoint.size);
        Some(recorded.saturating_add(grown).min(disk.size))
    }
}

/// All our checkpoints on a disk, of every chain: those on its own image first, the
/// oldest first.
#[must_use]
pub fn checkpoints(disk: &Disk) -> Vec<Found<'_>> {
    let mut found: Vec<Found<'_>> = Vec::new();
    for (depth, layer) in disk.layers.iter().enumerate() {
        for bitmap in &layer.bitmaps {
            let Some(checkpoint) = Checkpoint::from_bitmap(&bitmap.name) else {
                continue;
            };
            let part = Part {
                node: &layer.node,
                bitmap,
            };
            match found.iter_mut().find(|one| one.checkpoint == checkpoint) {
                Some(known) => known.parts.push(part),
                None => found.push(Found {
                    checkpoint,
                    own: (depth == 0).then_some(bitmap),
                    parts: vec![part],
                    health: Health::Usable,
                }),
            }
        }
    }
    for one in &mut found {
        one.health = health(disk, one, None);
    }
    found.sort_by_key(|one| (one.own.is_none(), one.checkpoint.time_ms));
    found
}

/// The checkpoint `name` of `chain` on a disk. With `id`, that which the host knows it
/// by, it is this one point in time, whichever VM and disk has it now.
#[must_use]
pub fn find<'a>(disk: &'a Disk, chain: &Name, name: &Name, id: Option<&Id>) -> Option<Found<'a>> {
    let mut found = checkpoints(disk);
    found.retain(|one| one.checkpoint.chain == *chain && one.checkpoint.name == *name);
    let known = |one: &Found<'_>| id.is_some() && one.checkpoint.id.as_ref() == id;
    let index = found.iter().position(known).unwrap_or(0);
    let mut one = (index < found.len()).then(|| found.swap_remove(index))?;
    one.health = health(disk, &one, id);
    Some(one)
}

fn health(disk: &Disk, found: &Found<'_>, id: Option<&Id>) -> Health {
    let Found {
        checkpoint,
        own,
        parts,
        ..
    } = found;
    let any = |is: fn(&Bitmap) -> bool| parts.iter().any(|part| is(part.bitmap));
    // It has to be in each image from the top down to the deepest that has it.
    let images = disk.layers.get(..parts.len()).unwrap_or_default();
    let joined = images
        .iter()
        .zip(parts)
        .all(|(layer, part)| layer.node == part.node);
    let made_here = images.iter().any(|layer| layer.image == checkpoint.image);
    let made_for_this = match id {
        Some(id) => checkpoint.id.as_ref() == Some(id),
        None => checkpoint.owner == disk.owner,
    };
    if own.is_none() || !joined {
        Health::OnBackingImage
    } else if any(|bitmap| bitmap.inconsistent) {
        Health::Inconsistent
    } else if any(|bitmap| bitmap.busy) {
        Health::Busy
    } else if any(|bitmap| !bitmap.recording) {
        Health::NotRecording
    } else if checkpoint.id.is_none() {
        Health::Gap
    } else if checkpoint.size != disk.size {
        Health::SizeChanged
    } else if !made_here || !made_for_this {
        Health::Mismatch
    } else {
        Health::Usable
    }
}

/// Which checkpoints are looked at.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Those of this chain; `None`: of every chain.
    pub chain: Option<Name>,
    /// Those of these names, which each disk is expected to have; `None`: any.
    pub names: Option<Vec<Name>>,
}

impl Scope {
    /// Whether it covers this one.
    #[must_use]
    pub fn has(&self, checkpoint: &Checkpoint) -> bool {
        let chain = self.chain.as_ref();
        let names = self.names.as_ref();
        chain.is_none_or(|chain| checkpoint.chain == *chain)
            && names.is_none_or(|names| names.contains(&checkpoint.name))
    }
}

/// What a disk has, or lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A checkpoint of ours.
    Ours(Found<'a>),
    /// One that is expected, and is not there: its chain and name.
    Missing(Name, Name),
    /// A bitmap of somebody else, or of a form that this version does not know.
    Foreign(&'a Bitmap),
}

/// What each disk has of the scope, and what it lacks: what another disk has, or what
/// the scope names. Bitmaps of others are told where the scope names nothing.
#[must_use]
pub fn list<'a>(disks: &'a [Disk], scope: &Scope) -> Vec<(&'a Disk, Vec<Entry<'a>>)> {
    let per_disk: Vec<(&Disk, Vec<Found<'_>>)> = disks
        .iter()
        .map(|disk| {
            let mut found = checkpoints(disk);
            found.retain(|one| scope.has(&one.checkpoint));
            (disk, found)
        })
        .collect();
    let expected = expected(&per_disk, scope);
    per_disk
        .into_iter()
        .map(|(disk, found)| {
            let lacks = |(chain, name): &&(Name, Name)| {
                !found
                    .iter()
                    .any(|one| one.checkpoint.chain == *chain && one.checkpoint.name == *name)
            };
            let missing: Vec<Entry<'_>> = expected
                .iter()
                .filter(|_| disk.is_trackable())
                .filter(lacks)
                .map(|(chain, name)| Entry::Missing(chain.clone(), name.clone()))
                .collect();
            let ours = found.into_iter().map(Entry::Ours);
            let foreign = disk
                .bitmaps()
                .iter()
                .filter(|bitmap| scope.names.is_none() && is_foreign(&bitmap.name));
            let entries = ours.chain(missing).chain(foreign.map(Entry::Foreign));
            (disk, entries.collect())
        })
        .collect()
}

fn expected(per_disk: &[(&Disk, Vec<Found<'_>>)], scope: &Scope) -> Vec<(Name, Name)> {
    let mut expected: Vec<(Name, Name)> = Vec::new();
    let named = scope.chain.iter().flat_map(|chain| {
        let names = scope.names.iter().flatten();
        names.map(|name| (chain.clone(), name.clone()))
    });
    let there = per_disk
        .iter()
        .flat_map(|(_, found)| found)
        .map(|one| (one.checkpoint.chain.clone(), one.checkpoint.name.clone()));
    for pair in named.chain(there) {
        if !expected.contains(&pair) {
            expected.push(pair);
        }
    }
    expected
}

/// Whether a bitmap is neither a checkpoint of ours nor part of a session.
#[must_use]
pub fn is_foreign(bitmap: &str) -> bool {
    Checkpoint::from_bitmap(bitmap).is_none() && !bitmap.starts_with(crate::qemu::step::PREFIX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::checkpoint::Mark;
    use crate::qemu::layer::Layer;

    pub(crate) const SIZE: u64 = 1 << 20;

    pub(crate) fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// A checkpoint `name` of chain `c` that is made on disk `d`, in the image `file`.
    pub(crate) fn checkpoint(text: &str, time_ms: u64, file: &str) -> Checkpoint {
        Checkpoint {
            chain: name("c"),
            name: name(text),
            size: SIZE,
            time_ms,
            id: Some(Id::parse(&format!("{text}{time_ms}")).unwrap()),
            owner: Mark::of(&["vm", "d"]),
            image: Mark::of(&[file]),
        }
    }

    pub(crate) fn bitmap(checkpoint: &Checkpoint) -> Bitmap {
        Bitmap {
            name: checkpoint.bitmap(),
            count: 65536,
            granularity: 65536,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        }
    }

    /// Disk `d` of these images (their files' names, and bitmaps), its own first.
    pub(crate) fn disk(layers: &[(&str, &[Bitmap])]) -> Disk {
        let layer = |(file, bitmaps): &(&str, &[Bitmap])| Layer {
            node: format!("node-{file}"),
            image: Mark::of(&[file]),
            bitmaps: bitmaps.to_vec(),
            allocated: Some(4096),
        };
        Disk {
            stops_when_full: true,
            id: "d".into(),
            node: format!("node-{}", layers[0].0),
            format: "qcow2".into(),
            file: Some(layers[0].0.into()),
            size: SIZE,
            qdev: None,
            persistent_bitmaps: true,
            iothread: None,
            owner: Mark::of(&["vm", "d"]),
            layers: layers.iter().map(layer).collect(),
            excluded: None,
        }
    }

    fn health_of(layers: &[(&str, &[Bitmap])]) -> Health {
        find(&disk(layers), &name("c"), &name("a"), None)
            .unwrap()
            .health
    }

    #[test]
    fn the_picture_of_images_holds() {
        let a = bitmap(&checkpoint("a", 1, "base"));
        let a = std::slice::from_ref(&a);
        assert_eq!(health_of(&[("base", a)]), Health::Usable);
        assert_eq!(health_of(&[("top", a), ("base", a)]), Health::Usable);
        assert_eq!(
            health_of(&[("top", a), ("mid", a), ("base", a)]),
            Health::Usable
        );
        assert_eq!(health_of(&[("top", a)]), Health::Mismatch);
        assert_eq!(
            health_of(&[("top", &[]), ("base", a)]),
            Health::OnBackingImage
        );
        assert_eq!(
            health_of(&[("top", a), ("mid", &[]), ("base", a)]),
            Health::OnBackingImage
        );
    }

    #[test]
    fn each_state_of_a_bitmap_has_its_word() {
        let good = checkpoint("a", 1, "base");
        let with = |change: fn(&mut Bitmap)| {
            let mut bitmap = bitmap(&good);
            change(&mut bitmap);
            health_of(&[("base", &[bitmap])])
        };
        assert_eq!(with(|_| {}), Health::Usable);
        assert_eq!(with(|one| one.inconsistent = true), Health::Inconsistent);
        assert_eq!(with(|one| one.busy = true), Health::Busy);
        assert_eq!(with(|one| one.recording = false), Health::NotRecording);
        let named = |checkpoint: Checkpoint| health_of(&[("base", &[bitmap(&checkpoint)])]);
        let without = |checkpoint: &Checkpoint| checkpoint.clone();
        assert_eq!(
            named(Checkpoint {
                id: None,
                ..without(&good)
            }),
            Health::Gap
        );
        assert_eq!(
            named(Checkpoint {
                size: SIZE / 2,
                ..without(&good)
            }),
            Health::SizeChanged
        );
        assert_eq!(
            named(Checkpoint {
                owner: Mark::of(&["vm", "e"]),
                ..without(&good)
            }),
            Health::Mismatch
        );
    }

    #[test]
    fn an_id_decides_on_the_disk_and_not_on_the_image() {
        let elsewhere = Checkpoint {
            owner: Mark::of(&["another vm", "x"]),
            ..checkpoint("a", 1, "base")
        };
        let here = bitmap(&elsewhere);
        let health = |file: &str, id: &str| {
            let disk = disk(&[(file, std::slice::from_ref(&here))]);
            let id = Id::parse(id).unwrap();
            find(&disk, &name("c"), &name("a"), Some(&id))
                .unwrap()
                .health
        };
        assert_eq!(health("base", "a1"), Health::Usable);
        assert_eq!(health("base", "a2"), Health::Mismatch);
        assert_eq!(health("moved", "a1"), Health::Mismatch);
    }

    #[test]
    fn grown_space_is_dirty_and_no_sum_is_larger_than_the_disk() {
        let small = Checkpoint {
            size: SIZE / 2,
            ..checkpoint("a", 1, "base")
        };
        let disk_of = |count: u64| {
            let one = Bitmap {
                count,
                ..bitmap(&small)
            };
            disk(&[("base", &[one])])
        };
        let dirty = |disk: &Disk| checkpoints(disk)[0].dirty_bytes(disk);
        assert_eq!(dirty(&disk_of(65536)), Some(SIZE / 2 + 65536));
        assert_eq!(dirty(&disk_of(u64::MAX)), Some(SIZE));
    }

    #[test]
    fn chains_do_not_see_each_other_and_what_one_disk_has_the_other_lacks() {
        let other = Checkpoint {
            chain: name("x"),
            ..checkpoint("a", 1, "base")
        };
        let foreign = Bitmap {
            name: "theirs".into(),
            ..bitmap(&other)
        };
        let session = Bitmap {
            name: "qf-abcdefghij-0-new".into(),
            ..bitmap(&other)
        };
        let mine = bitmap(&checkpoint("b", 2, "base"));
        let full = disk(&[("base", &[bitmap(&other), mine, foreign, session])]);
        let empty = Disk {
            id: "e".into(),
            ..disk(&[("base", &[])])
        };
        let disks = [full, empty];
        let told = |scope: &Scope| -> Vec<Vec<String>> {
            let word = |entry: &Entry<'_>| match entry {
                Entry::Ours(found) => {
                    format!("{}/{}", found.checkpoint.chain, found.checkpoint.name)
                }
                Entry::Missing(chain, name) => format!("no {chain}/{name}"),
                Entry::Foreign(bitmap) => format!("foreign {}", bitmap.name),
            };
            let lists = list(&disks, scope).into_iter();
            lists
                .map(|(_, entries)| entries.iter().map(word).collect())
                .collect()
        };
        let scope = Scope {
            chain: Some(name("c")),
            names: None,
        };
        assert_eq!(
            told(&scope),
            [vec!["c/b", "foreign theirs"], vec!["no c/b"]]
        );
        assert_eq!(
            told(&Scope::default()),
            [
                vec!["x/a", "c/b", "foreign theirs"],
                vec!["no x/a", "no c/b"]
            ]
        );
        let named = Scope {
            chain: Some(name("c")),
            names: Some(vec![name("a")]),
        };
        assert_eq!(told(&named), [["no c/a"], ["no c/a"]]);
    }
}
