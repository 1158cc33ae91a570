//! Restore, with the real qemu-storage-daemon.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use qemu_fleece_protocol::Record;
use qemu_fleece_protocol::stream::Reader;
use serde_json::{Value, json};

use crate::support::Plugin;

/// A record and its payload.
type Unit = (Record, Option<Vec<u8>>);

/// The records of a vector, with their payloads.
fn vector(name: &str) -> Vec<Unit> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../protocol/vectors/valid")
        .join(name);
    let mut reader = Reader::default();
    reader.push(&std::fs::read(path).unwrap());
    let mut units = Vec::new();
    while let Some(unit) = reader.next_unit().unwrap() {
        units.push(unit);
    }
    units
}

fn begin(plugin: &mut Plugin, target: &Path, format: &str, size: u64) -> Value {
    let params = json!({"target": target, "format": format, "size": size});
    plugin.call(1, "restore.begin", params)
}

/// Sends all records without waiting; the answers, in the order of the requests.
fn feed(plugin: &mut Plugin, restore: &Value, units: &[Unit]) -> Vec<Value> {
    for (id, (record, payload)) in (100..).zip(units) {
        let params = json!({"restore": restore, "record": record});
        match payload {
            Some(payload) => plugin.ask_with(id, "restore.write", params, payload),
            None => plugin.ask(id, "restore.write", params),
        }
    }
    let mut answers: Vec<Value> = units.iter().map(|_| plugin.answer()).collect();
    answers.sort_by_key(|answer| answer["id"].as_u64());
    answers
}

