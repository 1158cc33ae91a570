//! QEMU's one NBD server, shared by all that need it in this process: started for the
//! first, stopped with the last.
//!
//! It listens on a unix socket in a directory of ours that nobody else may enter. Where
//! descriptors can be passed, the plugin binds the socket and hands it over, so that
//! QEMU, which may run as another user, needs no right to the directory; elsewhere QEMU
//! binds the path.

use std::fs::Permissions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::debug;

use crate::callers;
use crate::error::{Error, Kind, Result};
use crate::file_call;
use crate::nbd::Address;
use crate::qemu::Qmp;
use crate::qemu::query::{self, BlockExport};
use crate::qemu::step::PREFIX;
use crate::session::random_id;
use crate::stake::make_private;
use crate::teardown::{Teardown, Undo};

/// Connections that QEMU's server takes at a time; a surplus one would wait without a
/// word. Each disk needs three, and a client of an export as many as it likes.
const CONNECTIONS: usize = 1024;

/// How long a file system gets to close a socket to others.
const SOCKET_DEADLINE: Duration = Duration::from_secs(10);

/// The socket's name in its directory.
pub(crate) const SOCKET: &str = "nbd.sock";

/// What the name of its directory ends with: that of its session's, and this.
pub(crate) const SERVER_DIR: &str = "-nbd";

/// How long it may take to see whether anybody listens there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// How long a socket gets until nobody listens any more: with io_uring (QEMU 11.1) the kernel
/// closes it some time after QEMU has, or has died.
const LINGERS: Duration = Duration::from_secs(3);

/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The server of one monitor; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Server {
    running: Arc<Mutex<Option<Running>>>,
}

#[derive(Debug)]
struct Running {
    dir: PathBuf,
    address: Address,
    users: usize,
}

impl PartialEq for Server {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.running, &other.running)
    }
}

impl Eq for Server {}

impl Server {
    /// Where it is, until `teardown` has run; starts it for the first user, in the new
    /// directory `dir`.
    ///
    /// # Errors
    /// [`Kind::NbdServerBusy`] when this QEMU's one server runs, and not for us.
    pub async fn join(&self, qmp: &Qmp, dir: PathBuf, teardown: &mut Teardown) -> Result<Address> {
        let mut running = self.running.lock().await;
        if let Some(running) = &mut *running {
            running.users += 1;
            teardown.push(Undo::Server(self.clone()));
            return Ok(running.address.clone());
        }
        make_private(&dir)?;
        let path = dir.join(SOCKET);
        let started = start(qmp, &path).await;
        if let Err(error) = started {
            // Ours alone, and what failed is what counts.
            let _removed = std::fs::remove_dir_all(&dir);
            return Err(error);
        }
        // Not before: the server that runs may be somebody else's.
        teardown.push(Undo::Server(self.clone()));
        let address = Address::Unix(path);
        *running = Some(Running {
            dir,
            address: address.clone(),
            users: 1,
        });
        Ok(address)
    }

    /// Takes over the server at `address`, which a process that has ended has started: it is
    /// ours from now on.
    ///
    /// # Errors
    /// [`Kind::NbdServerBusy`] where ours is another one; [`Kind::MonitorProtocol`] for an
    /// address that none of ours has.
    pub(crate) async fn take_over(
        &self,
        socket: PathBuf,
        teardown: &mut Teardown,
    ) -> Result<Address> {
        let doing = "taking over the NBD server";
        if !is_ours(&socket) {
            let why = format!("{} is none of ours", socket.display());
            return Err(Error::new(Kind::MonitorProtocol, doing).because(why));
        }
        let mut running = self.running.lock().await;
        let address = Address::Unix(socket.clone());
        match &mut *running {
            Some(running) if running.address == address => running.users += 1,
            Some(_) => {
                return Err(
                    Error::new(Kind::NbdServerBusy, doing).because("another one of ours runs")
                );
            }
            none => {
                *none = Some(Running {
                    dir: socket.parent().unwrap_or(Path::new("/")).to_owned(),
                    address: address.clone(),
                    users: 1,
                });
            }
        }
        teardown.push(Undo::Server(self.clone()));
        Ok(address)
    }

