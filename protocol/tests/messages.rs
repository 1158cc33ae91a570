//! Every message through JSON and back, and what becomes of members and words
//! that nobody knows.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fmt::Debug;

use qemu_fleece_protocol::envelope::{Id, Request, error_line, notification_line, result_line};
use qemu_fleece_protocol::{
    Action, Code, WireError, backup, checkpoint, consistency, error, event, export, hello, orphan,
    push, restore, schema, scratch, vm,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What every message can do.
trait Message: Serialize + DeserializeOwned + JsonSchema + PartialEq + Debug {}
impl<T: Serialize + DeserializeOwned + JsonSchema + PartialEq + Debug> Message for T {}

/// `value` once for each object in it, with a member more in that one. Not within a
/// record: it ignores what it does not know, also in parameters.
fn widened(value: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    match value {
        Value::Object(members) => {
            let mut wide = members.clone();
            wide.insert("later".into(), json!({"a": [1, null]}));
            all.push(Value::Object(wide));
            for (name, member) in members.iter().filter(|(name, _)| *name != "record") {
                for wide in widened(member) {
                    let mut copy = members.clone();
                    copy.insert(name.clone(), wide);
                    all.push(Value::Object(copy));
                }
            }
        }
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                for wide in widened(item) {
                    let mut copy = items.clone();
                    copy[at] = wide;
                    all.push(Value::Array(copy));
                }
            }
        }
        _ => {}
    }
    all
}

/// Reads and writes each example, and says the type's name in the schema.
fn survive<T: Message>(examples: &[Value]) -> String {
    for example in examples {
        let read: T = serde_json::from_value(example.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), *example);
    }
    T::schema_name().into_owned()
}

fn params<T: Message>(examples: &[Value]) -> String {
    for wide in examples.iter().flat_map(widened) {
        let line = json!({"jsonrpc": "2.0", "id": 1, "method": "m", "params": wide}).to_string();
        let refused = Request::parse(line.as_bytes()).unwrap().params::<T>();
        let error = refused.unwrap_err();
        assert_eq!(error.data.code, Code::InvalidParams, "{wide}");
        assert!(error.message.contains("later"), "{error}");
    }
    survive::<T>(examples)
}

fn result<T: Message>(examples: &[Value]) -> String {
    for example in examples {
        let known: T = serde_json::from_value(example.clone()).unwrap();
        for wide in widened(example) {
            assert_eq!(serde_json::from_value::<T>(wide).unwrap(), known);
        }
    }
    survive::<T>(examples)
}

