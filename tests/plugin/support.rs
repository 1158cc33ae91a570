//! The binary on pipes, and a monitor that is scripted.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

/// Long enough for any answer that comes at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A running plugin. Dropped, it is killed.
pub(crate) struct Plugin {
    pub(crate) child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<Value>,
    pub(crate) folder: tempfile::TempDir,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

pub(crate) fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qemu-fleece"));
    command
        .arg("--scratch-dir")
        .arg(folder)
        .arg("--runtime-dir")
        .arg(folder);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Lines of standard output, as they come. A line that is no JSON fails the test.
fn read_lines(stdout: ChildStdout) -> mpsc::Receiver<Value> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        while stdout.read_line(&mut line).unwrap_or(0) > 0 {
            let message: Value = serde_json::from_str(&line).unwrap();
            let payload = usize::try_from(message["payload_bytes"].as_u64().unwrap_or(0)).unwrap();
            stdout.read_exact(&mut vec![0; payload]).unwrap();
            if sender.send(message).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

impl Plugin {
    /// Started, and nothing said yet.
    pub(crate) fn silent() -> Self {
        Self::start(&[])
    }

    fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = command(folder.path()).args(flags).spawn().unwrap();
        let lines = read_lines(child.stdout.take().unwrap());
        Self {
            stdin: child.stdin.take(),
            child,
            lines,
            folder,
        }
    }

    /// Past its hello.
    pub(crate) fn ready(carrier: &str) -> Self {
        Self::silent().greeted(carrier)
    }

    /// Past its hello, with more flags.
    pub(crate) fn with(flags: &[&str]) -> Self {
        Self::start(flags).greeted("framed")
    }

    fn greeted(self, carrier: &str) -> Self {
        let mut plugin = self;
        plugin.ask(0, "hello", hello(carrier));
        assert_eq!(plugin.answer()["result"]["carrier"], carrier);
        plugin
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    pub(crate) fn ask(&mut self, id: u64, method: &str, params: Value) {
        let line = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        self.send(format!("{line}\n").as_bytes());
    }

    /// With a payload behind the line.
    pub(crate) fn ask_with(&mut self, id: u64, method: &str, params: Value, payload: &[u8]) {
        let line = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params,
            "payload_bytes": payload.len()});
        self.send(format!("{line}\n").as_bytes());
        self.send(payload);
    }

    /// The next line that is no progress.
    pub(crate) fn answer(&mut self) -> Value {
        loop {
            let line = self
                .lines
                .recv_timeout(PATIENCE)
                .expect("an answer in time");
            if line["method"] != "progress" {
                return line;
            }
        }
    }

    pub(crate) fn call(&mut self, id: u64, method: &str, params: Value) -> Value {
        self.ask(id, method, params);
        let answer = self.answer();
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }

    /// The next answer is an error with this code, to this id.
    pub(crate) fn refuses(&mut self, code: &str, id: Value) -> Value {
        let answer = self.answer();
        assert_eq!(
            (&answer["error"]["data"]["code"], &answer["id"]),
            (&json!(code), &id),
            "{answer}"
        );
        answer["error"]["data"].clone()
    }

    /// It lives on, and its lines are in step.
    pub(crate) fn lives(&mut self) {
        assert_eq!(self.call(999_999, "ping", json!({}))["result"], json!({}));
    }

    /// Nothing of ours is in its folder.
    pub(crate) fn is_clean(&self) -> bool {
        std::fs::read_dir(self.folder.path())
            .unwrap()
            .next()
            .is_none()
    }

    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let (sender, ended) = mpsc::channel();
        let pid = self.child.id();
        std::thread::spawn(move || {
            let path = PathBuf::from(format!("/proc/{pid}/stat"));
            // The child is not reaped by anyone else: it stays as a zombie.
            while !std::fs::read_to_string(&path)
                .unwrap_or_default()
                .contains(") Z ")
            {
                std::thread::yield_now();
            }
            sender.send(())
        });
        ended.recv_timeout(PATIENCE).expect("the plugin ends");
        self.child.wait().unwrap().code()
    }
}

pub(crate) fn hello(carrier: &str) -> Value {
    json!({"protocols": [1], "host": {"name": "test", "version": "1"}, "carrier": carrier})
}

/// A monitor in a folder; its script runs in a thread, a client at a time.
pub(crate) struct Monitor {
    pub(crate) path: String,
    _folder: tempfile::TempDir,
}

/// The monitor's end of a connection.
pub(crate) struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    pub(crate) fn send(&mut self, text: &str) {
        // The plugin may have gone by now, which is its right.
        let _gone = self.stream.get_mut().write_all(text.as_bytes());
    }

    pub(crate) fn command(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(length) if length > 0 => serde_json::from_str(&line).ok(),
            _ => None,
        }
    }

    pub(crate) fn greet(&mut self) {
        self.send("{\"QMP\":{}}\n");
    }

    /// Answers commands by name until the client is gone; those without an answer stay open.
    pub(crate) fn serve(&mut self, answer: impl Fn(&str, &Value) -> Option<Value>) {
        while let Some(command) = self.command() {
            if let Some(mut reply) =
                answer(command["execute"].as_str().unwrap(), &command["arguments"])
            {
                reply["id"] = command["id"].clone();
                self.send(&format!("{reply}\n"));
            }
        }
    }
}

impl Monitor {
    pub(crate) fn start(script: impl Fn(&mut Peer) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                script(&mut Peer {
                    stream: BufReader::new(stream.unwrap()),
                });
            }
        });
        Self {
            path: path.to_str().unwrap().to_owned(),
            _folder: folder,
        }
    }
}
