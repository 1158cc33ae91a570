//! Whatever comes on standard input is answered, and the plugin lives on.

use serde_json::{Value, json};

use crate::support::{Monitor, Plugin, hello};

#[test]
fn what_is_no_request_is_answered_under_null() {
    let mut plugin = Plugin::ready("inline");
    let deep = format!("{{\"jsonrpc\":\"2.0\",\"id\":{}", "[".repeat(100_000));
    for (line, code) in [
        (&b""[..], "parse_error"),
        (b"{", "parse_error"),
        (b"hello", "parse_error"),
        (b"{\"id\":\"\xff\"}", "parse_error"),
        (b"{\"id\":1,\0\"method\":\"ping\"}", "parse_error"),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"} {}",
            "parse_error",
        ),
        (deep.as_bytes(), "parse_error"),
        (
            b"[{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}]",
            "parse_error",
        ),
        (b"\"ping\"", "parse_error"),
        (
            b"{\"jsonrpc\":\"2.0\",\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1.5,\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":-1,\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":9007199254740992,\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":\"\",\"method\":\"ping\"}",
            "invalid_request",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"id\":2,\"method\":\"ping\"}",
            "invalid_request",
        ),
    ] {
        plugin.send(line);
        plugin.send(b"\n");
        plugin.refuses(code, Value::Null);
    }
    plugin.lives();
}

#[test]
fn what_is_no_sane_request_is_answered_under_its_id() {
    let mut plugin = Plugin::ready("inline");
    for (line, code) in [
        (json!({"id": 7, "method": "ping"}), "invalid_request"),
        (
            json!({"jsonrpc": "1.0", "id": 7, "method": "ping"}),
            "invalid_request",
        ),
        (json!({"jsonrpc": "2.0", "id": 7}), "invalid_request"),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": 7}),
            "invalid_request",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "pong"}),
            "method_not_found",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "ping", "params": []}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {"loud": true}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "vm.inspect"}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "vm.inspect", "params": {"monitor": 7}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "vm.inspect", "params": {"monitor": "qmp.sock"}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "backup.begin",
            "params": {"monitor": "/none", "checkpoint": "a/b"}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "backup.begin",
            "params": {"monitor": "/none", "base": "x".repeat(129)}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "backup.read",
            "params": {"backup": "b", "disk": "d", "record_max": 100_000}}),
            "invalid_params",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "backup.read", "params": {"backup": "b", "disk": "d"}}),
            "unknown_backup",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "backup.abort", "params": {"backup": "b"}}),
            "unknown_backup",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "restore.finish", "params": {"restore": "r"}}),
            "unknown_restore",
        ),
        (
            json!({"jsonrpc": "2.0", "id": 7, "method": "hello", "params": hello("inline")}),
            "hello_expected",
        ),
    ] {
        plugin.send(format!("{line}\n").as_bytes());
        plugin.refuses(code, json!(7));
    }
    plugin.lives();
}

#[test]
fn a_line_over_the_limit_is_dropped_whole() {
    let mut plugin = Plugin::ready("inline");
    let piece = vec![b'{'; 1 << 20];
    for _ in 0..17 {
        plugin.send(&piece);
    }
    plugin.send(b"\n");
    plugin.refuses("line_too_long", Value::Null);
    plugin.lives();
}

#[test]
fn a_line_that_the_input_cuts_off_is_answered() {
    let mut plugin = Plugin::ready("inline");
    plugin.send(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"shutdown\"}");
    plugin.stdin = None;
    plugin.refuses("parse_error", Value::Null);
    assert_eq!(plugin.exit_code(), Some(3), "it was no shutdown");
}

#[test]
fn hello_comes_first_and_agrees_on_a_version() {
    let mut plugin = Plugin::silent();
    plugin.ask(1, "ping", json!({}));
    plugin.refuses("hello_expected", json!(1));
    let mut later = hello("inline");
    later["protocols"] = json!([2, 3]);
    plugin.ask(2, "hello", later);
    assert_eq!(
        plugin.refuses("version_unsupported", json!(2))["supported"],
        json!([1])
    );
    plugin.ask(3, "hello", hello("framed"));
    assert_eq!(plugin.answer()["result"]["carrier"], "framed");
    plugin.lives();
}