fn all_params() -> Vec<String> {
    let record = json!({"kind": "zero", "offset": 0, "length": 1});
    vec![
        params::<hello::HelloParams>(&[
            json!({"protocols": [1, 2], "host": {"name": "h", "version": "1"}, "carrier": "framed"}),
        ]),
        params::<hello::NoParams>(&[json!({})]),
        params::<hello::CancelParams>(&[json!({"id": 7}), json!({"id": "seven"})]),
        params::<vm::InspectParams>(&[json!({"monitor": "/run/qmp"})]),
        params::<backup::BeginParams>(&[
            json!({"monitor": "/m", "chain": "default", "strict": false, "keep_unchanged": false, "keep_ms": 0}),
            json!({"monitor": "/m", "strict": true, "chain": "c", "base": "a", "checkpoint": "b", "scratch": {"dir": "/s", "disk_max_bytes": 1, "max_bytes": 2, "min_free_bytes": 3, "on_full": "wait"},
                "keep_unchanged": true, "keep_ms": 5,
                "disks": [{"disk": "d"}, {"disk": "e", "base": null}, {"disk": "f", "base": "c", "base_id": "i"}]}),
        ]),
        params::<consistency::Consistency>(&[
            json!({"kind": "crash"}),
            json!({"kind": "pause"}),
            json!({"kind": "agent", "socket": "/s", "policy": "require"}),
            json!({"kind": "agent", "socket": "tcp:h:1", "policy": "try", "deadline_ms": 100}),
        ]),
        params::<backup::BeginGroupParams>(&[json!({"members": [
            {"monitor": "/m", "chain": "default", "strict": false, "keep_unchanged": false, "keep_ms": 0},
        ]})]),
        params::<orphan::AttachParams>(&[json!({"monitor": "/m", "backup": "b"})]),
        params::<orphan::ReclaimParams>(&[
            json!({"monitor": "/m", "force": false}),
            json!({"monitor": "/m", "backups": ["b"], "force": true}),
        ]),
        params::<scratch::ScratchChoice>(&[json!({"on_full": "give_up"})]),
        params::<push::PushParams>(&[
            json!({"backup": "b", "disk": "d", "compress": false, "target": {"kind": "records"}}),
            json!({"backup": "b", "disk": "d", "compress": true, "speed": 1, "workers": 2, "discard_source": false,
                "timeout_ms": 1000, "target": {"kind": "file", "path": "/p", "format": "qcow2",
                    "backing": {"path": "q", "format": "raw"}}}),
            json!({"backup": "b", "disk": "d", "compress": false,
                "target": {"kind": "existing", "path": "fd:3", "format": "raw", "is_zero": true}}),
            json!({"backup": "b", "disk": "d", "compress": false,
                "target": {"kind": "nbd", "address": "unix:/s", "export": "e", "is_zero": false}}),
            json!({"backup": "b", "disk": "d", "compress": false,
                "target": {"kind": "nbd", "address": "tcp:h:1", "export": "", "is_zero": true,
                    "tls": {"kind": "x509", "dir": "/d", "hostname": "h"}}}),
            json!({"backup": "b", "disk": "d", "compress": false,
                "target": {"kind": "nbd", "address": "tcp:h:1", "export": "", "is_zero": true,
                    "tls": {"kind": "psk", "dir": "/d", "username": "u"}}}),
        ]),
        params::<push::Target>(&[json!({"kind": "records"})]),
        params::<push::Backing>(&[json!({"path": "p", "format": "raw"})]),
        params::<push::Tls>(&[
            json!({"kind": "psk", "dir": "/d"}),
            json!({"kind": "x509", "dir": "/d"}),
        ]),
        params::<export::ExportParams>(&[
            json!({"backup": "b", "disk": "d"}),
            json!({"backup": "b", "disk": "d", "socket": "fd:3"}),
        ]),
        params::<export::MapParams>(&[json!({"backup": "b", "disk": "d"})]),
        params::<backup::EstimateParams>(&[
            json!({"monitor": "/m", "chain": "default"}),
            json!({"monitor": "/m", "chain": "c", "base": "a", "disks": [{"disk": "d", "base_id": "i"}]}),
        ]),
        params::<checkpoint::ListParams>(&[
            json!({"monitor": "/m", "chain": "default", "all_chains": false}),
            json!({"monitor": "/m", "chain": "c", "all_chains": true, "disks": ["d"], "checkpoints": ["a"]}),
        ]),
        params::<checkpoint::CreateParams>(&[
            json!({"monitor": "/m", "chain": "default", "checkpoint": "a"}),
            json!({"monitor": "/m", "chain": "c", "checkpoint": "a", "disks": ["d"], "granularity": 4096}),
        ]),
        params::<checkpoint::DeleteParams>(&[
            json!({"monitor": "/m", "chain": "c", "checkpoints": ["a"], "disks": ["d"]}),
        ]),
        params::<checkpoint::ToggleParams>(&[
            json!({"monitor": "/m", "chain": "c", "checkpoint": "a", "disks": ["d"]}),
        ]),
        params::<checkpoint::MergeParams>(&[
            json!({"monitor": "/m", "chain": "c", "checkpoint": "a", "from": ["b"], "delete_sources": true, "disks": ["d"]}),
        ]),
        params::<checkpoint::RedefineParams>(&[
            json!({"monitor": "/m", "chain": "c", "checkpoint": "a", "granularity": 4096, "disks": [
                {"disk": "d", "changed": "all"}, {"disk": "e", "changed": "recorded", "id": "i", "time_ms": 1},
                {"disk": "f", "changed": [[0, 512], [4096, 1]]}]}),
        ]),
        params::<checkpoint::RedefineDisk>(&[json!({"disk": "d", "changed": "all"})]),
        params::<checkpoint::RepairParams>(&[
            json!({"monitor": "/m", "chain": "c", "all_chains": true, "disks": ["d"]}),
        ]),
        params::<backup::DiskChoice>(&[json!({"disk": "d", "base": null})]),
        params::<backup::ReadParams>(&[
            json!({"backup": "b", "disk": "d", "offset": 0, "release": "on_read"}),
            json!({"backup": "b", "disk": "d", "offset": 9, "release": "on_ack", "record_max": 65536}),
        ]),
        params::<backup::AckParams>(&[json!({"backup": "b", "disk": "d", "offset": 1_u64 << 63})]),
        params::<backup::CommitParams>(&[
            json!({"backup": "b"}),
            json!({"backup": "b", "disks": ["d"], "delete_checkpoints": ["a"]}),
        ]),
        params::<backup::AbortParams>(&[json!({"backup": "b"})]),
        params::<restore::RestoreBeginParams>(&[
            json!({"target": "/t", "format": "qcow2", "size": 512}),
        ]),
        params::<restore::RestoreWriteParams>(&[
            json!({"restore": "r", "record": record}),
            json!({"restore": "r", "record": {"kind": "data", "offset": 0, "length": 1, "crc32": 1}, "data": "YQ=="}),
        ]),
        params::<restore::RestoreParams>(&[json!({"restore": "r"})]),
        params::<hello::Host>(&[json!({"name": "h", "version": "1"})]),
    ]
}

