//! SECURITY.md names the test of each promise: they are there.

use std::path::Path;

/// What stands between `open` and `close`, each time.
fn between<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let parts = text.split(open).skip(1);
    parts.filter_map(|part| part.split(close).next()).collect()
}

#[test]
fn each_promise_has_a_test_that_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let table = text.split("| promise | test |").nth(1).unwrap();
    let rows = table.lines().skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 10);
    for row in rows {
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let names = between(tests, "`", "`").into_iter().step_by(2);
        let names: Vec<&str> = names.filter(|name| name.starts_with("test_")).collect();
        let files = between(tests, "](", ")");
        assert!(!names.is_empty() || !files.is_empty(), "no test: {row}");
        for file in files {
            assert!(root.join(file).exists(), "{file} is not there");
        }
        for name in names {
            let mut parts = name.split('.');
            let module = format!("tests/oracle/{}.py", parts.next().unwrap());
            let module = std::fs::read_to_string(root.join(module)).unwrap();
            let class = parts.next().map(|class| format!("class {class}("));
            let test = parts.next().map(|test| format!("    def {test}(self"));
            for word in class.into_iter().chain(test) {
                assert!(module.contains(&word), "{name}: there is no `{word}`");
            }
        }
    }
}
