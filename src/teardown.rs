//! The undo stack: what a session has made, taken away in reverse order.
//!
//! An undo is put on the stack *before* its change is made, so that a change of
//! unknown outcome is undone too. Each undo first looks whether its object is
//! there: QEMU's refusals do not tell "not found" from anything else.

use std::path::PathBuf;
use std::time::Duration;

use qapi::qmp as commands;
use serde_json::json;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::error::{Error, Kind, Result};
use crate::qemu::{Qmp, job, query};

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
    /// The NBD server, unless exports of others use it.
    NbdServer,
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

impl std::fmt::Display for Undo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Export { id } => write!(f, "export {id}"),
            Self::NbdServer => f.write_str("NBD server"),
            Self::Node { node } => write!(f, "node {node}"),
            Self::Job { id } => write!(f, "job {id}"),
            Self::Bitmap { node, name } => write!(f, "bitmap {name} on {node}"),
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

    /// Forgets an undo: its object is gone, or shall stay.
    pub fn forget(&mut self, undo: &Undo) {
        self.steps.retain(|step| step != undo);
    }

    /// Takes everything away, last first. Each step is tried whatever became of
    /// those before; returns what could not be removed, with the reason.
    pub async fn run(mut self, qmp: &Qmp) -> Vec<String> {
        let mut leftovers = Vec::new();
        let mut closed = false;
        while let Some(step) = self.steps.pop() {
            match undo(qmp, &step).await {
                Ok(()) => debug!(%step, "undone"),
                // QEMU is gone, and all with it; or it cannot be asked: once is enough.
                Err(error) if error.kind() == Kind::MonitorClosed => closed = true,
                Err(error) => {
                    warn!(%step, error = error.chain(), "could not be undone");
                    leftovers.push(format!("{step}: {}", error.chain()));
                }
            }
        }
        if closed {
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
    match step {
        Undo::Export { id } => remove_export(qmp, id).await,
        Undo::NbdServer => stop_server(qmp).await,
        Undo::Node { node } => remove_node(qmp, node).await,
        Undo::Job { id } => job::cancel(qmp, id, RELEASE_DEADLINE).await,
        Undo::Bitmap { node, name } => remove_bitmap(qmp, node, name).await,
        Undo::FdSet { id } => remove_fdset(qmp, *id).await,
        Undo::File(path) => gone(std::fs::remove_file(path)),
        Undo::Directory(path) => gone(std::fs::remove_dir_all(path)),
    }
}

fn gone(result: std::io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::new(Kind::Internal, "removing a file").because(error))
        }
        _ => Ok(()),
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

async fn stop_server(qmp: &Qmp) -> Result<()> {
    let exports = query::block_exports(qmp).await?;
    if let Some(export) = exports.iter().find(|export| export.kind == "nbd") {
        return Err(Error::new(Kind::NbdServerBusy, "stopping the NBD server")
            .because(format!("export {} uses it", export.id)));
    }
    qmp.execute(&commands::nbd_server_stop {}).await.map(drop)
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