fn all_others() -> Vec<String> {
    let limits = json!({"max_line_bytes": 1, "max_payload_bytes": 2, "max_requests": 3, "max_name_bytes": 4,
        "max_checkpoints": 5, "max_extents": 6});
    let plugin = json!({"name": "p", "version": "1"});
    let full = json!({"disk": "d", "size": 1, "planned": "incremental", "mode": "full", "reason": "base_missing",
        "tracking": "transient", "granularity": 65536, "changed_bytes": 1});
    let incremental = json!({"disk": "d", "size": 1, "planned": "incremental", "mode": "incremental",
        "base": "a", "checkpoint": "b", "checkpoint_id": "i", "tracking": "persistent", "granularity": 65536,
        "changed_bytes": 1});
    let room = json!({"free_bytes": 1, "asked_bytes": 2, "most_bytes": 3});
    let mut attached = incremental.clone();
    attached["resume"] = json!(5);
    attached["complete"] = json!(false);
    let checkpoint = json!({"checkpoint": "a", "health": "usable", "chain": "c", "id": "i", "time_ms": 1,
        "dirty_bytes": 2, "granularity": 3, "persistent": true, "recording": true, "memory_bytes": 4});
    let checkpoints = json!({"disk": "d", "size": 1, "tracking": "persistent",
        "checkpoints": [checkpoint, {"checkpoint": "b", "health": "missing", "chain": "c"}]});
    let estimate = json!({"disk": "d", "size": 1, "planned": "incremental", "mode": "full", "reason": "bitmap_lost",
        "changed_bytes": 1, "read_bytes": 1});
    let repaired = json!({"disk": "d", "removed": ["x"], "lost": [checkpoint], "usable": [checkpoint], "foreign": ["f"],
        "leftovers": ["l"]});
    let bare = json!({"disk": "d", "node": "n", "format": "raw", "file": null, "size": 1, "qdev": null,
        "iothread": null, "tracking": "transient", "excluded": null});
    let rich = json!({"disk": "d", "node": "n", "format": "qcow2", "file": "/f", "size": 1, "qdev": "q",
        "iothread": "i", "tracking": "persistent", "excluded": "read_only"});
    let error_data = json!({"code": "base_unusable", "action": "take_full", "state_left": "unchanged",
        "disk": "d", "offset": 1, "stream": 2, "reason": "base_busy", "supported": [1], "leftovers": ["l"]});
    let sizes = json!({"minimum": 1, "preferred": 4096, "maximum": 33554432});
    let begin = json!({"format": 1, "disk": "d", "size": 1, "mode": "full", "granularity": 1});
    let end =
        json!({"records": 1, "data_bytes": 2, "zero_bytes": 3, "same_bytes": 4, "digest": "d"});
    vec![
        result::<hello::HelloResult>(&[
            json!({"protocol": 1, "plugin": plugin, "carrier": "inline",
            "carriers": ["inline", "framed"], "features": ["f"], "limits": limits}),
        ]),
        result::<hello::Implementation>(&[plugin]),
        result::<hello::Limits>(&[limits]),
        result::<hello::PingResult>(&[json!({})]),
        result::<hello::CancelResult>(&[json!({"found": true})]),
        result::<hello::ShutdownResult>(&[json!({"aborted": ["b"], "leftovers": ["l"]})]),
        result::<vm::InspectResult>(&[
            json!({"qemu_version": "10.0.2", "name": null, "uuid": null, "status": null, "disks": [], "our_objects": []}),
            json!({"qemu_version": "10.0.2", "name": "n", "uuid": "u", "status": "running",
                "disks": [bare, rich], "our_objects": ["o"]}),
        ]),
        result::<vm::DiskInfo>(&[bare, rich]),
        result::<checkpoint::CheckpointInfo>(&[checkpoint]),
        result::<checkpoint::DisksResult>(&[json!({"disks": [checkpoints]})]),
        result::<checkpoint::DiskCheckpoints>(&[checkpoints]),
        result::<checkpoint::DeleteResult>(&[json!({"deleted": ["d/a"]})]),
        result::<checkpoint::RepairResult>(&[json!({"disks": [repaired], "open_backups": ["b"]})]),
        result::<checkpoint::RepairedDisk>(&[repaired]),
        result::<backup::EstimateResult>(&[json!({"disks": [estimate]})]),
        result::<backup::DiskEstimate>(&[estimate]),
        result::<backup::BeginResult>(&[
            json!({"backup": "b", "time_ms": 1, "scratch": room, "disks": [full, incremental]}),
            json!({"backup": "b", "time_ms": 1, "scratch": room, "disks": [], "consistency": {"kind": "agent", "frozen_ms": 5,
                "filesystems": 2}}),
        ]),
        result::<consistency::Reached>(&[
            json!({"kind": "crash", "reason": "agent_refused", "message": "why"}),
            json!({"kind": "pause", "paused_ms": 5}),
        ]),
        result::<scratch::ScratchRoom>(std::slice::from_ref(&room)),
        result::<scratch::OnFull>(&[json!("wait")]),
        result::<scratch::ScratchEvent>(&[
            json!("high"),
            json!("full"),
            json!("given_up"),
            json!("resumed"),
        ]),
        result::<scratch::ScratchParams>(&[
            json!({"backup": "b", "disk": "d", "event": "given_up", "scratch_bytes": 1, "paused_ms": 2}),
        ]),
        result::<orphan::AttachResult>(&[
            json!({"backup": "b", "time_ms": 1, "disks": [attached]}),
        ]),
        result::<orphan::AttachedDisk>(&[attached]),
        result::<orphan::ReclaimResult>(&[json!({"reclaimed": ["a"], "left": [
            {"backup": "b", "state": "alive"}, {"backup": "c", "state": "dead"},
            {"backup": "d", "state": "kept"}, {"backup": "e", "state": "unknown"},
        ], "leftovers": ["l"]})]),
        result::<orphan::LeftBackup>(&[json!({"backup": "b", "state": "alive"})]),
        result::<orphan::BackupState>(&[json!("alive")]),
        result::<backup::BeginGroupResult>(&[json!({"skew_us": 5, "backups": [
            {"backup": "b", "time_ms": 1, "scratch": room, "disks": [full, incremental]},
        ]})]),
        result::<backup::BackupDisk>(&[full, incremental]),
        result::<backup::ReadResult>(&[
            json!({"digest": "d", "read_bytes": 1, "scratch_peak": 2, "duration_ms": 3}),
        ]),
        result::<push::PushResult>(&[
            json!({"mode": "full", "copied_bytes": 1, "scratch_peak": 2, "duration_ms": 3}),
            json!({"mode": "incremental", "copied_bytes": 1, "scratch_peak": 2, "duration_ms": 3, "digest": "d"}),
        ]),
        result::<export::ExportResult>(&[
            json!({"address": "unix:/s", "export": "d", "uri": "nbd+unix:///d?socket=/s", "size": 1, "mode": "full",
                "readable": "all", "allocation_context": "base:allocation", "granularity": 1, "block_size": sizes}),
            json!({"address": "unix:/s", "export": "d", "uri": "nbd+unix:///d?socket=/s", "size": 1,
                "mode": "incremental", "readable": "changed", "allocation_context": "base:allocation",
                "changes_context": "qemu:dirty-bitmap:c", "granularity": 1, "block_size": sizes}),
        ]),
        result::<export::BlockSize>(std::slice::from_ref(&sizes)),
        result::<export::MapResult>(&[
            json!({"extents": 1, "data_bytes": 2, "zero_bytes": 3, "same_bytes": 4}),
        ]),
        result::<export::ExtentsParams>(&[json!({"stream": 1, "disk": "d",
            "extents": [[0, 1, "data"], [1, 1, "zero"], [2, 1, "same"]]})]),
        result::<backup::AckResult>(&[json!({"resume": 1})]),
        result::<backup::CommitResult>(&[
            json!({"committed": ["d"], "deleted": ["d/a"], "leftovers": []}),
        ]),
        result::<backup::AbortResult>(&[json!({"leftovers": ["l"]})]),
        result::<restore::RestoreBeginResult>(&[json!({"restore": "r"})]),
        result::<restore::RestoreWriteResult>(&[json!({"offset": 1})]),
        result::<restore::RestoreFinishResult>(&[
            json!({"target": "/t", "size": 1, "streams": 2, "data_bytes": 3, "checkpoint": "b"}),
            json!({"target": "/t", "size": 1, "streams": 2, "data_bytes": 3, "checkpoint": null}),
        ]),
        result::<event::RecordParams>(&[
            json!({"stream": 4, "record": {"kind": "same", "offset": 0, "length": 1}}),
            json!({"stream": "s", "record": {"kind": "data", "offset": 0, "length": 1, "crc32": 2}, "data": "YQ=="}),
        ]),
        result::<event::ProgressParams>(&[json!({"stream": 4, "disk": "d", "done": 1, "total": 2,
            "data_bytes": 3, "scratch_bytes": 4})]),
        result::<event::VmParams>(&[
            json!({"backup": "b", "event": "paused"}),
            json!({"backup": "b", "event": "io_error", "detail": "d"}),
        ]),
        result::<error::WireError>(&[json!({"code": -32000, "message": "m", "data": error_data})]),
        result::<error::ErrorData>(&[error_data]),
        result::<qemu_fleece_protocol::record::Begin>(&[begin]),
        result::<qemu_fleece_protocol::record::End>(&[end]),
    ]
}

