//! A view for programs of the host's: a read-only NBD export, as long as the session lives.
//!
//! ```text
//! client --> socket of ours --> doorman: this export? --> courier --> QEMU's NBD server
//! ```
//! The clients are not known. They may ask for other exports, and may hang with a question
//! asked and the answer not taken: so they never reach QEMU's server, which has more than
//! theirs, and waits for such a client at its next drain.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::entry;
use crate::error::{Error, Kind, Result};
use crate::nbd::doorman::{self, Porter};
use crate::nbd::{Address, courier};
use crate::qemu::{query, step};
use crate::relay::{Hangup, Socket, SocketId, Stream};
use crate::server;
use crate::teardown::{Teardown, Undo};
use crate::view::View;

/// How long a client may take to come in, as in QEMU's own server.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long QEMU gets to show the new export.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// Most clients of one disk's export at a time; others wait to be accepted. For each, up to
/// 34 MiB of replies are held where it does not take them.
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
    /// Clients whose connection the host hands in.
    guests: mpsc::Sender<Guest>,
    /// Those that came in so.
    admitted: BTreeSet<SocketId>,
    end: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

type Guest = (Box<dyn Stream>, Hangup);

impl Gate {
    pub(crate) fn exported(&self) -> &Exported {
        &self.exported
    }

    /// Lets in a client at the other end of `socket`, which ends with the gate. One that is
    /// in stays so.
    pub(crate) async fn admit(&mut self, socket: Socket) -> Result<()> {
        let id = socket.id();
        if self.admitted.contains(&id) && socket.is_open() {
            return Ok(());
        }
        let guest = socket.open().map_err(not_taken_over)?;
        self.admitted.insert(id);
        let sent = self.guests.send(guest).await;
        sent.map_err(|_closed| Error::new(Kind::Cancelled, "letting a client in"))
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

/// Why a socket of the host's was not opened.
pub(crate) fn not_taken_over(error: std::io::Error) -> Error {
    let kind = match error.kind() {
        ErrorKind::ResourceBusy => Kind::InvalidRequest,
        _ => Kind::Internal,
    };
    Error::new(kind, "taking over a socket").because(error)
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
            // An earlier try, which QEMU has refused in its middle, may have made it.
            let left = Undo::Bitmap {
                node: names.view(),
                name: names.public_bitmap(),
            };
            Teardown::default().undo(qmp, &left).await?;
            let (copy, from) = (names.public_bitmap(), names.push_bitmap());
            let copy = step::view_bitmap(names, &copy, view.granularity(), &names.view(), &from);
            qmp.execute_raw("transaction", copy).await?;
        }
        let export = step::public_export(names, view.disk(), view.is_incremental());
        qmp.execute_raw("block-export-add", export).await?;
    }
    let client = entry::connect(qmp, view.address(), view.disk(), None, NBD_DEADLINE).await?;
    let told = client.export();
    let block_sizes = (told.min_block, told.preferred_block, told.max_payload);
    client.close().await;
    let dir = server::private_dir(runtime_dir)?;
    let socket = dir.join("nbd.sock");
    let listener = UnixListener::bind(&socket).map_err(|error| {
        Error::new(Kind::ScratchUnavailable, "making a socket for an export").because(error)
    })?;
    server::close_to_others(&socket).await?;
    let end = CancellationToken::new();
    let (guests, coming) = mpsc::channel(1);
    let house = House {
        server: view.address().clone(),
        export: view.disk().to_owned(),
        porter: qmp.clone(),
        handshake: HANDSHAKE,
    };
    let task = tokio::spawn(house.serve(listener, coming, end.clone()));
    Ok(Gate {
        exported: Exported {
            socket,
            block_sizes,
        },
        dir,
        guests,
        admitted: BTreeSet::new(),
        end,
        task,
    })
}

/// What clients come for.
#[derive(Clone)]
struct House<P> {
    server: Address,
    export: String,
    porter: P,
    /// How long a client may take to come in.
    handshake: Duration,
}

impl<P: Porter + Clone + Send + Sync + 'static> House<P> {
    async fn serve(
        self,
        listener: UnixListener,
        mut guests: mpsc::Receiver<Guest>,
        end: CancellationToken,
    ) {
        let mut clients = JoinSet::new();
        loop {
            tokio::select! {
                () = end.cancelled() => break,
                Some(_ended) = clients.join_next() => {}
                Some((client, hangup)) = guests.recv() => {
                    let house = self.clone();
                    clients.spawn(async move {
                        let _until_then = hangup;
                        house.entertain(client).await;
                    });
                }
                accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                    Ok((client, _)) => {
                        let house = self.clone();
                        clients.spawn(async move { house.entertain(client).await });
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

    /// Serves one client until it or QEMU ends.
    async fn entertain(&self, client: impl Stream) {
        if let Err(error) = self.try_entertain(client).await {
            debug!(error = error.chain(), "an NBD client of an export ended");
        }
    }

    async fn try_entertain(&self, client: impl Stream) -> Result<()> {
        let Address::Unix(path) = &self.server else {
            return Err(Error::new(Kind::Internal, "finding the NBD server"));
        };
        let unreachable = |error| Error::new(Kind::NbdUnreachable, "connecting").because(error);
        let mut qemu = UnixStream::connect(path).await.map_err(unreachable)?;
        let admitted = doorman::admit(client, &mut qemu, &self.export, &self.porter);
        let admitted = tokio::time::timeout(self.handshake, admitted).await;
        let admitted = admitted.map_err(|_elapsed| {
            Error::new(Kind::NbdTimeout, "letting a client in")
                .because(format!("it did not come in within {:?}", self.handshake))
        })?;
        match admitted? {
            Some(client) => courier::carry(client, qemu).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::nbd::wire::{IHAVEOPT, NBDMAGIC};

    /// Lets nobody in.
    #[derive(Clone)]
    struct Closed;

    impl Porter for Closed {
        async fn let_in<T: Send>(&self, _: impl Future<Output = Result<T>> + Send) -> Result<T> {
            std::future::pending().await
        }
    }

    /// A place among the clients is not for those who say nothing.
    #[tokio::test]
    async fn a_client_that_does_not_come_in_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        let listener = UnixListener::bind(&path).unwrap();
        let greeting = [NBDMAGIC.to_be_bytes(), IHAVEOPT.to_be_bytes()].concat();
        let qemu = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&greeting).await.unwrap();
            stream.write_all(&[0, 3]).await.unwrap();
            stream
        });
        let house = House {
            server: Address::Unix(path),
            export: "disk0".to_owned(),
            porter: Closed,
            handshake: Duration::from_millis(50),
        };
        let (_client, ours) = tokio::io::duplex(64);
        let limit = Duration::from_secs(20);
        let ended = tokio::time::timeout(limit, house.try_entertain(ours)).await;
        assert_eq!(ended.unwrap().unwrap_err().kind(), Kind::NbdTimeout);
        let _still_open = qemu.await.unwrap();
    }
}
