//! Reusable buffers from a bounded pool. A buffer is also the credit to have
//! one more request under way: who holds none cannot ask QEMU for bytes, so
//! replies always find room and memory stays bounded whatever the host does.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::flow::Held;

/// A bounded set of buffers, shared by cloning.
#[derive(Clone, Debug)]
pub struct Pool {
    permits: Arc<Semaphore>,
    idle: Arc<Idle>,
}

/// Memory for the next buffers.
#[derive(Debug)]
struct Idle {
    most: usize,
    kept: Mutex<Vec<Vec<u8>>>,
}

impl Idle {
    fn kept(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// At most `count` buffers exist at a time. Memory is taken on first use.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let kept = Mutex::default();
        Self {
            permits: Arc::new(Semaphore::new(count)),
            idle: Arc::new(Idle { most: count, kept }),
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

    /// A buffer that `held` counts until it is dropped, and not the pool, which only lends
    /// memory: none that is much longer, which would not be counted.
    pub(crate) fn counted(&self, length: usize, held: Held) -> Buffer {
        let idle = self.idle.kept().pop();
        let fits = |bytes: &Vec<u8>| (length..=2 * length).contains(&bytes.capacity());
        let mut bytes = idle.filter(fits).unwrap_or_default();
        bytes.resize(length, 0);
        Buffer {
            bytes,
            idle: Arc::clone(&self.idle),
            _permit: None,
            _held: Some(held),
        }
    }

    fn fit(&self, length: usize, permit: Option<OwnedSemaphorePermit>) -> Buffer {
        let mut bytes = self.idle.kept().pop().unwrap_or_default();
        bytes.resize(length, 0);
        Buffer {
            bytes,
            idle: Arc::clone(&self.idle),
            _permit: permit,
            _held: None,
        }
    }
}

/// Bytes from a [`Pool`]; they go back to it on drop.
pub struct Buffer {
    bytes: Vec<u8>,
    idle: Arc<Idle>,
    // Dropped after `drop` has put the bytes back, so that the next taker finds them.
    _permit: Option<OwnedSemaphorePermit>,
    _held: Option<Held>,
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
        let mut kept = self.idle.kept();
        if kept.len() < self.idle.most {
            kept.push(bytes);
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
    use crate::flow::Flow;

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

    #[test]
    fn counted_buffers_have_no_memory_that_is_not_counted() {
        let (pool, flow) = (Pool::new(2), Flow::new());
        let counted = |length: u32| {
            let held = flow.take(0, length.into()).unwrap();
            pool.counted(usize::try_from(length).unwrap(), held)
        };
        let long = counted(1 << 20);
        let address = long.as_ptr();
        drop(long);
        let again = counted(1 << 20);
        assert_eq!((again.as_ptr(), again.len()), (address, 1 << 20));
        drop(again);
        assert!(counted(1 << 16).bytes.capacity() <= 1 << 17);
        // However many there were, few are kept.
        let many: Vec<Buffer> = (0..10).map(|_| counted(1 << 20)).collect();
        assert_eq!(flow.held(), 10 << 20);
        drop(many);
        assert_eq!((flow.held(), pool.idle.kept().len()), (0, 2));
    }
}
