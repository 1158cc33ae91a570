//! Monitors and NBD servers that are absent, busy, or no such thing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::{Monitor, Plugin};

fn inspected_with(
    script: impl Fn(&mut crate::support::Peer) + Send + 'static,
    code: &str,
) -> Value {
    let monitor = Monitor::start(script);
    let mut plugin = Plugin::ready("inline");
    plugin.ask(1, "vm.inspect", json!({"monitor": monitor.path}));
    let data = plugin.refuses(code, json!(1));
    plugin.lives();
    data
}

#[test]
fn nobody_there() {
    let mut plugin = Plugin::ready("inline");
    plugin.ask(1, "vm.inspect", json!({"monitor": "/none/qmp.sock"}));
    plugin.refuses("monitor_unreachable", json!(1));
    plugin.ask(2, "backup.begin", json!({"monitor": "tcp:127.0.0.1:1"}));
    assert_eq!(
        plugin.refuses("monitor_unreachable", json!(2))["action"],
        "ask_operator"
    );
    plugin.lives();
}

#[test]
fn each_fault_of_a_monitor_has_its_code() {
    inspected_with(|peer| while peer.command().is_some() {}, "monitor_busy");
    inspected_with(|peer| peer.send("220 mail ESMTP\r\n"), "monitor_protocol");
    inspected_with(|peer| peer.greet(), "monitor_closed");
    inspected_with(
        |peer| {
            peer.greet();
            peer.serve(|_, _| Some(json!({"error": {"class": "GenericError", "desc": "no"}})));
        },
        "qemu_refused",
    );
    inspected_with(
        |peer| {
            peer.greet();
            peer.serve(|name, _| {
                Some(json!({"return": if name == "query-block" { json!(7) } else { json!({}) }}))
            });
        },
        "monitor_protocol",
    );
}

/// A monitor that plays a VM with one disk, as far as a backup needs, and an NBD
/// server that does `serve` with each connection; `None`: that nobody listens.
fn vm(serve: Option<fn(UnixStream)>, drivers: &'static [&'static str]) -> Monitor {
    let jobs: Arc<Mutex<Vec<Value>>> = Arc::default();
    Monitor::start(move |peer| {
        peer.greet();
        peer.serve(|name, arguments| {
            let mut jobs = jobs.lock().unwrap();
            let answer = match name {
                "query-qmp-schema" => schema(drivers),
                "query-version" => json!({"qemu": {"major": 10, "minor": 0, "micro": 2}}),
                "query-block" => json!([{"device": "", "qdev": "disk0", "removable": false, "io-status": "ok", "inserted":
                    {"node-name": "node0", "drv": "raw", "ro": false, "file": "x", "image": {"virtual-size": 65536}}}]),
                "query-status" => json!({"status": "running"}),
                "query-uuid" => json!({"UUID": "00000000-0000-0000-0000-000000000000"}),
                "query-jobs" => json!(*jobs),
                "query-commands" | "query-block-exports" | "query-named-block-nodes" | "query-fdsets" | "qom-list" => json!([]),
                "qom-get" => return Some(json!({"error": {"class": "GenericError", "desc": "no such property"}})),
                "transaction" => {
                    let id = &arguments["actions"][0]["data"]["job-id"];
                    jobs.push(json!({"id": id, "status": "running"}));
                    json!({})
                }
                "job-cancel" => {
                    for job in jobs.iter_mut().filter(|job| job["id"] == arguments["id"]) {
                        job["status"] = json!("concluded");
                    }
                    json!({})
                }
                "job-dismiss" => {
                    jobs.retain(|job| job["id"] != arguments["id"]);
                    json!({})
                }
                "nbd-server-start" => {
                    if let Some(serve) = serve {
                        let listener = UnixListener::bind(arguments["addr"]["data"]["path"].as_str().unwrap()).unwrap();
                        std::thread::spawn(move || listener.incoming().for_each(|stream| serve(stream.unwrap())));
                    }
                    json!({})
                }
                _ => json!({}),
            };
            Some(json!({"return": answer}))
        });
    })
}

/// What is asked of `query-qmp-schema`, with these drivers.
fn schema(drivers: &[&str]) -> Value {
    let drivers: Vec<Value> = drivers
        .iter()
        .map(|name| json!({"case": name, "type": "x"}))
        .collect();
    json!([
        {"name": "blockdev-add", "meta-type": "command", "arg-type": "0"},
        {"name": "0", "meta-type": "object", "variants": drivers},
        {"name": "block-export-add", "meta-type": "command", "arg-type": "1"},
        {"name": "1", "meta-type": "object", "variants": [{"case": "nbd", "type": "x"}]},
    ])
}

#[test]
fn a_qemu_without_what_is_needed_is_refused_before_anything_is_made() {
    let monitor = vm(None, &["raw", "qcow2"]);
    let mut plugin = Plugin::ready("inline");
    plugin.ask(1, "backup.begin", json!({"monitor": monitor.path}));
    let data = plugin.refuses("qemu_unsupported", json!(1));
    assert_eq!(data["state_left"], "unchanged");
    assert!(plugin.is_clean());
}

fn read_with(serve: Option<fn(UnixStream)>, code: &str) {
    let monitor = vm(serve, &["snapshot-access"]);
    let mut plugin = Plugin::ready("inline");
    let began = plugin.call(1, "backup.begin", json!({"monitor": monitor.path}));
    let backup = &began["result"]["backup"];
    assert!(backup.is_string(), "{began}");
    plugin.ask(2, "backup.read", json!({"backup": backup, "disk": "disk0"}));
    let data = plugin.refuses(code, json!(2));
    assert_eq!(
        (&data["state_left"], &data["disk"]),
        (&json!("backup_open"), &json!("disk0"))
    );
    let aborted = plugin.call(3, "backup.abort", json!({"backup": backup}));
    assert_eq!(aborted["result"], json!({"leftovers": []}));
    assert!(plugin.is_clean());
}

#[test]
fn each_fault_of_an_nbd_server_has_its_code_and_leaves_the_backup_open() {
    read_with(None, "nbd_unreachable");
    read_with(Some(drop), "nbd_closed");
    read_with(
        Some(|mut stream| {
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .unwrap()
        }),
        "nbd_protocol",
    );
}

#[test]
fn a_silent_nbd_server_is_given_up() {
    // As long as the deadline is: a minute.
    read_with(
        Some(|mut stream| {
            let _gone = stream.read_to_end(&mut Vec::new());
        }),
        "nbd_timeout",
    );
}
