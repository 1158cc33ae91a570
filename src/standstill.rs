//! A guest that stands still because scratch was full, once that scratch is gone.
//!
//! ```text
//! look --> the point in time is taken away --> go_on: cont, if it stands still for want of it
//! ```
//! QEMU stops a guest whose old data has no room, and has it go on only when it is told. Whoever
//! takes away what the room was needed for has to tell it: nobody else will.

use std::time::Duration;

use qapi::qmp::cont;
use tracing::{info, warn};

use crate::error::Result;
use crate::qemu::Qmp;
use crate::qemu::discover::where_known;
use crate::qemu::query::{self, BlockDevice};
use crate::teardown::Teardown;

/// How long QEMU gets to tell or to go on, beside what it gets to let go of things.
const SOON: Duration = Duration::from_secs(2);

/// QEMU's run state of a guest that it has stopped for an error of a disk.
const STOPPED: &str = "io-error";

/// Whether QEMU has stopped its guest for an error of a disk. A storage daemon has none.
///
/// # Errors
/// QEMU's, the monitor's.
pub(crate) async fn is_stopped(qmp: &Qmp) -> Result<bool> {
    let status = where_known(query::status(qmp).await)?;
    Ok(status.as_deref() == Some(STOPPED))
}

/// Whether the write of a device found no room, on or below this node.
pub(crate) fn is_full(device: &BlockDevice, node: &str) -> bool {
    device.io_status.as_deref() == Some("nospace")
        && device
            .inserted
            .as_ref()
            .is_some_and(|inserted| inserted.node_name == node)
}

/// Takes a point in time away, whose filters in QEMU have these names: a guest that stands
/// still for want of its scratch goes on. Returns what could not be removed, with the reason.
pub(crate) async fn end(qmp: &Qmp, teardown: Teardown, filters: &[String]) -> Vec<String> {
    let may_be_ours = tokio::time::timeout(SOON, look(qmp, filters)).await;
    let leftovers = teardown.run(qmp).await;
    if let Ok(Ok(true)) = may_be_ours {
        match tokio::time::timeout(SOON, go_on(qmp)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(error = error.chain(), "a guest may stand still"),
            Err(_slow) => warn!("a guest may stand still: QEMU is too slow"),
        }
    }
    leftovers
}

/// Whether a guest that stands still after this may do so for want of scratch: it does by now,
/// or it runs, and can come to do so until the scratch is gone.
async fn look(qmp: &Qmp, filters: &[String]) -> Result<bool> {
    if !is_stopped(qmp).await? {
        return Ok(true);
    }
    let devices = query::block_devices(qmp).await?;
    let is_ours = |device| filters.iter().any(|filter| is_full(device, filter));
    Ok(devices.iter().any(is_ours))
}

async fn go_on(qmp: &Qmp) -> Result<()> {
    if is_stopped(qmp).await? {
        qmp.execute(&cont {}).await?;
        info!("the guest goes on: its writes need no scratch any more");
    }
    Ok(())
}
