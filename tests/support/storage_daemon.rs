//! The real `qemu-storage-daemon`, driven by plain JSON over its standard input
//! and output: not with the engine's own QMP, which is under test elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::path::Path;
use std::process::Stdio;

use qemu_fleece_engine::nbd::Address;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// A daemon with an NBD server, and a folder of its own. Ends with the test.
#[derive(Debug)]
pub(crate) struct StorageDaemon {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    dir: TempDir,
}

impl StorageDaemon {
    /// Starts it; its NBD server listens when this returns.
    pub(crate) async fn start() -> Self {
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("qemu-storage-daemon is installed");
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let greeting = output.next_line().await.unwrap().unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        let input = child.stdin.take().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Self {
            child,
            input,
            output,
            dir,
        };
        daemon.run("qmp_capabilities", json!({})).await;
        let path = daemon.socket();
        let address = json!({"type": "unix", "data": {"path": path}});
        daemon
            .run("nbd-server-start", json!({"addr": address}))
            .await;
        daemon
    }

    fn socket(&self) -> String {
        self.dir().join("nbd").to_str().unwrap().to_owned()
    }

    /// Where files of the test may lie.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where its exports are.
    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.socket().into())
    }

    /// Runs a command that must succeed.
    pub(crate) async fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.input.write_all(line.as_bytes()).await.unwrap();
        loop {
            let line = self.output.next_line().await.unwrap();
            let mut answer: Value = serde_json::from_str(&line.expect("it is alive")).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(found) = answer.get_mut("return") {
                return found.take();
            }
            // An event.
        }
    }

    /// Opens `file` of [`StorageDaemon::dir`] as a raw disk of that name.
    pub(crate) async fn open(&mut self, file: &str) {
        let node = json!({
            "driver": "file", "node-name": file, "filename": self.dir().join(file),
            "discard": "unmap",
        });
        self.run("blockdev-add", node).await;
    }

    /// Exports a node under its own name, with a bitmap.
    pub(crate) async fn export(&mut self, node: &str, writable: bool, bitmap: Option<&str>) {
        let bitmaps: Vec<&str> = bitmap.into_iter().collect();
        let export = json!({
            "type": "nbd", "id": node, "node-name": node, "writable": writable,
            "bitmaps": bitmaps,
        });
        self.run("block-export-add", export).await;
    }

    /// Takes an export without clients away, and waits until it is gone.
    pub(crate) async fn unexport(&mut self, node: &str) {
        let hard = json!({"id": node, "mode": "hard"});
        self.run("block-export-del", hard).await;
        while self.run("query-block-exports", json!({})).await != json!([]) {}
    }

    /// Kills it at once, and waits until it is dead.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }
}
