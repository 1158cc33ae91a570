//! What a receiver of a push holds in memory, between QEMU's job and the host.
//!
//! ```text
//! 0 ---------- LOW ---------- HIGH ------------------ MOST
//!   job goes on    as it was      job is paused, once      write is refused:
//!                                 QEMU has heard of it     job stops by itself
//! ```
//! No write waits: QEMU would wait for it at its next drain, and its guest with it. So QEMU
//! is told to pause the job, which takes a while and may take long; and what comes all the
//! same is refused in the end, whereupon QEMU stops the job and keeps the write for later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Bytes that a receiver may hold before the job is paused,
const HIGH: u64 = 24 * 1024 * 1024;

/// and under which it goes on,
const LOW: u64 = 8 * 1024 * 1024;

/// and the most that it holds: a job that is paused at once does not come near, with all
/// its writes that were under way.
const MOST: u64 = 128 * 1024 * 1024;

/// What a write counts for at least: zeros come without bytes, and take memory too.
const LEAST: u64 = 4 * 1024;

/// Nothing is waited for.
const NOTHING: u64 = u64::MAX;

/// What a receiver holds.
#[derive(Debug)]
pub(crate) struct Flow {
    held: AtomicU64,
    /// The offset of the write that the receiver cannot go on without.
    awaited: AtomicU64,
    changed: Notify,
}

/// One write's part of it, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    flow: Arc<Flow>,
    bytes: u64,
}

impl Flow {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            held: AtomicU64::new(0),
            awaited: AtomicU64::new(NOTHING),
            changed: Notify::new(),
        })
    }

    /// Takes in the write at `offset`, with so many bytes to keep. `None`: it is to be
    /// refused. The one that the receiver waits for never is, or nothing would go on.
    pub(crate) fn take(self: &Arc<Self>, offset: u64, bytes: u64) -> Option<Held> {
        let bytes = bytes.max(LEAST);
        let (order, awaited) = (Ordering::Relaxed, &self.awaited);
        let is_awaited = awaited
            .compare_exchange(offset, NOTHING, order, order)
            .is_ok();
        let fits = |held| (is_awaited || held + bytes <= MOST).then_some(held + bytes);
        let before = self.held.fetch_update(order, order, fits).ok()?;
        if before <= HIGH && before + bytes > HIGH {
            self.changed.notify_one();
        }
        Some(Held {
            flow: Arc::clone(self),
            bytes,
        })
    }

    /// The receiver cannot go on without the write at this offset, until that is taken in;
    /// `None`: it can.
    pub(crate) fn wait_for(&self, offset: Option<u64>) {
        let offset = offset.unwrap_or(NOTHING);
        self.awaited.store(offset, Ordering::Relaxed);
    }

    /// The job shall be paused.
    pub(crate) fn is_high(&self) -> bool {
        self.held.load(Ordering::Relaxed) > HIGH
    }

    /// The job may go on.
    pub(crate) fn is_low(&self) -> bool {
        self.held.load(Ordering::Relaxed) < LOW
    }

    /// The receiver waits for a write: a job that stands still has to go on.
    pub(crate) fn is_starving(&self) -> bool {
        self.awaited.load(Ordering::Relaxed) != NOTHING
    }

    #[cfg(test)]
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Returns when it may have come to be high, or low.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let before = self.flow.held.fetch_sub(self.bytes, Ordering::Relaxed);
        if before >= LOW && before - self.bytes < LOW {
            self.flow.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests;
