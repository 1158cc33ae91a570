//! The types against the specification, the schema, and JSON.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;

use proptest::prelude::*;
use qemu_fleece_protocol::backup::{BeginParams, DiskChoice};
use qemu_fleece_protocol::envelope::Request;
use qemu_fleece_protocol::record::Record;
use qemu_fleece_protocol::stream::Reader;
use qemu_fleece_protocol::{
    Code, MAX_CHECKPOINTS, MAX_EXTENTS, MAX_LINE_BYTES, MAX_NAME_BYTES, MAX_PAYLOAD_BYTES,
    MAX_REQUESTS, schema,
};
use serde_json::{Value, json};

fn readme() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

fn word<T: serde::Serialize>(value: T) -> String {
    serde_json::to_value(value)
        .unwrap()
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn the_error_table_lists_each_code_with_its_action() {
    let readme = readme();
    let rows: Vec<(String, String)> = readme
        .split("| code | action | meaning |")
        .nth(1)
        .unwrap()
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line
                .split('|')
                .map(|cell| cell.trim().trim_matches('`'))
                .collect();
            (cells[1].to_owned(), cells[2].to_owned())
        })
        .collect();
    let codes: Vec<(String, String)> = Code::ALL
        .iter()
        .map(|code| (code.name().to_owned(), word(code.action())))
        .collect();
    assert_eq!(rows, codes);
    for code in Code::ALL {
        assert_eq!(word(code), code.name());
    }
}

#[test]
fn the_specification_tells_the_limits_that_hold() {
    let readme = readme();
    assert_eq!(
        (
            MAX_LINE_BYTES,
            MAX_PAYLOAD_BYTES,
            MAX_REQUESTS,
            MAX_NAME_BYTES,
            MAX_CHECKPOINTS,
            MAX_EXTENTS
        ),
        (16 << 20, 1 << 20, 32, 64, 128, 262_144)
    );
    for text in [
        "`max_line_bytes` (16 MiB)",
        "`max_payload_bytes` (1 MiB)",
        "`max_requests` (32)",
        "`max_name_bytes` (64)",
        "`max_checkpoints` (128)",
        "`max_extents` (262144)",
    ] {
        assert!(readme.contains(text), "{text}");
    }
}

#[test]
fn the_schema_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/v1.json");
    let fresh = format!(
        "{}\n",
        serde_json::to_string_pretty(&schema::schema()).unwrap()
    );
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == fresh,
        "run `just schema`"
    );
}

#[test]
fn the_schema_has_each_method_of_the_specification_and_closes_parameters() {
    let schema = schema::schema();
    let readme = readme();
    for (name, method) in schema["methods"].as_object().unwrap() {
        assert!(readme.contains(name.as_str()), "{name} is not specified");
        let params = method["params"]["$ref"]
            .as_str()
            .unwrap()
            .trim_start_matches("#/$defs/");
        assert_eq!(
            schema["$defs"][params]["additionalProperties"],
            json!(false),
            "{params}"
        );
        let result = method["result"]["$ref"]
            .as_str()
            .unwrap()
            .trim_start_matches("#/$defs/");
        assert_eq!(
            schema["$defs"][result]["additionalProperties"],
            Value::Null,
            "{result}"
        );
    }
    assert_eq!(schema["methods"].as_object().unwrap().len(), 29);
}

#[test]
fn absent_null_and_a_name_are_three_bases() {
    let read = |text: &str| serde_json::from_str::<DiskChoice>(text).unwrap().base;
    assert_eq!(read(r#"{"disk":"a"}"#), None);
    assert_eq!(read(r#"{"disk":"a","base":null}"#), Some(None));
    assert_eq!(read(r#"{"disk":"a","base":"b"}"#), Some(Some("b".into())));
    for base in [None, Some(None), Some(Some("b".to_owned()))] {
        let choice = DiskChoice {
            disk: "a".into(),
            base,
            base_id: None,
        };
        let text = serde_json::to_string(&choice).unwrap();
        assert_eq!(serde_json::from_str::<DiskChoice>(&text).unwrap(), choice);
    }
}

#[test]
fn unknown_members_are_refused_in_parameters_and_ignored_in_records() {
    let typo = r#"{"monitor":"/m","stric":true}"#;
    assert!(
        serde_json::from_str::<BeginParams>(typo)
            .unwrap_err()
            .to_string()
            .contains("stric")
    );
    let record = r#"{"kind":"same","offset":0,"length":1,"later":{}}"#;
    assert_eq!(
        serde_json::from_str::<Record>(record).unwrap(),
        Record::Same {
            offset: 0,
            length: 1
        }
    );
}

#[test]
fn each_record_survives_json() {
    for text in [
        r#"{"kind":"begin","format":1,"disk":"d","size":1,"mode":"incremental","base":"a","checkpoint":"b","granularity":65536,"offset":9}"#,
        r#"{"kind":"begin","format":1,"disk":"d","size":1,"mode":"full","reason":"base_missing","granularity":65536}"#,
        r#"{"kind":"data","offset":0,"length":1,"crc32":4294967295}"#,
        r#"{"kind":"zero","offset":0,"length":1,"hole":true}"#,
        r#"{"kind":"zero","offset":0,"length":1}"#,
        r#"{"kind":"same","offset":18446744073709551615,"length":1}"#,
        r#"{"kind":"end","records":0,"data_bytes":0,"zero_bytes":0,"same_bytes":0,"digest":""}"#,
        r#"{"kind":"failed","code":"of_a_later_version","action":"retry","offset":0}"#,
    ] {
        let record: Record = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&record).unwrap(), text);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(bytes: Vec<u8>) {
        let _request = Request::parse(&bytes);
        let mut reader = Reader::default();
        reader.push(&bytes);
        while let Ok(Some(_)) = reader.next_unit() {}
        let _end = reader.finish();
    }

    /// One changed byte is refused, or changes nothing that a restore goes by.
    #[test]
    fn a_changed_byte_never_changes_the_image(at: prop::sample::Index, change in 1u8..) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/valid/chain.stream");
        let good = std::fs::read(folder).unwrap();
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= change;
        if let Some(records) = accepted(&bad) {
            prop_assert_eq!(records, accepted(&good).unwrap());
        }
    }
}

/// What a restore goes by, of a chain that is accepted.
fn accepted(bytes: &[u8]) -> Option<Vec<(String, Option<Vec<u8>>)>> {
    let mut reader = Reader::default();
    reader.push(bytes);
    let mut records = Vec::new();
    while let Some((record, payload)) = reader.next_unit().ok()? {
        let told = match record {
            Record::Begin(begin) => format!(
                "{} {} {:?} {:?}",
                begin.disk, begin.size, begin.base, begin.checkpoint
            ),
            // Whether zeros were a hole is a hint.
            Record::Zero { offset, length, .. } => format!("zero {offset} {length}"),
            other => serde_json::to_string(&other).unwrap(),
        };
        records.push((told, payload));
    }
    reader.finish().ok()?;
    Some(records)
}
