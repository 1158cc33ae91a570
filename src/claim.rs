//! The right to consume a view: one stream or push has it at a time.

use std::sync::Arc;

use crate::error::Result;
use crate::view::View;

/// The right; gone with it is the right only. Whether all was consumed has to be said.
#[derive(Debug)]
pub(crate) struct Claim {
    view: Arc<View>,
}

impl Claim {
    /// Claims `view` for a pull that starts at `offset`.
    ///
    /// # Errors
    /// [`Kind::StreamActive`](crate::Kind::StreamActive);
    /// [`Kind::OffsetReleased`](crate::Kind::OffsetReleased);
    /// [`Kind::ScratchFull`](crate::Kind::ScratchFull).
    pub(crate) fn pull(view: Arc<View>, offset: u64) -> Result<Self> {
        view.start_pull(offset)?;
        Ok(Self { view })
    }

    /// Claims all of `view`, for a push or a map.
    ///
    /// # Errors
    /// As [`Claim::pull`].
    pub(crate) fn whole(view: Arc<View>) -> Result<Self> {
        view.start()?;
        Ok(Self { view })
    }

    /// What is claimed.
    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// All of it has reached the host, or its target: the disk can be committed.
    pub(crate) fn complete(&self) {
        self.view.complete();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.view.stop();
    }
}
