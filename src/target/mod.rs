//! Where a push goes: what the host provides, opened as a node of QEMU's.
//!
//! ```text
//! file       new file beside its place --> QEMU --> closed --> synced, named
//! existing   file or device            --> QEMU --> closed --> synced
//! nbd        the host's server <-- relay <-- QEMU
//! receiver   we <-- QEMU
//! ```
//! Nothing is changed before QEMU has the right to write it.

mod file;
mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Error, Kind, Result};
use crate::hidden;
use crate::image::{Durable, Format};
use crate::offer::Door;
use crate::qemu::step::{CLUSTER, Names};
use crate::qemu::{Qmp, query};
use crate::teardown::{Teardown, Undo};
use crate::view::View;

pub use file::Place;
pub use server::{NbdServer, Tls};

/// Why an image is no target: whoever wrote its header would choose the file that is written.
const DATA_ELSEWHERE: &str = "its data lies in another file, which its header names";

/// How long a server gets to hang up once QEMU has said goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// What the host provides.
pub enum Target {
    /// A new image.
    File {
        /// An absolute path where nothing is yet.
        path: PathBuf,
        /// Its format.
        format: Format,
        /// The image below it, by the name that shall stand in it: in an incremental.
        backing: Option<(String, Format)>,
    },
    /// An image or block device that is there.
    Existing {
        /// Its path, or the file itself.
        place: Place,
        /// Its format.
        format: Format,
        /// It reads as zeros.
        is_zero: bool,
    },
    /// An NBD server.
    Nbd {
        /// Where it is.
        server: NbdServer,
        /// The export's name.
        export: String,
        /// It reads as zeros.
        is_zero: bool,
        /// How the connection is encrypted.
        tls: Option<Tls>,
    },
    /// Ourselves: who gets this serves QEMU.
    Receiver(oneshot::Sender<Receiver>),
}

/// QEMU's connection to us, to come.
#[derive(Debug)]
pub struct Receiver {
    pub(crate) door: Door,
    /// Ends the connection.
    pub(crate) cut: CancellationToken,
}

/// A target that is open in QEMU as node [`Names::target`].
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// Zeros need not be written.
    pub(crate) is_zero: bool,
    /// A raw file, which may be emptied first.
    pub(crate) can_empty: bool,
    /// What carries bytes between QEMU and a server, until it is dropped.
    relay: Option<AbortOnDropHandle<()>>,
    /// Ends the connection to a receiver of ours.
    receiver: CancellationToken,
    durable: Option<Durable>,
    /// To be named: the hidden file, and its name.
    new: Option<(PathBuf, PathBuf)>,
}

impl Opened {
    /// Whether it is a file, or a device, of this machine.
    pub(crate) fn is_file(&self) -> bool {
        self.durable.is_some()
    }

    /// Lets go of a server that hangs: QEMU's requests to it fail from here on.
    pub(crate) fn cut(&self) {
        if let Some(relay) = &self.relay {
            relay.abort();
        }
        self.receiver.cancel();
    }

    /// The hidden file, which [`Opened::finish`] needs.
    pub(crate) fn new_file(&self) -> Option<Undo> {
        let (partial, _) = self.new.as_ref()?;
        Some(Undo::File(partial.clone()))
    }

    /// Lets go of all: nothing more will come.
    pub(crate) async fn discard(self) {
        drop(self.relay);
        if let Some(durable) = self.durable {
            durable.close().await;
        }
    }

    /// Brings to stable storage, and gives its name to, what QEMU has closed.
    ///
    /// # Errors
    /// [`Kind::TargetUnwritable`], [`Kind::TargetExists`], [`Kind::TargetTimeout`],
    /// [`Kind::Cancelled`]: the hidden file may be left then.
    pub(crate) async fn finish(self, cancel: &CancellationToken) -> Result<()> {
        if let Some(relay) = self.relay {
            let _stays = tokio::time::timeout(GOODBYE, relay).await;
        }
        // A server's storage is its own.
        let Some(durable) = self.durable else {
            return Ok(());
        };
        let durable = durable.sync(cancel).await?;
        match self.new {
            Some((partial, path)) => hidden::publish(durable, partial, path).await,
            None => {
                durable.close().await;
                Ok(())
            }
        }
    }
}

/// Opens `target` for all of `view`.
///
/// # Errors
/// The `Target*` kinds; [`Kind::InvalidRequest`] for a target that cannot hold such a
/// view. What was made is on `teardown`.
pub(crate) async fn open(
    target: Target,
    view: &View,
    runtime_dir: &Path,
    timeout: Duration,
    cancel: &CancellationToken,
    teardown: &mut Teardown,
) -> Result<Opened> {
    let opening = Opening {
        qmp: view.qmp(),
        names: view.names(),
        size: view.size(),
        is_incremental: view.is_incremental(),
        runtime_dir,
        timeout,
        cancel,
    };
    let opened = match target {
        Target::File {
            path,
            format,
            backing,
        } => {
            let below = backing.as_ref();
            opening.check_new(&path, format, below).await?;
            opening.new_file(path, format, backing, teardown).await
        }
        Target::Existing {
            place,
            format,
            is_zero,
        } => opening.existing(place, format, is_zero, teardown).await,
        Target::Nbd {
            server,
            export,
            is_zero,
            tls,
        } => {
            let opened = opening.server(server, &export, tls, teardown).await?;
            Ok(Opened { is_zero, ..opened })
        }
        Target::Receiver(to) => opening.receiver(to, teardown).await,
    }?;
    match opening.verify().await {
        Ok(()) => Ok(opened),
        Err(error) => {
            opened.discard().await;
            Err(error)
        }
    }
}

struct Opening<'a> {
    qmp: &'a Qmp,
    names: &'a Names,
    size: u64,
    is_incremental: bool,
    runtime_dir: &'a Path,
    /// How long a server, or a file system, may take.
    timeout: Duration,
    cancel: &'a CancellationToken,
}

impl Opening<'_> {
    /// What `step` comes to, unless the push is cancelled first.
    async fn unless_cancelled<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Error::new(Kind::Cancelled, "opening the target")),
            done = step => done,
        }
    }

    /// Holds what QEMU sees of the target against the disk.
    async fn verify(&self) -> Result<()> {
        let nodes = query::named_block_nodes(self.qmp).await?;
        let name = self.names.target();
        let Some(node) = nodes.into_iter().find(|node| node.node_name == name) else {
            return Err(Error::new(Kind::MonitorProtocol, "looking at the target"));
        };
        let why = if node.ro {
            "it is read-only".to_owned()
        } else if node.image.virtual_size != self.size {
            format!(
                "it has {} bytes, and the disk {}",
                node.image.virtual_size, self.size
            )
        } else if let Some(cluster) = node.image.cluster_size.filter(|size| *size > CLUSTER) {
            format!("its clusters have {cluster} bytes, and at most {CLUSTER} will do")
        } else if node.image.has_data_file() {
            // The header was looked at before; this is what QEMU has found in it.
            DATA_ELSEWHERE.to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(Kind::TargetMismatch, "looking at the target").because(why))
    }
}

/// What QEMU says of a target that it cannot use.
fn refused(error: Error) -> Error {
    match error.kind() {
        Kind::QemuRefused if error.chain().contains("No space left on device") => {
            Error::new(Kind::TargetUnwritable, "opening the target").because(error)
        }
        Kind::QemuRefused if error.chain().contains("is not writable") => {
            Error::new(Kind::TargetMismatch, "opening the target").because(error)
        }
        Kind::QemuRefused => Error::new(Kind::TargetRefused, "opening the target").because(error),
        _ => error,
    }
}
