//! QEMU's NBD server for one session: on a unix socket in a directory of ours
//! that nobody else may enter.
//!
//! Where descriptors can be passed, the plugin binds the socket and hands it
//! over, so that QEMU, which may run as another user, needs no right to the
//! directory; elsewhere QEMU binds the path.

use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::nbd::Address;
use crate::qemu::{Qmp, query};
use crate::teardown::{Teardown, Undo};

/// Connections that QEMU's server takes at a time; a surplus one would wait
/// without a word. Each disk needs three.
fn connections(disks: usize) -> usize {
    disks.saturating_mul(4).max(16)
}

/// Starts the server for `disks` disks, in a new directory below `runtime_dir`.
///
/// # Errors
/// [`Kind::NbdServerBusy`] when this QEMU's one server runs already.
pub async fn start(
    qmp: &Qmp,
    session: &str,
    runtime_dir: &Path,
    disks: usize,
    teardown: &mut Teardown,
) -> Result<Address> {
    let dir = runtime_dir.join(format!("{}{session}", crate::qemu::step::PREFIX));
    teardown.push(Undo::Directory(dir.clone()));
    let path = socket_path(&dir)?;
    let most = connections(disks);
    let result = if qmp.can_pass_fds() {
        let listener = UnixListener::bind(&path).map_err(|error| unusable(&dir, error))?;
        let name = format!("{}{session}", crate::qemu::step::PREFIX);
        qmp.execute_with_fd("getfd", json!({"fdname": name}), listener.as_fd())
            .await?;
        let address = json!({"type": "fd", "data": {"str": name}});
        qmp.execute_raw(
            "nbd-server-start",
            json!({"addr": address, "max-connections": most}),
        )
        .await
    } else {
        let text = path
            .to_str()
            .ok_or_else(|| unusable(&dir, std::io::ErrorKind::InvalidFilename.into()))?;
        let address = json!({"type": "unix", "data": {"path": text}});
        qmp.execute_raw(
            "nbd-server-start",
            json!({"addr": address, "max-connections": most}),
        )
        .await
    };
    match result {
        Ok(_) => {
            // Not before: the server that runs may be somebody else's.
            teardown.push(Undo::NbdServer);
            Ok(Address::Unix(path))
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

fn socket_path(dir: &Path) -> Result<PathBuf> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(|error| unusable(dir, error))?;
    Ok(dir.join("nbd.sock"))
}

fn unusable(dir: &Path, error: std::io::Error) -> Error {
    Error::new(
        Kind::ScratchUnavailable,
        format!("making a private directory {}", dir.display()),
    )
    .because(error)
}
