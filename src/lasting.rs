//! Commit in QEMU: pending checkpoints become lasting ones, on all disks or none.
//!
//! ```text
//! as their images store them --refused--> those of images that were closed meanwhile: not stored
//! ```

use crate::error::{Kind, Result};
use crate::opening::TRANSACTION_DEADLINE;
use crate::qemu::step::{self, Lasting};
use crate::qemu::{Qmp, query};

/// Makes them lasting.
///
/// # Errors
/// QEMU's: then none is.
pub(crate) async fn make(qmp: &Qmp, mut parts: Vec<Lasting<'_>>) -> Result<()> {
    let refused = match commit(qmp, &parts).await {
        Err(error) if error.kind() == Kind::QemuRefused => error,
        done => return done,
    };
    // QEMU 11.1 takes none to be stored in an image that an overlay has closed meanwhile. It
    // records all the same, as long as QEMU runs.
    let nodes = query::named_block_nodes(qmp).await?;
    let mut changed = false;
    for part in parts.iter_mut().filter(|part| part.persistent) {
        let mut its = nodes.iter().filter(|node| node.node_name == part.node);
        if its.any(|node| node.ro) {
            part.persistent = false;
            changed = true;
        }
    }
    if !changed {
        return Err(refused);
    }
    commit(qmp, &parts).await
}

async fn commit(qmp: &Qmp, parts: &[Lasting<'_>]) -> Result<()> {
    let run = qmp.execute_raw_within("transaction", step::commit(parts), TRANSACTION_DEADLINE);
    run.await.map(drop)
}