#[test]
fn payloads_are_taken_only_where_they_belong_and_never_spoil_the_next_line() {
    let mut plugin = Plugin::ready("framed");
    let lines = b"{\"jsonrpc\":\"2.0\",\"id\":5,\"method\":\"ping\"}\n";
    plugin.ask_with(1, "ping", json!({}), lines);
    plugin.refuses("invalid_payload", json!(1));
    plugin.ask_with(2, "pong", json!({}), lines);
    plugin.refuses("invalid_payload", json!(2));
    plugin.ask_with(3, "ping", json!({}), &vec![b'\n'; (1 << 20) + 1]);
    plugin.refuses("invalid_payload", json!(3));
    // A line that is no request, and yet tells its payload.
    plugin.send(b"{\"jsonrpc\":\"1.0\",\"id\":4,\"payload_bytes\":3}\n{{{");
    plugin.refuses("invalid_request", json!(4));
    let zero = json!({"kind": "zero", "offset": 0, "length": 3});
    plugin.ask_with(
        5,
        "restore.write",
        json!({"restore": "r", "record": zero}),
        b"abc",
    );
    plugin.refuses("invalid_payload", json!(5));
    let data = json!({"kind": "data", "offset": 0, "length": 4, "crc32": 0});
    plugin.ask_with(
        6,
        "restore.write",
        json!({"restore": "r", "record": data}),
        b"abc",
    );
    plugin.refuses("invalid_payload", json!(6));
    plugin.ask(
        7,
        "restore.write",
        json!({"restore": "r", "record": data, "data": "YWJjZA=="}),
    );
    plugin.refuses("invalid_payload", json!(7));
    plugin.lives();

    let mut plugin = Plugin::ready("inline");
    for (id, text) in [(1, "YWJjZA"), (2, "????"), (3, "YWJj"), (4, "")] {
        plugin.ask(
            id,
            "restore.write",
            json!({"restore": "r", "record": data, "data": text}),
        );
        plugin.refuses("invalid_payload", json!(id));
    }
    plugin.ask_with(
        5,
        "restore.write",
        json!({"restore": "r", "record": data}),
        b"abcd",
    );
    plugin.refuses("invalid_payload", json!(5));
    plugin.lives();
}

#[test]
fn an_id_in_use_is_refused_under_null_and_the_first_is_answered() {
    let monitor = Monitor::start(|peer| while peer.command().is_some() {});
    let mut plugin = Plugin::ready("inline");
    plugin.ask(1, "vm.inspect", json!({"monitor": monitor.path}));
    plugin.ask(1, "ping", json!({}));
    plugin.refuses("duplicate_id", Value::Null);
    plugin.refuses("monitor_busy", json!(1));
    assert_eq!(
        plugin.call(1, "ping", json!({}))["result"],
        json!({}),
        "the id is free again"
    );
}

#[test]
fn too_many_requests_are_refused_but_not_those_that_end_others() {
    let monitor = Monitor::start(|peer| while peer.command().is_some() {});
    let mut plugin = Plugin::ready("inline");
    for id in 1..=32 {
        plugin.ask(id, "vm.inspect", json!({"monitor": monitor.path}));
    }
    plugin.ask(100, "vm.inspect", json!({"monitor": monitor.path}));
    plugin.refuses("too_many_requests", json!(100));
    assert_eq!(plugin.call(101, "ping", json!({}))["result"], json!({}));
    assert_eq!(
        plugin.call(102, "cancel", json!({"id": 1}))["result"],
        json!({"found": true})
    );
    assert_eq!(
        plugin.call(103, "cancel", json!({"id": 77}))["result"],
        json!({"found": false})
    );
}
