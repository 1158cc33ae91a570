//! How the process starts and ends.

use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::support::Plugin;

fn print(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-fleece"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn shutdown_is_the_orderly_end() {
    let mut plugin = Plugin::ready("framed");
    assert_eq!(
        plugin.call(1, "shutdown", json!({}))["result"],
        json!({"aborted": [], "leftovers": []})
    );
    assert_eq!(plugin.exit_code(), Some(0));
}

#[test]
fn the_last_answer_is_never_lost() {
    // A race with the end of the process: it takes many to see it.
    for _ in 0..100 {
        let mut plugin = Plugin::ready("inline");
        plugin.ask(1, "shutdown", json!({}));
        assert_eq!(plugin.answer()["id"], 1);
    }
}

#[test]
fn end_of_file_without_it_is_a_dead_host() {
    for ready in [false, true] {
        let mut plugin = if ready {
            Plugin::ready("framed")
        } else {
            Plugin::silent()
        };
        plugin.stdin = None;
        assert_eq!(plugin.exit_code(), Some(3));
    }
}

#[test]
fn signals_end_it_in_order() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut plugin = Plugin::ready("framed");
        kill_process(Pid::from_child(&plugin.child), signal).unwrap();
        assert_eq!(plugin.exit_code(), Some(3), "{signal:?}");
    }
}

#[test]
fn a_closed_standard_output_is_a_dead_host() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = crate::support::command(folder.path()).spawn().unwrap();
    drop(child.stdout.take());
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"{}\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn unusable_command_lines_are_told() {
    for arguments in [
        &["--scratch"][..],
        &["backup"],
        &["--log", "x=y=z"],
        &["--log-format", "xml"],
    ] {
        assert_eq!(print(arguments).0, Some(2), "{arguments:?}");
    }
}

#[test]
fn a_person_at_a_terminal_gets_help() {
    // util-linux's script gives it a terminal.
    let binary = env!("CARGO_BIN_EXE_qemu-fleece");
    let output = Command::new("script")
        .args(["-qec", binary, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("Usage") && text.contains("qemu-fleece-host"),
        "{text}"
    );
}

#[test]
fn what_it_prints_of_itself() {
    let (code, help) = print(&["--help"]);
    assert_eq!(code, Some(0));
    let flags: Vec<&str> = help
        .split_whitespace()
        .filter(|word| word.starts_with("--"))
        .collect();
    for flag in [
        "--scratch-dir",
        "--runtime-dir",
        "--storage-daemon",
        "--log",
        "--log-format",
    ] {
        assert!(flags.contains(&flag), "{flag}: {help}");
    }
    assert_eq!(
        print(&["--version"]),
        (
            Some(0),
            format!("qemu-fleece {}\n", env!("CARGO_PKG_VERSION"))
        )
    );
    let man = print(&["man"]).1;
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            print(&["completions", shell]).1.contains("scratch-dir"),
            "{shell}"
        );
    }
    assert!(
        man.starts_with(".ie") && man.contains("storage\\-daemon"),
        "{man}"
    );
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/../protocol/schema/v1.json");
    assert_eq!(
        print(&["schema"]),
        (Some(0), std::fs::read_to_string(committed).unwrap())
    );
}
