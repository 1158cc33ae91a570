//! What a receiver of a push holds in memory, between QEMU's job and the host.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// Bytes that a receiver may hold before the job is paused,
const HIGH: u64 = 24 * 1024 * 1024;

/// and under which it goes on.
const LOW: u64 = 8 * 1024 * 1024;

/// How often a receiver that waits looks again.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a receiver of ours holds. The job is paused while it is much: a write that QEMU
/// has sent, and that nobody answers, would hold up QEMU at its next drain.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    held: AtomicU64,
    changed: Notify,
    /// The job is paused.
    paused: watch::Sender<bool>,
}

impl Flow {
    /// The job shall be paused.
    pub(crate) fn is_high(&self) -> bool {
        self.held.load(Ordering::Relaxed) > HIGH
    }

    /// The job may go on.
    pub(crate) fn is_low(&self) -> bool {
        self.held.load(Ordering::Relaxed) < LOW
    }

    /// Returns when one or the other may have come to be so.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The job is paused, or goes on.
    pub(crate) fn tell(&self, is_paused: bool) {
        self.paused.send_replace(is_paused);
    }

    /// Takes in bytes; waits while they are too many and the job goes on.
    pub(crate) async fn take(&self, bytes: u64) {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if held <= HIGH {
            return;
        }
        let mut paused = self.paused.subscribe();
        self.changed.notify_one();
        while !*paused.borrow_and_update() && self.is_high() {
            tokio::select! {
                closed = paused.changed() => if closed.is_err() { return },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Bytes have gone to the host.
    pub(crate) fn give(&self, bytes: u64) {
        let held = self.held.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if held < LOW && held + bytes >= LOW {
            self.changed.notify_one();
        }
    }
}
