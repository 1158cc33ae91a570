//! The turn to change QEMU's nodes.

use std::ops::Deref;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::qemu::Qmp;
use crate::qemu::lull::{Lulls, Mover, Wish};

/// Whose turn it is at one QEMU; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    lock: Arc<Mutex<()>>,
    lulls: Arc<Lulls>,
}

/// The turn to change QEMU's nodes: a handle whose commands need not wait for it.
///
/// One at a time, until it is seen that a change is done: a job that ends, or an export that
/// goes, does so in its own time, and QEMU 10.0.2 was seen to abort when that fell into
/// another change ("bdrv\_graph\_wrlock: Assertion `!qatomic_read(&has_writer)' failed",
/// disks on iothreads). A single command takes and leaves the turn by itself.
#[derive(Debug)]
pub struct Turn {
    qmp: Qmp,
    _wish: Option<Wish>,
    _guard: Option<OwnedMutexGuard<()>>,
}

impl Deref for Turn {
    type Target = Qmp;

    fn deref(&self) -> &Qmp {
        &self.qmp
    }
}

impl Qmp {
    /// Waits for the turn to change QEMU's nodes, and takes it. Pushes stand still meanwhile.
    pub async fn turn(&self) -> Turn {
        let turn = self.turn_beside_pushes().await;
        if self.has_turn {
            return turn;
        }
        Turn {
            _wish: Some(self.lull().await),
            ..turn
        }
    }

    /// Waits until no push moves, or as long as is of use; none goes on while what is returned lives.
    pub async fn lull(&self) -> Wish {
        let wish = self.turns.lulls.want();
        wish.granted().await;
        wish
    }

    /// The turn for what changes no nodes, and is not to fall into a change.
    pub async fn turn_beside_pushes(&self) -> Turn {
        let guard = if self.has_turn {
            None
        } else {
            Some(Arc::clone(&self.turns.lock).lock_owned().await)
        };
        Turn {
            qmp: self.in_turn(),
            _wish: None,
            _guard: guard,
        }
    }

    /// A push that moves from now on: it is to stand still when that is wanted.
    #[must_use]
    pub fn mover(&self) -> Mover {
        self.turns.lulls.mover()
    }
}
