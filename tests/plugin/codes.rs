//! Each code of the specification is produced by a test.

use std::path::Path;

use qemu_fleece_protocol::Code;

/// A defect of ours: no test can produce it without making one.
const UNREACHABLE: &[Code] = &[Code::Internal];

#[test]
fn each_is_named_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tests = String::new();
    for folder in ["tests/plugin", "tests/oracle"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|ending| ending == "rs" || ending == "py")
            {
                tests.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let missing: Vec<&str> = Code::ALL
        .iter()
        .filter(|code| !UNREACHABLE.contains(code))
        .map(|code| code.name())
        .filter(|name| !tests.contains(&format!("\"{name}\"")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
