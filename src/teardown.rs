//! The undo stack: what a session has made, taken away in reverse order.
//!
//! An undo is put on the stack *before* its change is made, so that a change of
//! unknown outcome is undone too. Each undo first looks whether its object is
//! there: QEMU's refusals do not tell "not found" from anything else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::qmp as commands;
use serde_json::json;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::error::{Error, Kind, Result};
use crate::file_call;
use crate::qemu::{Qmp, job, query};
use crate::server::{self, Server};

/// How long QEMU gets to let go of an object.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);

/// One thing to take away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undo {
    /// An NBD export; its clients are disconnected.
    Export {
        /// Its id.
        id: String,
    },
    /// A user's part of the NBD server.
    Server(Server),
    /// The NBD server that a dead process has used, by its socket, which has a directory
    /// of its own: unless another export uses it.
    OldServer {
        /// The socket.
        socket: PathBuf,
        /// It is known to have run: QEMU had more than the descriptor.
        ran: bool,
    },
    /// A block node.
    Node {
        /// Its name.
        node: String,
    },
    /// A job: cancelled, awaited and dismissed.
    Job {
        /// Its id.
        id: String,
    },
    /// A dirty bitmap.
    Bitmap {
        /// The node it is on.
        node: String,
        /// Its name.
        name: String,
    },
    /// An object of QEMU's object model, as credentials are.
    Object {
        /// Its id.
        id: String,
    },
    /// A descriptor that was passed, unless QEMU has put it to use.
    Fd {
        /// Its name.
        name: String,
    },
    /// A set of descriptors in QEMU.
    FdSet {
        /// Its id.
        id: i64,
    },
    /// A file of ours.
    File(PathBuf),
    /// A directory of ours, with what is in it.
    Directory(PathBuf),
}

impl Undo {
    fn is_file(&self) -> bool {
        matches!(self, Self::File(_) | Self::Directory(_))
    }
}

impl std::fmt::Display for Undo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Export { id } => write!(f, "export {id}"),
            Self::Server(_) => f.write_str("NBD server"),
            Self::OldServer { socket, .. } => write!(f, "NBD server at {}", socket.display()),
            Self::Object { id } => write!(f, "object {id}"),
            Self::Node { node } => write!(f, "node {node}"),
            Self::Job { id } => write!(f, "job {id}"),
            Self::Bitmap { node, name } => write!(f, "bitmap {name} on {node}"),
            Self::Fd { name } => write!(f, "descriptor {name}"),
            Self::FdSet { id } => write!(f, "fdset {id}"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Directory(path) => write!(f, "directory {}", path.display()),
        }
    }
}

/// The stack.
#[derive(Debug, Default)]
pub struct Teardown {
    steps: Vec<Undo>,
}

impl Teardown {
    /// To be called before the change that `undo` takes back.
    pub fn push(&mut self, undo: Undo) {
        self.steps.push(undo);
    }

    /// The last undo, which is the caller's from now on.
    pub(crate) fn pop(&mut self) -> Option<Undo> {
        self.steps.pop()
    }

    /// Forgets an undo: its object is gone, or shall stay.
    pub fn forget(&mut self, undo: &Undo) {
        self.steps.retain(|step| step != undo);
    }

    /// The files and directories that it removes.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.steps.iter().filter_map(|step| match step {
            Undo::File(path) | Undo::Directory(path) => Some(path.as_path()),
            // With its directory.
            Undo::OldServer { socket, .. } => socket.parent(),
            _ => None,
        })
    }

    /// Takes one thing away, before its turn.
    ///
    /// # Errors
    /// QEMU's; the undo stays on the stack then.
    pub async fn undo(&mut self, qmp: &Qmp, step: &Undo) -> Result<()> {
        undo(qmp, step).await?;
        self.forget(step);
        Ok(())
    }

    /// Leaves everything where it is, for another process to take over.
    pub fn leave(mut self) {
        self.steps.clear();
    }

    /// Takes what `other` has away before all that is here.
    pub fn append(&mut self, mut other: Self) {
        self.steps.append(&mut other.steps);
    }

    /// Takes everything away, last first; returns what could not be removed, with the
    /// reason. Each step is tried whatever became of those before, unless QEMU was too slow
    /// with one: the next would hold up its guest.
    pub async fn run(mut self, qmp: &Qmp) -> Vec<String> {
        let leftovers = self.unwind(qmp).await;
        self.steps.clear();
        leftovers
    }

    /// [`Teardown::run`] that keeps what could not be removed, to be tried again.
    pub async fn unwind(&mut self, qmp: &Qmp) -> Vec<String> {
        let (mut leftovers, mut kept) = (Vec::new(), Vec::new());
        let (mut is_closed, mut is_slow) = (false, false);
        while let Some(step) = self.steps.pop() {
            let undone = if is_slow && !step.is_file() {
                Err(Error::new(Kind::QemuTimeout, "not tried").because("QEMU is too slow"))
            } else {
                undo(qmp, &step).await
            };
            match undone {
                Ok(()) => debug!(%step, "undone"),
                // QEMU is gone, and all with it; or it cannot be asked: once is enough.
                Err(error) if error.kind() == Kind::MonitorClosed => is_closed = true,
                Err(error) => {
                    is_slow |= error.kind() == Kind::QemuTimeout;
                    warn!(%step, error = error.chain(), "could not be undone");
                    leftovers.push(format!("{step}: {}", error.chain()));
                    kept.push(step);
                }
            }
        }
        kept.reverse();
        self.steps = kept;
        if is_closed {
            leftovers
                .push("unknown: the monitor's connection ended before all was undone".to_owned());
        }
        leftovers
    }
}

