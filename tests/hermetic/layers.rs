//! The picture in ARCHITECTURE.md, held against the code: who may name whom.

use std::path::{Path, PathBuf};

/// (files, words that none of them may have, why)
const RULES: &[(&[&str], &[&str], &str)] = &[
    (
        &["protocol/src"],
        &[
            "tokio",
            "qapi",
            "rustix",
            "qemu_fleece_engine",
            "std::fs",
            "std::net",
            "std::io",
        ],
        "the protocol is pure",
    ),
    (
        &["src"],
        &["qemu_fleece_protocol", "std::io::stdin", "std::io::stdout"],
        "the engine knows no wire",
    ),
    (
        &["src/nbd"],
        &[
            "crate::qemu",
            "crate::session",
            "crate::view",
            "crate::plan",
        ],
        "nbd stands on its own",
    ),
    (
        &["src/qemu"],
        &["crate::nbd", "crate::session", "crate::view", "crate::plan"],
        "qemu stands on its own",
    ),
    (
        &[
            "src/plan.rs",
            "src/saved.rs",
            "src/chain.rs",
            "src/change.rs",
            "src/join.rs",
            "src/checkpoint.rs",
            "src/consumption.rs",
            "src/extent.rs",
            "src/chunk.rs",
            "src/qemu/step.rs",
            "src/qemu/layer.rs",
            "src/qemu/line.rs",
            "src/nbd/wire.rs",
            "src/nbd/reply.rs",
            "src/nbd/status.rs",
            "src/nbd/ledger.rs",
        ],
        &["tokio", "rustix", "std::fs", "std::net", ".await"],
        "these are pure",
    ),
    (
        &[
            "src/checkpoint.rs",
            "src/extent.rs",
            "src/buffer.rs",
            "src/chunk.rs",
            "src/error.rs",
        ],
        &[
            "crate::qemu",
            "crate::nbd",
            "crate::session",
            "crate::plan",
            "crate::view",
        ],
        "the bottom imports nothing above it",
    ),
    (
        &[
            "src/plan.rs",
            "src/chain.rs",
            "src/change.rs",
            "src/join.rs",
            "src/manage.rs",
            "src/repair.rs",
            "src/estimate.rs",
            "src/paint.rs",
            "src/redefine.rs",
            "src/view.rs",
            "src/walk.rs",
            "src/pull.rs",
            "src/map.rs",
            "src/export.rs",
            "src/entry.rs",
            "src/push",
            "src/target",
            "src/receive.rs",
            "src/receive",
            "src/claim.rs",
            "src/scratch.rs",
            "src/server.rs",
            "src/stake.rs",
            "src/standstill.rs",
            "src/reclaim.rs",
            "src/teardown.rs",
            "src/quiesce.rs",
            "src/guardian",
        ],
        &["crate::session::Session"],
        "parts of a session do not know it",
    ),
    (
        &[
            "src/relay.rs",
            "src/flow.rs",
            "src/file_call.rs",
            "src/file_lock.rs",
            "src/image.rs",
            "src/hidden.rs",
            "src/qcow2.rs",
        ],
        &["crate::qemu", "crate::nbd", "crate::view"],
        "these know neither QEMU nor NBD",
    ),
    (
        &["src/guardian"],
        &[
            "crate::nbd",
            "crate::view",
            "crate::server",
            "crate::teardown",
        ],
        "the guardian's process lets go of a guest, and no more",
    ),
    (
        &["plugin/src/marks.rs", "plugin/src/input.rs"],
        &["qemu_fleece_engine"],
        "these know the wire only",
    ),
];

/// Files over 400 lines, and why they stay whole.
const LONG: &[(&str, &str)] = &[
    (
        "src/chain.rs",
        "what bitmaps say of checkpoints, with its tests",
    ),
    ("src/change.rs", "one function a method, with their tests"),
    ("src/join.rs", "merge and redefine, with their tests"),
    (
        "src/view.rs",
        "one disk's view: its connections, its gate, what is given back of it",
    ),
    (
        "src/qemu/discover.rs",
        "a disk: its name, what can be done with it, why it is left out",
    ),
    (
        "src/qemu/step.rs",
        "the commands and their names, with a test against QEMU's schema",
    ),
    (
        "src/nbd/client.rs",
        "one connection: the surface of the NBD client and its checks",
    ),
    (
        "src/nbd/reply.rs",
        "one reply and all that it may be, with its tests",
    ),
    (
        "protocol/src/stream.rs",
        "the rules of a stream, for its writer and its reader",
    ),
    ("plugin/src/requests.rs", "one function a method"),
    (
        "protocol/tests/messages.rs",
        "one value of each message of the protocol",
    ),
    (
        "tests/hermetic/nbd_lies.rs",
        "one test a lie of an NBD server",
    ),
    (
        "tests/hermetic/nbd_live.rs",
        "one test a thing that a connection does",
    ),
    (
        "tests/hermetic/nbd_server.rs",
        "a scripted NBD server, for all of its tests",
    ),
    ("tests/hermetic/qmp.rs", "one test a fault of a monitor"),
    (
        "tests/oracle/test_checkpoints.py",
        "one group of tests a method",
    ),
    (
        "tests/oracle/test_push_files.py",
        "one test a kind of file, and what is refused",
    ),
    (
        "tests/oracle/test_scratch.py",
        "all that can come of full scratch, of one guest",
    ),
    ("tests/oracle/test_security.py", "one test a promise"),
    (
        "tests/oracle/walk.py",
        "a walk and its model, which know each other's state",
    ),
    (
        "tests/qemu/nbd.rs",
        "one test a thing that QEMU's server does",
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = std::fs::read_dir(path).unwrap();
    let mut files: Vec<PathBuf> = entries
        .flat_map(|entry| sources(&entry.unwrap().path()))
        .collect();
    let is_source = |file: &PathBuf| {
        file.extension()
            .is_some_and(|ending| ending == "rs" || ending == "py")
    };
    files.retain(is_source);
    files
}

/// The code above the unit tests, without comments.
fn code(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn nobody_names_what_is_above_or_beside() {
    for (places, words, why) in RULES {
        for file in places.iter().flat_map(|place| sources(&root().join(place))) {
            let code = code(&file);
            for word in *words {
                assert!(
                    !code.contains(word),
                    "{} names {word}: {why}",
                    file.display()
                );
            }
        }
    }
}

#[test]
fn only_some_files_are_long_and_say_why() {
    let places = [
        "src",
        "plugin",
        "protocol",
        "tests",
        "integrations",
        "benches",
    ];
    let mut long: Vec<String> = places
        .iter()
        .flat_map(|place| sources(&root().join(place)))
        .filter(|file| std::fs::read_to_string(file).unwrap().lines().count() > 400)
        .map(|file| {
            file.strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    let mut known: Vec<String> = LONG.iter().map(|(file, _)| (*file).to_owned()).collect();
    long.sort();
    known.sort();
    assert_eq!(long, known);
}
