//! What a monitor says first: QEMU's version. It greets one client at a time.

use std::time::Duration;

use tokio::io::AsyncRead;

use crate::error::{Error, Kind, Result};
use crate::qemu::actor::next;
use crate::qemu::line::{Lines, Message};

/// The first major version whose monitor reads all of what comes over TLS. Those before wait for
/// more once they have read the first byte.
pub(super) const HEARS_TLS: u64 = 8;

/// Reads it, of a QEMU of the major version `least` or newer.
///
/// # Errors
/// [`Kind::MonitorBusy`]: there is none within `deadline`; [`Kind::QemuUnsupported`];
/// [`Kind::MonitorProtocol`]; [`Kind::MonitorClosed`].
pub(super) async fn read(
    reader: &mut (impl AsyncRead + Unpin),
    lines: &mut Lines,
    deadline: Duration,
    least: u64,
) -> Result<()> {
    let said = tokio::time::timeout(deadline, said(reader, lines)).await;
    let major = said.map_err(|_elapsed| missing())??;
    if major.is_some_and(|major| major < least) {
        let why = format!("it hears nothing over TLS: QEMU {least}.0 and later do");
        return Err(Error::new(Kind::QemuUnsupported, "asking QEMU").because(why));
    }
    Ok(())
}

/// There is none: QEMU greets another client.
pub(super) fn missing() -> Error {
    Error::new(Kind::MonitorBusy, "waiting for the monitor's greeting")
        .because("another client holds this monitor")
}

/// The major version of QEMU, if it tells.
async fn said(reader: &mut (impl AsyncRead + Unpin), lines: &mut Lines) -> Result<Option<u64>> {
    let broken = |why: &'static str| {
        Error::new(Kind::MonitorProtocol, "reading the monitor's greeting").because(why)
    };
    match next(reader, lines).await? {
        Some(Message {
            greeting: Some(said),
            ..
        }) => Ok(said["version"]["qemu"]["major"].as_u64()),
        Some(_) => Err(broken("the first line is no QMP greeting")),
        None => Err(
            Error::new(Kind::MonitorClosed, "reading the monitor's greeting")
                .because("end of file"),
        ),
    }
}
