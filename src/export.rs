//! A view for programs of the host's: a read-only NBD export, as long as the session lives.
//!
//! ```text
//! client --> socket of ours --> relay --> QEMU's NBD server
//! ```
//! The clients are not known, and may hang with a question asked and the answer not
//! taken: QEMU would wait for them at its next drain. The relay gives them up instead.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::error::{Error, Kind, Result};
use crate::nbd::{Address, Client};
use crate::qemu::{query, step};
use crate::relay::{Stream, relay};
use crate::server;
use crate::view::View;

/// How long a client may take nothing of an answer before it is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long QEMU gets to show the new export.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// Most clients of one disk's export at a time; others wait to be accepted.
const CLIENTS: usize = 64;

/// An exported view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Where clients connect.
    pub socket: PathBuf,
    /// Smallest, fastest and longest request, in bytes.
    pub block_sizes: (u32, u32, u32),
}

/// Where clients come in.
#[derive(Debug)]
pub(crate) struct Gate {
    exported: Exported,
    dir: PathBuf,
    end: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Gate {
    pub(crate) fn exported(&self) -> &Exported {
        &self.exported
    }

    /// Lets nobody in any more, and everybody go.
    pub(crate) async fn close(self) {
        self.end.cancel();
        let _panicked = self.task.await;
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            warn!(dir = %self.dir.display(), %error, "could not remove a directory");
        }
    }
}

/// Exports `view` in QEMU under the disk's id, and opens a gate to it below `runtime_dir`.
///
/// # Errors
/// [`Kind::QemuUnsupported`] below QEMU 10.0, which would answer clients wrongly; QEMU's;
/// NBD's. The export, once made, stays until the session's teardown.
pub(crate) async fn open(view: &View, runtime_dir: &Path) -> Result<Gate> {
    if !view.reads_rightly() {
        return Err(Error::new(Kind::QemuUnsupported, "exporting a point in time")
            .because("below QEMU 10.0 a read that crosses a cluster may return what the guest has written since")
            .on_disk(view.disk()));
    }
    let (qmp, names) = (view.qmp(), view.names());
    let exports = query::block_exports(qmp).await?;
    if !exports
        .iter()
        .any(|export| export.id == names.public_export())
    {
        if view.is_incremental() {
            let (copy, from) = (names.public_bitmap(), names.push_bitmap());
            let copy = step::view_bitmap(names, &copy, view.granularity(), &names.view(), &from);
            qmp.execute_raw("transaction", copy).await?;
        }
        let export = step::public_export(names, view.disk(), view.is_incremental());
        qmp.execute_raw("block-export-add", export).await?;
    }
    let client = Client::connect(view.address(), view.disk(), None, NBD_DEADLINE).await?;
    let told = client.export();
    let block_sizes = (told.min_block, told.preferred_block, told.max_payload);
    client.close().await;
    let dir = server::private_dir(runtime_dir)?;
    let socket = dir.join("nbd.sock");
    let listener = UnixListener::bind(&socket).map_err(|error| {
        Error::new(Kind::ScratchUnavailable, "making a socket for an export").because(error)
    })?;
    let end = CancellationToken::new();
    let task = tokio::spawn(serve(listener, view.address().clone(), end.clone()));
    Ok(Gate {
        exported: Exported {
            socket,
            block_sizes,
        },
        dir,
        end,
        task,
    })
}

async fn serve(listener: UnixListener, server: Address, end: CancellationToken) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            () = end.cancelled() => break,
            Some(_ended) = clients.join_next() => {}
            accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                Ok((client, _)) => {
                    clients.spawn(admit(client, server.clone()));
                }
                Err(error) => {
                    // No descriptors left, as a rule: the next one may find some.
                    warn!(%error, "could not accept an NBD client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    clients.shutdown().await;
}

/// Carries one client's bytes to QEMU's server and back.
pub(crate) async fn admit(mut client: impl Stream, server: Address) {
    let Address::Unix(path) = server else {
        return;
    };
    let carried = async {
        let mut qemu = UnixStream::connect(&path).await?;
        relay(&mut qemu, &mut client, Some(PATIENCE)).await
    };
    if let Err(error) = carried.await {
        debug!(%error, "an NBD client of an export ended");
    }
}
