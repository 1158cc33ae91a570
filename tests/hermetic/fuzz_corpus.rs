//! The fuzz targets over their committed inputs, on any toolchain: they stay true, and a defect
//! that a fuzzer has found stays away. `fuzz/README.md` tells how to look for more.

use std::path::Path;

#[path = "../../fuzz/src/lib.rs"]
#[allow(
    clippy::expect_used,
    unreachable_pub,
    reason = "a crate of its own, whose panics are its findings"
)]
mod targets;

use targets::{TARGETS, lines};

/// The committed inputs of a target.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(folder).unwrap();
    files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect()
}

#[test]
fn each_committed_input_holds() {
    for (name, run) in TARGETS {
        let inputs = corpus(name);
        assert!(!inputs.is_empty(), "{name} has no inputs");
        for input in inputs {
            run(&input);
        }
    }
}

/// Cut off, and with bytes that are wrong: a little of what a fuzzer does.
#[test]
fn what_is_near_them_holds_too() {
    for (name, run) in TARGETS {
        for input in corpus(name) {
            run(&input[..input.len() / 2]);
            let mut other = input.clone();
            let step = 1 + input.len() / 8;
            for (at, byte) in other.iter_mut().enumerate() {
                if at % step == step - 1 {
                    *byte = byte.wrapping_add(1);
                }
            }
            run(&other);
        }
    }
}

#[test]
fn each_method_and_each_target_is_among_them() {
    let schema = qemu_fleece_protocol::schema::schema();
    let mut methods: Vec<&str> = lines::METHODS.iter().map(|(name, _)| *name).collect();
    methods.sort_unstable();
    let mut known: Vec<&String> = schema["methods"].as_object().unwrap().keys().collect();
    known.sort_unstable();
    assert_eq!(methods, known);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml");
    let manifest = std::fs::read_to_string(manifest).unwrap();
    let built: Vec<&str> = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/"))
        .filter_map(|rest| rest.strip_suffix(".rs\""))
        .collect();
    let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, built);
}
