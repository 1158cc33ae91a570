//! Reusable buffers from a bounded pool. A buffer is also the credit to have
//! one more request under way: who holds none cannot ask QEMU for bytes, so
//! replies always find room and memory stays bounded whatever the host does.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::flow::Held;

/// A bounded set of buffers, shared by cloning.
#[derive(Clone, Debug)]
pub struct Pool {
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Pool {
    /// At most `count` buffers exist at a time. Memory is taken on first use.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(count)),
            idle: Arc::default(),
        }
    }

    /// A buffer of `length` bytes, if one is free now.
    #[must_use]
    pub fn try_take(&self, length: usize) -> Option<Buffer> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some(self.fit(length, Some(permit)))
    }

    /// Waits for a free buffer and makes it `length` bytes long (contents
    /// unspecified: earlier bytes or zeros). Cancel-safe.
    pub async fn take(&self, length: usize) -> Buffer {
        // Never closed; were it, an unbounded buffer would be the only harm.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        self.fit(length, permit)
    }

    fn fit(&self, length: usize, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        let mut bytes = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
            .unwrap_or_default();
        bytes.resize(length, 0);
        Buffer {
            bytes,
            idle: Some(Arc::clone(&self.idle)),
            _permit: permit,
            _held: None,
        }
    }
}

/// Bytes from a [`Pool`], which go back to it on drop; or of a receiver, which counts them
/// until then.
pub struct Buffer {
    bytes: Vec<u8>,
    idle: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
    // Dropped after `drop` has put the bytes back, so that the next taker finds them.
    _permit: Option<OwnedSemaphorePermit>,
    _held: Option<Held>,
}

impl Buffer {
    /// `length` zeros of no pool, counted as `held`.
    pub(crate) fn counted(length: usize, held: Held) -> Self {
        Self {
            bytes: vec![0; length],
            idle: None,
            _permit: None,
            _held: Some(held),
        }
    }
}

impl fmt::Debug for Buffer {
    /// Only the length: a guest's data belongs in no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes.len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if let Some(idle) = &self.idle {
            idle.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(bytes);
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_pool_is_bounded_and_reuses_memory() {
        let pool = Pool::new(1);
        let first = pool.take(4096).await;
        let address = first.as_ptr();
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(20), pool.take(1))
                .await
                .is_err()
        );
        drop(first);
        let second = pool.take(4096).await;
        assert_eq!(second.as_ptr(), address);
        assert_eq!(second.len(), 4096);
    }
}
