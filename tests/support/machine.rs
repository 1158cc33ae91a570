//! A real `qemu-system-x86_64` without a guest: stopped, and only with the disks
//! that a test gives it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use qemu_fleece_engine::qemu::{Address, Qmp};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Long enough for any answer that comes at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A folder for images. It outlives the machines that open them.
#[derive(Debug)]
pub(crate) struct Images {
    dir: TempDir,
}

impl Images {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Makes an image of 1 MiB; `options` as `-o` takes them.
    pub(crate) fn create(&self, name: &str, format: &str, options: &[&str]) {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-f", format]);
        for option in options {
            command.args(["-o", option]);
        }
        let status = command.arg(self.path(name)).arg("1M").status();
        assert!(status.expect("qemu-img is installed").success());
    }

    /// `-blockdev` for an image, as a node of its own name.
    pub(crate) fn blockdev(&self, name: &str, format: &str, more: &str) -> Vec<String> {
        let file = format!("file.driver=file,file.filename={}", self.path(name));
        let node = format!("driver={format},node-name={name},{file}{more}");
        vec!["-blockdev".into(), node]
    }
}

/// A machine, with a monitor at [`Machine::address`]. Ends with the test.
#[derive(Debug)]
pub(crate) struct Machine {
    _child: Child,
    // Closing them would end or stall its other monitor.
    _input: ChildStdin,
    _output: BufReader<ChildStdout>,
    dir: TempDir,
}

impl Machine {
    /// Starts it; its monitor listens when this returns.
    pub(crate) async fn start(arguments: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let monitor = format!(
            "unix:{},server=on,wait=off",
            dir.path().join("qmp").display()
        );
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg", "-m", "32"])
            .args(["-nodefaults", "-display", "none", "-S", "-qmp", "stdio"])
            .args(["-qmp", &monitor])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let mut output = BufReader::new(child.stdout.take().unwrap());
        // It greets here when all its sockets listen.
        let mut greeting = String::new();
        output.read_line(&mut greeting).await.unwrap();
        assert!(greeting.contains("QMP"), "it did not start: {arguments:?}");
        Self {
            _input: child.stdin.take().unwrap(),
            _output: output,
            _child: child,
            dir,
        }
    }

    /// Where its monitor is.
    pub(crate) fn address(&self) -> Address {
        Address::Unix(Path::join(self.dir.path(), "qmp"))
    }

    /// A client of its monitor.
    pub(crate) async fn connect(&self) -> Qmp {
        Qmp::connect(&self.address(), PATIENCE).await.unwrap()
    }
}

/// A storage daemon with these arguments, and a client on its standard streams.
/// It ends with the first of the pair.
pub(crate) async fn storage_daemon(arguments: &[String]) -> (Child, Qmp) {
    let mut child = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .args(arguments.iter().map(|word| match word.as_str() {
            "-blockdev" => "--blockdev",
            word => word,
        }))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("qemu-storage-daemon is installed");
    let (output, input) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    let qmp = Qmp::over(tokio::io::join(output, input), PATIENCE).await;
    (child, qmp.unwrap())
}
