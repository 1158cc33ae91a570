//! A `qemu-storage-daemon` of our own: QEMU's block layer without a VM.
//!
//! It speaks QMP on its standard input and output, so there is no socket to
//! find, and nobody else can reach it. It dies with this process, whatever ends it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use qapi::qmp::quit;
use tokio::process::{Child, Command};

use crate::error::{Error, Kind, Result};
use crate::qemu::Qmp;

/// How long it gets to start, and to end.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running daemon.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    /// Its monitor.
    pub qmp: Qmp,
}

impl StorageDaemon {
    /// Starts `program` (a name to be found in `PATH`, or a path).
    ///
    /// # Errors
    /// [`Kind::StorageDaemonFailed`].
    pub async fn start(program: &Path) -> Result<Self> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(
                Kind::StorageDaemonFailed,
                format!("starting {}", program.display()),
            )
            .because(error)
        };
        let path = find(program).ok_or_else(|| failed("there is no such program".into()))?;
        // setpriv belongs to every Debian; its signal comes when this process is gone.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(path)
            .args([
                "--chardev",
                "stdio,id=monitor",
                "--monitor",
                "chardev=monitor",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // A Ctrl-C at a terminal is for the plugin, which ends this in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(error.into()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("its standard input and output are missing".into()));
        };
        let stream = tokio::io::join(stdout, stdin);
        let qmp = Qmp::over(stream, DEADLINE)
            .await
            .map_err(|error| failed(error.into()))?;
        Ok(Self { child, qmp })
    }

    /// Asks it to end and waits: all its images are closed then.
    ///
    /// # Errors
    /// [`Kind::StorageDaemonFailed`] when it does not, or reports a failure; it is
    /// killed then.
    pub async fn stop(mut self) -> Result<()> {
        let failed = |why: String| {
            Error::new(Kind::StorageDaemonFailed, "stopping qemu-storage-daemon").because(why)
        };
        // Its end may come before its answer.
        let _answer = self.qmp.execute(&quit {}).await;
        match tokio::time::timeout(DEADLINE, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(failed(format!("it ended with {status}"))),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_elapsed) => Err(failed(format!(
                "it did not end within {} s",
                DEADLINE.as_secs()
            ))),
        }
    }
}

fn find(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}