    /// One user less, who was taken over from another process and stays one of that: nothing
    /// is stopped.
    pub(crate) async fn release(&self) {
        let mut running = self.running.lock().await;
        *running = running.take().and_then(|running| {
            let users = running.users.checked_sub(1).filter(|users| *users > 0)?;
            Some(Running { users, ..running })
        });
    }

    /// One user less: the last one stops it.
    pub(crate) async fn leave(&self, qmp: &Qmp) -> Result<()> {
        let mut running = self.running.lock().await;
        match &mut *running {
            Some(running) if running.users > 1 => {
                running.users -= 1;
                return Ok(());
            }
            _ => {}
        }
        let Some(Running { dir, .. }) = running.take() else {
            return Ok(());
        };
        let stopped = stop(qmp, &dir.join(SOCKET)).await;
        if let Ok(false) = stopped {
            // Somebody of ours has yet to be taken over, or reclaimed: the server is theirs.
            return Ok(());
        }
        if stopped.is_err() && stays(&dir.join(SOCKET)).await.unwrap_or(true) {
            // Lost with the monitor's connection: whoever reclaims it knows it by its socket. Or
            // somebody stays connected: QEMU would stand still.
            return stopped.map(drop);
        }
        let removed = file_call::remove(&dir, remove_dir).await;
        stopped.and(removed)
    }
}

/// Whether a session of ours would have its server there. Its directory is removed with it, and
/// a note could say anything.
pub(crate) fn is_ours(socket: &Path) -> bool {
    let dir = socket.parent().and_then(Path::file_name);
    let dir = dir.and_then(|name| name.to_str()).unwrap_or_default();
    socket.is_absolute()
        && socket.file_name().is_some_and(|name| *name == *SOCKET)
        && dir.starts_with(PREFIX)
        && dir.ends_with(SERVER_DIR)
}

async fn start(qmp: &Qmp, path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    let address = if qmp.can_pass_fds() {
        let listener = UnixListener::bind(path).map_err(|error| unusable(dir, error))?;
        close_to_others(path).await?;
        let name = pass_fd(qmp, listener.as_fd()).await?;
        json!({"type": "fd", "data": {"str": name}})
    } else {
        json!({"type": "unix", "data": {"path": text(path)?}})
    };
    let start = json!({"addr": address, "max-connections": CONNECTIONS});
    match qmp.execute_raw("nbd-server-start", start).await {
        Ok(_) => {
            close_anothers(path).await;
            Ok(())
        }
        // QEMU has no query for its server; its refusal is all there is to see.
        Err(error)
            if error.kind() == Kind::QemuRefused && error.chain().contains("already running") =>
        {
            let exports = query::block_exports(qmp).await?;
            let users: Vec<&str> = exports.iter().map(|export| export.id.as_str()).collect();
            Err(
                Error::new(Kind::NbdServerBusy, "starting the NBD server").because(format!(
                    "it runs already; its exports: [{}]",
                    users.join(", ")
                )),
            )
        }
        Err(error) => Err(error),
    }
}

/// Stops the server, unless exports of others have come to use it; `false`: unless sessions
/// of other processes of ours do.
async fn stop(qmp: &Qmp, socket: &Path) -> Result<bool> {
    if is_used(qmp).await? {
        return Ok(false);
    }
    callers::see_off(qmp, socket).await?;
    // Somebody may have come meanwhile.
    if is_used(qmp).await? {
        return Ok(false);
    }
    qmp.execute(&qapi::qmp::nbd_server_stop {}).await?;
    Ok(true)
}

/// Whether sessions of other processes of ours use the server.
///
/// # Errors
/// [`Kind::NbdServerBusy`] where somebody else does.
async fn is_used(qmp: &Qmp) -> Result<bool> {
    let users = nbd_exports(qmp).await?;
    if let Some(export) = users.iter().find(|export| !export.id.starts_with(PREFIX)) {
        return Err(Error::new(Kind::NbdServerBusy, "stopping the NBD server")
            .because(format!("export {} uses it", export.id)));
    }
    Ok(!users.is_empty())
}

async fn nbd_exports(qmp: &Qmp) -> Result<Vec<BlockExport>> {
    let mut exports = query::block_exports(qmp).await?;
    exports.retain(|export| export.kind == "nbd");
    Ok(exports)
}