fn names(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_chain_becomes_an_image_of_either_format() {
    let truth = [&[b'a'; 512][..], &[b'a'; 512], &[0; 512], &[0; 512]].concat();
    for format in ["raw", "qcow2"] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("disk");
        let mut plugin = Plugin::ready("framed");
        let restore = begin(&mut plugin, &target, format, 2048)["result"]["restore"].clone();
        let answers = feed(&mut plugin, &restore, &vector("chain.stream"));
        assert!(
            answers.iter().all(|answer| answer["result"].is_object()),
            "{answers:?}"
        );
        assert!(!target.exists(), "only with finish");
        let done = plugin.call(2, "restore.finish", json!({"restore": restore}));
        assert_eq!(
            done["result"],
            json!({"target": target, "size": 2048, "streams": 2, "data_bytes": 1536, "checkpoint": "two"})
        );
        let raw = folder.path().join("raw");
        let convert = ["convert", "-f", format, "-O", "raw"];
        assert!(
            Command::new("qemu-img")
                .args(convert)
                .args([&target, &raw])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(std::fs::read(&raw).unwrap(), truth);
        assert_eq!(
            plugin.call(3, "shutdown", json!({}))["result"]["aborted"],
            json!([])
        );
        assert!(plugin.is_clean());
    }
}

#[test]
fn a_huge_sparse_disk_takes_no_room() {
    let folder = tempfile::tempdir().unwrap();
    for (format, most) in [("raw", 0), ("qcow2", 1 << 20)] {
        let target = folder.path().join(format);
        let mut plugin = Plugin::ready("framed");
        // 16 TiB is what ext4 can hold.
        let size = 1u64 << 40;
        let mut units = vector("huge_sparse.stream");
        let begin_record = match &mut units[0].0 {
            Record::Begin(begin) => {
                begin.size = size;
                begin.clone()
            }
            other => panic!("{other:?}"),
        };
        let mut writer = qemu_fleece_protocol::stream::Writer::new(&begin_record);
        units[1].0 = writer.zero(size, true);
        units[2].0 = Record::End(writer.end());
        let restore = begin(&mut plugin, &target, format, size)["result"]["restore"].clone();
        feed(&mut plugin, &restore, &units);
        let done = plugin.call(2, "restore.finish", json!({"restore": restore}));
        assert_eq!(done["result"]["size"], size, "{done}");
        assert!(
            std::fs::metadata(&target).unwrap().blocks() * 512 <= most,
            "{format}"
        );
    }
}

#[test]
fn damage_is_named_and_leaves_nothing() {
    let spoil = |change: fn(&mut Vec<Unit>)| {
        let mut units = vector("chain.stream");
        change(&mut units);
        units
    };
    for (units, stream, offset) in [
        (spoil(|units| units[1].1.as_mut().unwrap()[5] ^= 1), 0, 0),
        (spoil(|units| units.swap(1, 2)), 0, 0),
        (spoil(|units| drop(units.remove(2))), 0, 512),
        (spoil(|units| units.truncate(9)), 1, 1024),
        (spoil(|units| drop(units.drain(..6))), 0, 0),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut plugin = Plugin::ready("framed");
        let restore =
            begin(&mut plugin, &folder.path().join("disk"), "raw", 2048)["result"]["restore"]
                .clone();
        let mut answers = feed(&mut plugin, &restore, &units);
        answers.push(plugin.call(2, "restore.finish", json!({"restore": restore})));
        let mut errors = answers
            .iter()
            .filter(|answer| answer["error"].is_object())
            .map(|answer| &answer["error"]["data"]);
        let first = errors.next().unwrap();
        assert_eq!(
            (&first["code"], &first["state_left"]),
            (&json!("stream_damaged"), &json!("aborted"))
        );
        assert_eq!(
            (&first["stream"], &first["offset"]),
            (&json!(stream), &json!(offset))
        );
        assert!(errors.all(|error| error["code"] == "unknown_restore"));
        assert_eq!(names(folder.path()), [""; 0]);
        plugin.lives();
        assert!(plugin.is_clean());
    }
}

#[test]
fn targets_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("taken");
    std::fs::write(&taken, "x").unwrap();
    std::os::unix::fs::symlink("/none", folder.path().join("link")).unwrap();
    let mut plugin = Plugin::ready("framed");
    for (target, code) in [
        (taken.clone(), "target_exists"),
        (folder.path().join("link"), "target_exists"),
        (folder.path().join("none/disk"), "target_mismatch"),
        ("disk".into(), "invalid_params"),
        ("/".into(), "invalid_params"),
    ] {
        plugin.ask(
            1,
            "restore.begin",
            json!({"target": target, "format": "raw", "size": 512}),
        );
        plugin.refuses(code, json!(1));
    }
    plugin.ask(
        1,
        "restore.begin",
        json!({"target": taken, "format": "vmdk", "size": 512}),
    );
    plugin.refuses("invalid_params", json!(1));
    // Another size than the stream's.
    let restore =
        begin(&mut plugin, &folder.path().join("disk"), "raw", 4096)["result"]["restore"].clone();
    let answers = feed(&mut plugin, &restore, &vector("chain.stream")[..1]);
    assert_eq!(answers[0]["error"]["data"]["code"], "stream_damaged");
    // A file that appears meanwhile is not overwritten.
    let late = folder.path().join("late");
    let restore = begin(&mut plugin, &late, "raw", 2048)["result"]["restore"].clone();
    feed(&mut plugin, &restore, &vector("full.stream"));
    std::fs::write(&late, "mine").unwrap();
    plugin.ask(2, "restore.finish", json!({"restore": restore}));
    plugin.refuses("target_exists", json!(2));
    assert_eq!(std::fs::read(&late).unwrap(), b"mine");
    assert_eq!(names(folder.path()).len(), 3);
}

#[test]
fn abort_and_end_of_file_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut plugin = Plugin::ready("inline");
    let restore =
        begin(&mut plugin, &folder.path().join("disk"), "qcow2", 2048)["result"]["restore"].clone();
    assert_eq!(names(folder.path()).len(), 1);
    assert_eq!(
        plugin.call(2, "restore.abort", json!({"restore": restore}))["result"],
        json!({"leftovers": []})
    );
    assert_eq!(names(folder.path()), [""; 0]);
    plugin.ask(3, "restore.abort", json!({"restore": restore}));
    plugin.refuses("unknown_restore", json!(3));
    begin(&mut plugin, &folder.path().join("disk"), "qcow2", 2048);
    plugin.stdin = None;
    assert_eq!(plugin.exit_code(), Some(3));
    assert_eq!(names(folder.path()), [""; 0]);
    assert!(plugin.is_clean());
}

#[test]
fn no_storage_daemon_no_restore() {
    let folder = tempfile::tempdir().unwrap();
    for program in ["/none/qemu-storage-daemon", "false", "/"] {
        let mut plugin = Plugin::with(&["--storage-daemon", program]);
        plugin.ask(
            1,
            "restore.begin",
            json!({"target": folder.path().join("disk"), "format": "raw", "size": 512}),
        );
        plugin.refuses("storage_daemon_failed", json!(1));
        assert_eq!(names(folder.path()), [""; 0]);
        assert!(plugin.is_clean());
    }
}
