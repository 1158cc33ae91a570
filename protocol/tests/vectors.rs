//! The vectors: each valid chain is accepted, each damaged one refused where the
//! index says, however the bytes are cut.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qemu_fleece_protocol::stream::{Damage, Reader};
use serde::Deserialize;

#[derive(Deserialize)]
struct Entry {
    file: String,
    valid: bool,
    #[serde(default)]
    stream: usize,
    #[serde(default)]
    offset: u64,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

fn index(folder: &Path) -> Vec<Entry> {
    serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap()
}

/// What lies in the two folders of streams.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    ["valid", "damaged"]
        .iter()
        .flat_map(|kind| std::fs::read_dir(folder.join(kind)).unwrap())
        .map(|entry| entry.unwrap().path())
        .map(|path| path.strip_prefix(folder).unwrap().to_owned())
        .collect()
}

fn read(bytes: &[u8], piece: usize) -> Result<(), Damage> {
    let mut reader = Reader::default();
    for piece in bytes.chunks(piece) {
        reader.push(piece);
        while reader.next_unit()?.is_some() {}
    }
    reader.finish().map(drop)
}

#[test]
fn each_is_judged_as_the_index_says() {
    let folder = folder();
    let entries = index(&folder);
    assert!(entries.iter().filter(|entry| entry.valid).count() >= 18);
    assert!(entries.iter().filter(|entry| !entry.valid).count() >= 90);
    for Entry {
        file,
        valid,
        stream,
        offset,
    } in entries
    {
        let bytes = std::fs::read(folder.join(&file)).unwrap();
        // Byte by byte is slow on the one large file.
        let pieces: &[usize] = if bytes.len() > 100_000 {
            &[4096, usize::MAX]
        } else {
            &[1, 7, 4096, usize::MAX]
        };
        for piece in pieces {
            match read(&bytes, *piece) {
                Ok(()) => assert!(valid, "{file} is accepted, in pieces of {piece}"),
                Err(damage) => {
                    assert!(!valid, "{file} is refused: {damage}");
                    assert_eq!(
                        (damage.stream, damage.offset),
                        (stream, offset),
                        "{file}: {damage}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_files_are_what_the_independent_writer_makes() {
    let made = std::env::temp_dir().join(format!("fleece-vectors-{}", std::process::id()));
    std::fs::create_dir(&made).unwrap();
    let status = std::process::Command::new("python3")
        .arg(folder().join("make.py"))
        .arg(&made)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(
        std::fs::read(made.join("index.json")).unwrap(),
        std::fs::read(folder().join("index.json")).unwrap()
    );
    assert_eq!(
        files(&made),
        files(&folder()),
        "files that the index misses"
    );
    for entry in index(&made) {
        let (ours, theirs) = (
            std::fs::read(folder().join(&entry.file)).unwrap(),
            std::fs::read(made.join(&entry.file)).unwrap(),
        );
        assert!(
            ours == theirs,
            "{} is stale: run vectors/make.py",
            entry.file
        );
    }
    std::fs::remove_dir_all(&made).unwrap();
}