impl Drop for Teardown {
    fn drop(&mut self) {
        for step in &self.steps {
            warn!(%step, "left behind: the session was dropped without commit or abort");
        }
    }
}

async fn undo(qmp: &Qmp, step: &Undo) -> Result<()> {
    // Until what it takes away is gone. A file may take its time, and is none of QEMU's.
    let turn = if step.is_file() {
        None
    } else {
        Some(qmp.turn().await)
    };
    let qmp = turn.as_deref().unwrap_or(qmp);
    match step {
        Undo::Export { id } => remove_export(qmp, id).await,
        Undo::Server(server) => server.leave(qmp).await,
        Undo::OldServer { socket, ran } => server::stop_old(qmp, socket, *ran).await,
        Undo::Object { id } => found(qmp.execute_raw("object-del", json!({"id": id})).await),
        Undo::Fd { name } => found(qmp.execute_raw("closefd", json!({"fdname": name})).await),
        Undo::Node { node } => remove_node(qmp, node).await,
        Undo::Job { id } => job::cancel(qmp, id, RELEASE_DEADLINE).await,
        Undo::Bitmap { node, name } => remove_bitmap(qmp, node, name).await,
        Undo::FdSet { id } => remove_fdset(qmp, *id).await,
        Undo::File(path) => file_call::remove(path, |path| std::fs::remove_file(path)).await,
        Undo::Directory(path) => {
            file_call::remove(path, |path| std::fs::remove_dir_all(path)).await
        }
    }
}

async fn remove_export(qmp: &Qmp, id: &str) -> Result<()> {
    let mut events = qmp.events();
    if !export_exists(qmp, id).await? {
        return Ok(());
    }
    qmp.execute(&commands::block_export_del {
        id: id.to_owned(),
        mode: Some(commands::BlockExportRemoveMode::hard),
    })
    .await?;
    let deadline = Instant::now() + RELEASE_DEADLINE;
    while export_exists(qmp, id).await? {
        // Any event, or none: the next look decides.
        if tokio::time::timeout_at(deadline, events.recv())
            .await
            .is_err()
        {
            return Err(Error::new(
                Kind::QemuTimeout,
                format!("waiting for the end of export {id}"),
            ));
        }
    }
    Ok(())
}

async fn export_exists(qmp: &Qmp, id: &str) -> Result<bool> {
    Ok(query::block_exports(qmp)
        .await?
        .iter()
        .any(|export| export.id == id))
}

/// What QEMU has no list of: its refusal must tell that there is none.
fn found(removed: Result<serde_json::Value>) -> Result<()> {
    match removed {
        Err(error) if error.chain().contains("not found") => Ok(()),
        removed => removed.map(drop),
    }
}

async fn remove_node(qmp: &Qmp, node: &str) -> Result<()> {
    let nodes = query::named_block_nodes(qmp).await?;
    if !nodes.iter().any(|other| other.node_name == node) {
        return Ok(());
    }
    let node_name = node.to_owned();
    qmp.execute(&commands::blockdev_del { node_name })
        .await
        .map(drop)
}

async fn remove_bitmap(qmp: &Qmp, node: &str, name: &str) -> Result<()> {
    let nodes = query::named_block_nodes(qmp).await?;
    let there = nodes
        .iter()
        .filter(|other| other.node_name == node)
        .any(|other| {
            other
                .dirty_bitmaps
                .iter()
                .any(|bitmap| bitmap.name.as_deref() == Some(name))
        });
    if !there {
        return Ok(());
    }
    let bitmap = commands::BlockDirtyBitmap {
        node: node.to_owned(),
        name: name.to_owned(),
    };
    qmp.execute(&commands::block_dirty_bitmap_remove(bitmap))
        .await
        .map(drop)
}

async fn remove_fdset(qmp: &Qmp, id: i64) -> Result<()> {
    let sets = qmp.execute(&commands::query_fdsets {}).await?;
    let there = sets
        .as_array()
        .is_some_and(|sets| sets.iter().any(|set| set["fdset-id"] == json!(id)));
    if !there {
        return Ok(());
    }
    qmp.execute(&commands::remove_fd {
        fdset_id: id,
        fd: None,
    })
    .await
    .map(drop)
}
