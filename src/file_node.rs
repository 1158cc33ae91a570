//! Files of ours as nodes of QEMU's: by descriptor where that can be passed, so that QEMU,
//! which may run as another user, needs no right to the file; by path elsewhere.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use qapi::qmp::remove_fd;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::qemu::Qmp;
use crate::server;
use crate::teardown::{Teardown, Undo};

/// How QEMU comes to a file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'a> {
    /// By descriptor.
    Open(&'a File),
    /// By path.
    Named(&'a Path),
}

/// Adds the node `node` with the options that `options` makes of a file name. `owner` marks
/// the descriptor in QEMU. The node is on `teardown`.
///
/// # Errors
/// QEMU's.
pub(crate) async fn add(
    qmp: &Qmp,
    way: Way<'_>,
    owner: &str,
    node: String,
    options: impl FnOnce(&str) -> Value,
    teardown: &mut Teardown,
) -> Result<()> {
    let file = match way {
        Way::Named(path) => {
            teardown.push(Undo::Node { node });
            let options = options(server::text(path)?);
            return qmp.execute_raw("blockdev-add", options).await.map(drop);
        }
        Way::Open(file) => file,
    };
    let set = add_fd(qmp, file, owner).await?;
    teardown.push(Undo::FdSet { id: set });
    teardown.push(Undo::Node { node });
    let options = options(&format!("/dev/fdset/{set}"));
    qmp.execute_raw("blockdev-add", options).await?;
    // The node keeps the file open; the set would outlive it.
    qmp.execute(&remove_fd {
        fdset_id: set,
        fd: None,
    })
    .await?;
    teardown.forget(&Undo::FdSet { id: set });
    Ok(())
}

#[derive(Deserialize)]
struct AddedFd {
    #[serde(rename = "fdset-id")]
    set: i64,
}

async fn add_fd(qmp: &Qmp, file: &File, owner: &str) -> Result<i64> {
    let added = qmp
        .execute_with_fd("add-fd", json!({"opaque": owner}), file.as_fd())
        .await?;
    let added: AddedFd = serde_json::from_value(added).map_err(|error| {
        Error::new(Kind::MonitorProtocol, "reading add-fd's answer").because(error)
    })?;
    Ok(added.set)
}
