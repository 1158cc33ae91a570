//! QEMU's events that a host should hear of while a backup is open.

use std::time::Duration;

use qemu_fleece_engine::guard::{Notice, What};
use qemu_fleece_engine::qemu::Event;
use qemu_fleece_protocol::envelope::notification_line;
use qemu_fleece_protocol::event::{VmEvent, VmParams};
use qemu_fleece_protocol::scratch::{ScratchEvent, ScratchParams};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::writer::Outlet;

/// Tells of events until `over`, or until QEMU or the host is gone.
pub(crate) fn spawn(
    backup: String,
    mut events: broadcast::Receiver<Event>,
    over: CancellationToken,
    outlet: Outlet,
) {
    tokio::spawn(async move {
        loop {
            let received = tokio::select! {
                () = over.cancelled() => return,
                received = events.recv() => received,
            };
            let (event, detail, last) = match received {
                Ok(event) => match to_vm(&event) {
                    Some((what, detail)) => (what, detail, false),
                    None => continue,
                },
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "events of QEMU were missed");
                    continue;
                }
                Err(RecvError::Closed) => (VmEvent::MonitorClosed, None, true),
            };
            let params = VmParams {
                backup: backup.clone(),
                event,
                detail,
            };
            let Ok(line) = notification_line("vm", params, None) else {
                return;
            };
            if outlet.send(line.into()).await.is_err() || last {
                return;
            }
        }
    });
}

/// Tells of scratch until its guard ends.
pub(crate) fn spawn_scratch(backup: String, mut notices: mpsc::Receiver<Notice>, outlet: Outlet) {
    tokio::spawn(async move {
        while let Some(notice) = notices.recv().await {
            let params = ScratchParams {
                backup: backup.clone(),
                disk: notice.disk,
                event: match notice.what {
                    What::High => ScratchEvent::High,
                    What::Full => ScratchEvent::Full,
                    What::GivenUp => ScratchEvent::GivenUp,
                    What::Resumed => ScratchEvent::Resumed,
                },
                scratch_bytes: notice.scratch_bytes,
                paused_ms: notice.paused.map(to_ms),
            };
            let Ok(line) = notification_line("scratch", params, None) else {
                return;
            };
            if outlet.send(line.into()).await.is_err() {
                return;
            }
        }
    });
}

fn to_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn to_vm(event: &Event) -> Option<(VmEvent, Option<String>)> {
    let what = match event.name.as_str() {
        "STOP" => VmEvent::Paused,
        "RESUME" => VmEvent::Resumed,
        "SHUTDOWN" => VmEvent::Shutdown,
        "RESET" => VmEvent::Reset,
        "BLOCK_IO_ERROR" => VmEvent::IoError,
        _ => return None,
    };
    let detail = event.data.as_object().is_some_and(|data| !data.is_empty());
    Some((what, detail.then(|| event.data.to_string())))
}
