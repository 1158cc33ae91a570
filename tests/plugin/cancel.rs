//! Each request has one answer, whatever is cancelled and whoever does not read.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};

use serde_json::{Value, json};

use crate::support::{Monitor, Plugin, command, hello};

#[test]
fn a_cancelled_begin_is_answered_once_and_leaves_nothing() {
    let monitor = Monitor::start(|peer| {
        peer.greet();
        // Answers the handshake only.
        peer.serve(|name, _| {
            (name == "qmp_capabilities" || name == "query-commands").then(|| json!({"return": []}))
        });
    });
    let mut plugin = Plugin::ready("inline");
    plugin.ask(1, "backup.begin", json!({"monitor": monitor.path}));
    plugin.lives();
    assert_eq!(
        plugin.call(2, "cancel", json!({"id": 1}))["result"],
        json!({"found": true})
    );
    plugin.ask(3, "shutdown", json!({}));
    // QEMU owes an answer to a command that was sent: its deadline ends the request.
    let data = plugin.refuses("qemu_timeout", json!(1));
    assert_eq!(data["state_left"], "unknown");
    assert_eq!(plugin.answer()["id"], 3);
    assert!(plugin.is_clean());
}

#[test]
fn a_host_that_does_not_read_can_still_ask_and_cancel() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = command(folder.path()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let ask = |id: u64, method: &str, params: Value| {
        format!(
            "{}\n",
            json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
        )
    };
    stdin
        .write_all(ask(0, "hello", hello("inline")).as_bytes())
        .unwrap();
    // Far more answers than a pipe and all queues hold; nobody reads. The plugin
    // stops to read lines then, so the writer is a thread of its own.
    const PINGS: u64 = 40_000;
    let writer = std::thread::spawn(move || {
        for id in 1..=PINGS {
            stdin
                .write_all(ask(id, "ping", json!({})).as_bytes())
                .unwrap();
        }
        stdin
            .write_all(ask(PINGS + 1, "shutdown", json!({})).as_bytes())
            .unwrap();
        stdin
    });
    let mut answers: HashMap<u64, usize> = HashMap::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert!(line["result"].is_object(), "{line}");
        *answers.entry(line["id"].as_u64().unwrap()).or_default() += 1;
    }
    writer.join().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!((0..=PINGS + 1).all(|id| answers.get(&id) == Some(&1)));
}