/// Each word that the schema lists for `T` is read and written as it is.
fn words<T: Message>(defs: &Value) -> String {
    let name = T::schema_name().into_owned();
    let words: Vec<Value> = defs[&name]["oneOf"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word["const"].clone())
        .collect();
    assert!(words.iter().all(Value::is_string), "{name}");
    survive::<T>(&words)
}

fn all_words(defs: &Value) -> Vec<String> {
    vec![
        words::<Action>(defs),
        words::<Code>(defs),
        words::<error::StateLeft>(defs),
        words::<backup::Mode>(defs),
        words::<backup::FullReason>(defs),
        words::<backup::Release>(defs),
        words::<checkpoint::ChangedWord>(defs),
        words::<checkpoint::Health>(defs),
        words::<consistency::ConsistencyKind>(defs),
        words::<consistency::Policy>(defs),
        words::<event::VmEvent>(defs),
        words::<export::ExtentKind>(defs),
        words::<export::Readable>(defs),
        words::<hello::Carrier>(defs),
        words::<restore::Format>(defs),
        words::<vm::Tracking>(defs),
    ]
}

#[test]
fn every_type_of_the_schema_survives_json() {
    let defs = &schema::schema()["$defs"];
    let tested = [all_params(), all_others(), all_words(defs)].concat();
    let tested: BTreeSet<&str> = tested
        .iter()
        .map(String::as_str)
        // These have tests of their own, or are a choice of others.
        .chain(["Id", "Record", "Changed"])
        .collect();
    let known: BTreeSet<&str> = defs
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(tested, known);
}

