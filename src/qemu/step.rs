//! The commands that build a point in time, as JSON. Pure.
//!
//! They are written out rather than built from qapi's structs, whose every
//! absent option would have to be spelled; the tests hold each against qapi's
//! type, so that a misspelt member fails.

use serde_json::{Value, json};

/// The names of one disk's objects in a session. QEMU's limit for a node's name
/// is 31 bytes; these have at most 25.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    stem: String,
}

/// Bytes of a cluster, the grain of copies: QEMU's least, and the grain of our bitmaps.
pub const CLUSTER: u64 = 65536;

/// What all temporary objects' names start with.
pub const PREFIX: &str = "qf-";

impl Names {
    /// For the `index`-th disk of session `session` (10 letters or digits).
    #[must_use]
    pub fn new(session: &str, index: usize) -> Self {
        Self {
            stem: format!("{PREFIX}{session}-{index}"),
        }
    }

    /// The job that keeps the point in time.
    #[must_use]
    pub fn job(&self) -> String {
        self.stem.clone()
    }

    /// The filter that the job inserts above the disk.
    #[must_use]
    pub fn filter(&self) -> String {
        format!("{}-cbw", self.stem)
    }

    /// The node that reads as the point in time.
    #[must_use]
    pub fn view(&self) -> String {
        format!("{}-acc", self.stem)
    }

    /// The scratch image.
    #[must_use]
    pub fn scratch(&self) -> String {
        format!("{}-s", self.stem)
    }

    /// The scratch image's file.
    #[must_use]
    pub fn scratch_file(&self) -> String {
        format!("{}-f", self.stem)
    }

    /// The frozen copy of the base's bitmap.
    #[must_use]
    pub fn changes(&self) -> String {
        format!("{}-inc", self.stem)
    }

    /// The new checkpoint until it is committed.
    #[must_use]
    pub fn pending(&self) -> String {
        format!("{}-new", self.stem)
    }

    /// The export of the view for the host's own clients.
    #[must_use]
    pub fn public_export(&self) -> String {
        format!("{}-x", self.stem)
    }

    /// The bitmap, on the view, of that export.
    #[must_use]
    pub fn public_bitmap(&self) -> String {
        format!("{}-xb", self.stem)
    }

    /// The job that pushes the view.
    #[must_use]
    pub fn push(&self) -> String {
        format!("{}-push", self.stem)
    }

    /// The filter that this job puts above the view.
    #[must_use]
    pub fn push_filter(&self) -> String {
        format!("{}-pf", self.stem)
    }

    /// The bitmap, on the view, of what it pushes.
    #[must_use]
    pub fn push_bitmap(&self) -> String {
        format!("{}-pb", self.stem)
    }

    /// The node that it writes to; its export, to be flushed by.
    #[must_use]
    pub fn target(&self) -> String {
        format!("{}-t", self.stem)
    }

    /// The file below that.
    #[must_use]
    pub fn target_file(&self) -> String {
        format!("{}-tf", self.stem)
    }

    /// The credentials for the target's server.
    #[must_use]
    pub fn credentials(&self) -> String {
        format!("{}-tls", self.stem)
    }

    /// The note of a new file that a push has not named yet.
    #[must_use]
    pub fn partial(&self) -> String {
        format!("{}-tp", self.stem)
    }

    /// The note of how far its consumer is.
    #[must_use]
    pub fn progress(&self) -> String {
        format!("{}-at", self.stem)
    }

    /// A node that is written to for its dirty bitmap only; its export too.
    #[must_use]
    pub fn canvas(&self) -> String {
        format!("{}-p", self.stem)
    }
}