/// Stops the server that a dead process has used, if it is the one that runs, and no export
/// uses it. `ran`: it is known to have run.
pub(crate) async fn stop_old(qmp: &Qmp, socket: &Path, ran: bool) -> Result<()> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    if !nbd_exports(qmp).await?.is_empty() {
        return Ok(());
    }
    // QEMU does not tell where its server is; who listens there does.
    if is_listening(socket).await? {
        callers::see_off(qmp, socket).await?;
        if !nbd_exports(qmp).await?.is_empty() {
            return Ok(());
        }
        let is_foreign = match qmp.execute(&qapi::qmp::nbd_server_stop {}).await {
            // Unless it ran, QEMU has the descriptor, and was never told to serve it.
            Err(error) if error.chain().contains("not running") => ran,
            stopped => {
                stopped?;
                stays(socket).await?
            }
        };
        if is_foreign {
            // Another QEMU's, whatever the note says.
            return Ok(());
        }
    }
    file_call::remove(dir, remove_dir).await
}

async fn is_listening(socket: &Path) -> Result<bool> {
    let socket = socket.to_owned();
    let connect = move || Ok(UnixStream::connect(socket).is_ok());
    file_call::within(CONNECT_DEADLINE, connect).await
}

/// Whether somebody listens there still, once nobody should.
async fn stays(socket: &Path) -> Result<bool> {
    let end = Instant::now() + LINGERS;
    while is_listening(socket).await? {
        if Instant::now() >= end {
            return Ok(true);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(false)
}

/// Removes a server's directory. One with anything but a socket in it is none of ours.
fn remove_dir(dir: &Path) -> std::io::Result<()> {
    let socket = dir.join(SOCKET);
    let there = socket.symlink_metadata();
    if there.is_ok_and(|there| there.file_type().is_socket()) {
        std::fs::remove_file(&socket)?;
    }
    std::fs::remove_dir(dir)
}

/// Has only this process's user connect to a socket of ours, whatever the umask is.
///
/// # Errors
/// [`Kind::ScratchUnavailable`].
pub(crate) async fn close_to_others(socket: &Path) -> Result<()> {
    let path = socket.to_owned();
    let close = move || {
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))
            .map_err(|error| Error::new(Kind::Internal, "calling a file system").because(error))
    };
    let closed = file_call::within(SOCKET_DEADLINE, close).await;
    closed.map_err(|error| {
        let doing = format!("closing {} to others", socket.display());
        Error::new(Kind::ScratchUnavailable, doing).because(error)
    })
}

/// The same for one that another process has bound, where we may: its user may be another one,
/// and its directory is closed to others anyway.
pub(crate) async fn close_anothers(socket: &Path) {
    if let Err(error) = close_to_others(socket).await {
        debug!(error = error.chain(), "only its directory guards a socket");
    }
}

/// Passes a descriptor to QEMU: its name there, for the next command that takes it.
pub(crate) async fn pass_fd(qmp: &Qmp, fd: BorrowedFd<'_>) -> Result<String> {
    let name = format!("{PREFIX}{}", random_id());
    qmp.execute_with_fd("getfd", json!({"fdname": name}), fd)
        .await?;
    Ok(name)
}

/// A new directory below `parent`, for us alone.
pub(crate) fn private_dir(parent: &Path) -> Result<PathBuf> {
    let dir = parent.join(format!("{PREFIX}{}", random_id()));
    make_private(&dir)?;
    Ok(dir)
}

/// A path as JSON can hold it.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| unusable(path, std::io::ErrorKind::InvalidFilename.into()))
}

fn unusable(dir: &Path, error: std::io::Error) -> Error {
    Error::new(
        Kind::ScratchUnavailable,
        format!("making a private directory {}", dir.display()),
    )
    .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_that_is_released_leaves_no_user_behind() {
        let server = Server::default();
        for users in 1..=2 {
            let mut teardown = Teardown::default();
            for _ in 0..users {
                let socket = PathBuf::from(format!("/run/qf-{users}-nbd/nbd.sock"));
                // It would be busy with the ones before.
                server.take_over(socket, &mut teardown).await.unwrap();
            }
            for _ in 0..users {
                server.release().await;
            }
            teardown.leave();
        }
        assert!(server.running.lock().await.is_none());
    }
}