#[test]
fn parameters_are_closed_in_the_schema_and_nothing_else_is() {
    let defs = &schema::schema()["$defs"];
    // A type of several kinds is closed where each kind is.
    let is_closed = |name: &String| match defs[name]["oneOf"].as_array() {
        Some(kinds) => kinds
            .iter()
            .all(|kind| kind["additionalProperties"] == json!(false)),
        None => defs[name]["additionalProperties"] == json!(false),
    };
    assert!(all_params().iter().all(is_closed));
    assert!(!all_others().iter().any(is_closed));
    assert!(!is_closed(&"Record".to_owned()));
}

#[test]
fn every_member_of_the_schema_is_described() {
    fn undescribed(value: &Value, found: &mut Vec<String>) {
        if let Some(members) = value["properties"].as_object() {
            for (name, member) in members {
                if member["description"].is_null() && member["const"].is_null() {
                    found.push(name.clone());
                }
            }
        }
        match value {
            Value::Object(members) => members.values().for_each(|each| undescribed(each, found)),
            Value::Array(items) => items.iter().for_each(|each| undescribed(each, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    undescribed(&schema::schema(), &mut found);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn an_id_stays_what_it_is() {
    for id in [
        Id::Number(0),
        Id::Number((1 << 53) - 1),
        Id::Text("0".into()),
    ] {
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<Id>(&text).unwrap(), id);
    }
}

/// The envelopes are written by hand-made types that the schema does not know.
#[test]
fn the_envelopes_are_json_rpc() {
    let read = |line: serde_json::Result<Vec<u8>>| -> Value {
        let line = line.unwrap();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice(&line).unwrap()
    };
    let id = Id::Text("a\nb".into());
    assert_eq!(
        read(result_line(&id, json!({}))),
        json!({"jsonrpc": "2.0", "id": "a\nb", "result": {}})
    );
    let error = WireError::new(Code::Cancelled, "m").left(error::StateLeft::BackupOpen);
    let data = json!({"code": "cancelled", "action": "retry", "state_left": "backup_open"});
    let told = json!({"code": -32000, "message": "m", "data": data});
    assert_eq!(
        read(error_line(None, &error)),
        json!({"jsonrpc": "2.0", "id": null, "error": told})
    );
    assert_eq!(
        read(error_line(Some(&Id::Number(3)), &error)),
        json!({"jsonrpc": "2.0", "id": 3, "error": told})
    );
    assert_eq!(
        read(notification_line("vm", json!({"a": 1}), None)),
        json!({"jsonrpc": "2.0", "method": "vm", "params": {"a": 1}})
    );
    assert_eq!(
        read(notification_line("record", json!({}), Some(9))),
        json!({"jsonrpc": "2.0", "method": "record", "params": {}, "payload_bytes": 9})
    );
}