/// The session that an object of this name belongs to; `None`: it is not ours.
#[must_use]
pub fn session_of(name: &str) -> Option<&str> {
    let (session, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    Some(session)
}

/// The place, in its session, of the disk that an object of this name belongs to.
#[must_use]
pub fn place_of(name: &str) -> Option<usize> {
    let (_, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    rest.split('-').next()?.parse().ok()
}

/// The note of whose session `session` is.
#[must_use]
pub fn owner_note(session: &str) -> String {
    format!("{PREFIX}{session}-owner")
}

/// What the transaction does with one disk.
#[derive(Clone, Debug)]
pub struct Instant<'a> {
    /// The disk's node.
    pub node: &'a str,
    /// The disk's objects.
    pub names: &'a Names,
    /// The base's bitmaps as (node, name), and the granularity of the finest, in an
    /// incremental.
    pub base: Option<(&'a [(String, String)], u64)>,
    /// The granularity of the new checkpoint, where one is made.
    pub checkpoint: Option<u64>,
}

/// `transaction`: the point in time of all disks. Backup actions come first:
/// each drains its disk until the transaction ends, so that no write of an
/// iothread falls between the instant and the bitmaps. `breaks`: a copy that fails costs the
/// point in time, not the guest's write (QEMU 10.1 and later).
#[must_use]
pub fn point_in_time(disks: &[Instant<'_>], breaks: bool) -> Value {
    let backups = disks.iter().map(|disk| {
        let mut backup = json!({
            "job-id": disk.names.job(), "device": disk.node, "target": disk.names.scratch(),
            "sync": "none", "filter-node-name": disk.names.filter(), "auto-dismiss": false,
        });
        if breaks {
            backup["on-cbw-error"] = json!("break-snapshot");
        }
        json!({"type": "blockdev-backup", "data": backup})
    });
    let bitmaps = disks.iter().flat_map(|disk| {
        let new = disk
            .checkpoint
            .map(|grain| add_bitmap(disk.node, &disk.names.pending(), grain, false, false));
        let frozen = disk.base.into_iter().flat_map(|(base, grain)| {
            let name = disk.names.changes();
            let add = add_bitmap(disk.node, &name, grain, false, true);
            let merges = base
                .iter()
                .map(|(node, from)| merge_bitmap(disk.node, &name, node, from));
            std::iter::once(add).chain(merges).collect::<Vec<_>>()
        });
        new.into_iter().chain(frozen)
    });
    transaction(backups.chain(bitmaps).collect())
}

/// A checkpoint that is committed.
#[derive(Clone, Debug)]
pub struct Lasting<'a> {
    /// The disk's node.
    pub node: &'a str,
    /// The pending bitmap.
    pub pending: &'a str,
    /// The checkpoint's bitmap.
    pub bitmap: &'a str,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Whether the image stores it.
    pub persistent: bool,
}

/// `transaction`: pending checkpoints become lasting ones, on all disks or none.
/// The lasting one records before the pending one's bits are merged into it: a
/// write between is in one of them, or both.
#[must_use]
pub fn commit(disks: &[Lasting<'_>]) -> Value {
    let actions: Vec<Value> = disks
        .iter()
        .flat_map(|disk| {
            [
                add_bitmap(
                    disk.node,
                    disk.bitmap,
                    disk.granularity,
                    disk.persistent,
                    false,
                ),
                merge_bitmap(disk.node, disk.bitmap, disk.node, disk.pending),
                remove_bitmap(disk.node, disk.pending),
            ]
        })
        .collect();
    transaction(actions)
}

/// `transaction`: all of these actions, or none.
#[must_use]
pub fn transaction(actions: Vec<Value>) -> Value {
    json!({"actions": actions})
}

/// An action: a new bitmap.
#[must_use]
pub fn add_bitmap(
    node: &str,
    name: &str,
    granularity: u64,
    persistent: bool,
    disabled: bool,
) -> Value {
    json!({"type": "block-dirty-bitmap-add", "data": {
        "node": node, "name": name, "granularity": granularity, "persistent": persistent, "disabled": disabled,
    }})
}

/// An action: what bitmap `from` of `from_node` holds is added to `into`.
#[must_use]
pub fn merge_bitmap(node: &str, into: &str, from_node: &str, from: &str) -> Value {
    let from = json!({"node": from_node, "name": from});
    json!({"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": into, "bitmaps": [from]}})
}

/// An action: a bitmap goes.
#[must_use]
pub fn remove_bitmap(node: &str, name: &str) -> Value {
    json!({"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}})
}

/// An action: a bitmap records.
#[must_use]
pub fn enable_bitmap(node: &str, name: &str) -> Value {
    json!({"type": "block-dirty-bitmap-enable", "data": {"node": node, "name": name}})
}

/// An action: a bitmap does not record.
#[must_use]
pub fn disable_bitmap(node: &str, name: &str) -> Value {
    json!({"type": "block-dirty-bitmap-disable", "data": {"node": node, "name": name}})
}

/// `blockdev-add`: a node of the disk's size that takes writes and keeps nothing.
#[must_use]
pub fn canvas(names: &Names, size: u64) -> Value {
    json!({"driver": "null-co", "node-name": names.canvas(), "size": size, "read-zeroes": true})
}

/// `block-export-add`: that node over NBD.
#[must_use]
pub fn canvas_export(names: &Names) -> Value {
    json!({"type": "nbd", "id": names.canvas(), "node-name": names.canvas(), "name": names.canvas(), "writable": true})
}

/// `blockdev-add`: the file below the scratch image, which `keeps_room` or gives it back.
#[must_use]
pub fn scratch_file(names: &Names, filename: &str, keeps_room: bool) -> Value {
    let discard = if keeps_room { "ignore" } else { "unmap" };
    // No flush: scratch is worthless after a crash of the machine.
    json!({"driver": "file", "node-name": names.scratch_file(), "filename": filename,
        "discard": discard, "cache": {"no-flush": true}})
}

/// `blockdev-add`: the scratch image. With `cap`, it finds no room beyond so many bytes.
#[must_use]
pub fn scratch(names: &Names, cap: Option<u64>) -> Value {
    let file = match cap {
        None => json!(names.scratch_file()),
        Some(cap) => json!({"driver": "raw", "size": cap, "file": names.scratch_file()}),
    };
    json!({"driver": "qcow2", "node-name": names.scratch(), "file": file, "discard": "unmap"})
}

/// `blockdev-add`: the view of the point in time.
#[must_use]
pub fn view(names: &Names) -> Value {
    json!({"driver": "snapshot-access", "node-name": names.view(), "file": names.filter(), "discard": "unmap"})
}

/// `block-export-add`: the view over NBD, for us. Writable only for TRIM, which gives
/// parts of the view back; QEMU refuses every other write to it.
#[must_use]
pub fn export(names: &Names, node: &str, incremental: bool) -> Value {
    let mut export = json!({"type": "nbd", "id": names.job(), "node-name": names.view(),
        "name": names.view(), "writable": true});
    if incremental {
        export["bitmaps"] = json!([{"node": node, "name": names.changes()}]);
    }
    export
}

/// `block-export-add`: the view over NBD, read-only, for clients of the host's.
#[must_use]
pub fn public_export(names: &Names, name: &str, incremental: bool) -> Value {
    let view = names.view();
    let mut export = json!({"type": "nbd", "id": names.public_export(), "node-name": view,
        "name": name, "writable": false});
    if incremental {
        export["bitmaps"] = json!([{"node": view, "name": names.public_bitmap()}]);
    }
    export
}

/// What is pushed of a view.
#[derive(Clone, Debug)]
pub struct Push {
    /// Only what bitmap [`Names::push_bitmap`] of the view holds.
    pub by_bitmap: bool,
    /// Compressed clusters.
    pub compress: bool,
    /// Most bytes a second; 0: no limit.
    pub speed: u64,
    /// Writes under way at a time.
    pub workers: u64,
    /// Longest read of the view; 0: as QEMU likes.
    pub max_chunk: u64,
    /// The view forgets what was written.
    pub discard_source: bool,
}

/// `blockdev-backup`: the view to the target. Out of the point in time, not from the
/// disk: the guest does not wait for the target.
#[must_use]
pub fn push(names: &Names, push: &Push) -> Value {
    let mut job = json!({"job-id": names.push(), "device": names.view(), "target": names.target(),
        "filter-node-name": names.push_filter(), "auto-dismiss": false, "compress": push.compress,
        "speed": push.speed, "sync": "full",
        // Its end changes QEMU's nodes, and so do errors that end it: both wait for their turn.
        "auto-finalize": false, "on-source-error": "stop", "on-target-error": "stop",
        "x-perf": {"max-workers": push.workers, "max-chunk": push.max_chunk}});
    if push.by_bitmap {
        job["sync"] = json!("bitmap");
        job["bitmap"] = json!(names.push_bitmap());
        // The checkpoints are ours to keep.
        job["bitmap-mode"] = json!("never");
    }
    if push.discard_source {
        job["discard-source"] = json!(true);
    }
    job
}

/// `transaction`: bitmap `name` of the view, from bitmap `from` of `node`. Each user of a
/// bitmap needs a copy of its own: an export, and a job, keep it busy.
#[must_use]
pub fn view_bitmap(names: &Names, name: &str, granularity: u64, node: &str, from: &str) -> Value {
    let view = names.view();
    transaction(vec![
        add_bitmap(&view, name, granularity, false, true),
        merge_bitmap(&view, name, node, from),
    ])
}

/// `blockdev-add`: the file or block device that is pushed to.
#[must_use]
pub fn target_file(names: &Names, filename: &str, is_device: bool) -> Value {
    let driver = if is_device { "host_device" } else { "file" };
    json!({"driver": driver, "node-name": names.target_file(), "filename": filename, "discard": "unmap"})
}

/// `blockdev-add`: the image in that file, `size` bytes of it where that is less than all.
/// The image below is left out: nothing is read through this one.
#[must_use]
pub fn target_image(names: &Names, driver: &str, size: Option<u64>) -> Value {
    let mut image = json!({"driver": driver, "node-name": names.target(), "file": names.target_file(),
        "discard": "unmap", "detect-zeroes": "unmap"});
    if driver != "raw" {
        image["backing"] = Value::Null;
    }
    if let Some(size) = size {
        image["size"] = json!(size);
    }
    image
}

/// `blockdev-add`: an NBD server's export. One that cannot be written is opened all the
/// same, to be told apart from one that cannot be opened.
#[must_use]
pub fn target_server(names: &Names, server: &Value, export: &str) -> Value {
    json!({"driver": "nbd", "node-name": names.target(), "server": server, "export": export,
        "auto-read-only": true})
}

/// `block-export-add`: the target, to be flushed through. Who may not write flushes nothing.
#[must_use]
pub fn target_export(names: &Names) -> Value {
    json!({"type": "nbd", "id": names.target(), "node-name": names.target(), "name": names.target(),
        "writable": true})
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::qmp;
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    /// qapi's types drop members that QEMU's schema does not have.
    fn fits<T: DeserializeOwned + Serialize>(value: &Value) {
        let typed: T = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(&serde_json::to_value(&typed).unwrap(), value);
    }

    fn names() -> Names {
        Names::new("abcdefghij", 255)
    }

    #[test]
    fn all_commands_fit_qemus_schema() {
        let names = names();
        let base = [("a".to_owned(), "b".to_owned())];
        let disks = [
            Instant {
                node: "a",
                names: &names,
                base: Some((&base, 65536)),
                checkpoint: Some(65536),
            },
            Instant {
                node: "#block1",
                names: &names,
                base: None,
                checkpoint: None,
            },
        ];
        fits::<qmp::transaction>(&point_in_time(&disks, false));
        let lasting = Lasting {
            node: "a",
            pending: "p",
            bitmap: "b",
            granularity: 65536,
            persistent: true,
        };
        fits::<qmp::transaction>(&commit(&[lasting]));
        let actions = [
            add_bitmap("a", "b", 65536, true, false),
            merge_bitmap("a", "b", "c", "d"),
            enable_bitmap("a", "b"),
            disable_bitmap("a", "b"),
            remove_bitmap("a", "b"),
        ];
        fits::<qmp::transaction>(&transaction(actions.to_vec()));
        fits::<qmp::blockdev_add>(&canvas(&names, 1 << 40));
        fits::<qmp::block_export_add>(&canvas_export(&names));
        fits::<qmp::blockdev_add>(&scratch_file(&names, "/dev/fdset/1", false));
        fits::<qmp::blockdev_add>(&scratch_file(&names, "/dev/fdset/1", true));
        fits::<qmp::blockdev_add>(&scratch(&names, None));
        fits::<qmp::blockdev_add>(&scratch(&names, Some(1 << 20)));
        fits::<qmp::blockdev_add>(&view(&names));
        fits::<qmp::block_export_add>(&export(&names, "a", true));
        fits::<qmp::block_export_add>(&public_export(&names, "disk0", true));
    }

    #[test]
    fn all_commands_of_a_push_fit_qemus_schema() {
        let names = names();
        let how = Push {
            by_bitmap: true,
            compress: true,
            speed: 1,
            workers: 8,
            max_chunk: CLUSTER,
            discard_source: true,
        };
        fits::<qmp::blockdev_backup>(&push(&names, &how));
        fits::<qmp::transaction>(&view_bitmap(&names, "p", CLUSTER, "a", "b"));
        fits::<qmp::blockdev_add>(&target_file(&names, "/t", true));
        fits::<qmp::blockdev_add>(&target_image(&names, "raw", Some(512)));
        let mut image = target_image(&names, "qcow2", None);
        // serde takes null for absent; to QEMU it is "none".
        assert_eq!(image["backing"].take(), Value::Null);
        image.as_object_mut().unwrap().remove("backing");
        fits::<qmp::blockdev_add>(&image);
        let server = json!({"type": "unix", "path": "/s"});
        fits::<qmp::blockdev_add>(&target_server(&names, &server, "e"));
        fits::<qmp::block_export_add>(&target_export(&names));
    }

    #[test]
    fn backup_actions_come_first() {
        let names = names();
        let base = [("a".to_owned(), "b".to_owned())];
        let disk = Instant {
            node: "a",
            names: &names,
            base: Some((&base, 65536)),
            checkpoint: Some(65536),
        };
        let transaction = point_in_time(&[disk.clone(), disk], true);
        let kinds: Vec<&str> = transaction["actions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|action| action["type"].as_str().unwrap())
            .collect();
        let first_other = kinds
            .iter()
            .position(|kind| *kind != "blockdev-backup")
            .unwrap();
        assert_eq!(first_other, 2);
        assert!(!kinds[first_other..].contains(&"blockdev-backup"));
    }

    #[test]
    fn node_names_fit_qemus_limit() {
        let names = names();
        for name in [
            names.filter(),
            names.view(),
            names.scratch(),
            names.scratch_file(),
            names.canvas(),
            names.target(),
            names.target_file(),
            names.push_filter(),
        ] {
            assert!(name.len() <= 31, "{name}");
        }
    }
}
