//! Lulls: pushes stand still while QEMU's nodes change.
//!
//! ```text
//! a change: wanted --> no push moves, or it has waited long enough --> the change --> over
//! a push:   moves --(wanted)--> paused, and nothing of it under way: still --(over)--> moves
//! ```
//! QEMU waits, at many a step of a change, for what jobs have under way, and its guest waits with
//! it. Measured with 10.0.2 and a target that takes 300 ms for each write: the start of another
//! disk's push took 3.6 s, in which QEMU heard nobody; with the first one paused, none.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::watch;

/// How long a change waits for pushes: one whose target hangs does not come to a stand. QEMU
/// waits for it then, until it is cut off.
const DEADLINE: Duration = Duration::from_secs(10);

/// Who wants a lull of one QEMU's pushes, and who moves.
#[derive(Debug, Default)]
pub(super) struct Lulls {
    wanted: watch::Sender<usize>,
    moving: watch::Sender<usize>,
    /// What moves does not come to a stand: it was waited for in vain.
    in_vain: AtomicBool,
}

impl Lulls {
    /// A lull is wanted.
    pub(super) fn want(self: &Arc<Self>) -> Wish {
        self.wanted.send_modify(|wanted| *wanted += 1);
        Wish(Arc::clone(self))
    }

    /// There is a push, which moves.
    pub(super) fn mover(self: &Arc<Self>) -> Mover {
        self.moving.send_modify(|moving| *moving += 1);
        Mover {
            wanted: self.wanted.subscribe(),
            lulls: Arc::clone(self),
            moves: true,
        }
    }
}

/// Somebody's wish for a lull, for as long as it lives.
#[derive(Debug)]
pub struct Wish(Arc<Lulls>);

impl Wish {
    /// Returns when nothing moves any more, or when it is no use to wait longer.
    pub(super) async fn granted(&self) {
        self.granted_within(DEADLINE).await;
    }

    async fn granted_within(&self, deadline: Duration) {
        if self.0.in_vain.load(Relaxed) {
            return;
        }
        let mut moving = self.0.moving.subscribe();
        let still = moving.wait_for(|moving| *moving == 0);
        let in_vain = tokio::time::timeout(deadline, still).await.is_err();
        self.0.in_vain.store(in_vain, Relaxed);
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        self.0.wanted.send_modify(|wanted| *wanted -= 1);
    }
}

/// A push, as those see it who want a lull; until it is dropped.
#[derive(Debug)]
pub struct Mover {
    wanted: watch::Receiver<usize>,
    lulls: Arc<Lulls>,
    moves: bool,
}

impl Mover {
    /// Whether a lull is wanted.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        *self.wanted.borrow() > 0
    }

    /// Returns when that may have changed since the last time.
    pub async fn changed(&mut self) {
        // Its other end lives as long as this.
        let _ended = self.wanted.changed().await;
    }

    /// Whether it moves, as it has told.
    #[must_use]
    pub fn moves(&self) -> bool {
        self.moves
    }

    /// Tells whether it moves. It does before it goes on.
    pub fn set_moves(&mut self, moves: bool) {
        if self.moves != moves {
            self.moves = moves;
            self.lulls.moving.send_modify(|moving| {
                *moving = if moves { *moving + 1 } else { *moving - 1 };
                if *moving == 0 {
                    // What hung has come to a stand.
                    self.lulls.in_vain.store(false, Relaxed);
                }
            });
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.set_moves(false);
        // It may have been the one.
        self.lulls.in_vain.store(false, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it is granted, as far as that shows soon.
    async fn is_granted(wish: &Wish) -> bool {
        let soon = Duration::from_millis(20);
        tokio::time::timeout(soon, wish.granted()).await.is_ok()
    }

    #[tokio::test]
    async fn a_wish_waits_for_all_that_moves() {
        let lulls = Arc::new(Lulls::default());
        assert!(is_granted(&lulls.want()).await, "nothing moves");
        let (mut one, other) = (lulls.mover(), lulls.mover());
        let wish = lulls.want();
        assert!(!is_granted(&wish).await);
        one.set_moves(false);
        one.set_moves(false);
        assert!(!is_granted(&wish).await, "the other moves");
        drop(other);
        assert!(is_granted(&wish).await);
        one.set_moves(true);
        assert!(!is_granted(&wish).await);
        drop(one);
        assert!(is_granted(&wish).await);
    }

    #[tokio::test]
    async fn nobody_waits_twice_in_vain() {
        let lulls = Arc::new(Lulls::default());
        let (mut hung, mut other) = (lulls.mover(), lulls.mover());
        lulls.want().granted_within(Duration::from_millis(20)).await;
        other.set_moves(false);
        other.set_moves(true);
        assert!(is_granted(&lulls.want()).await, "it hangs still");
        for mover in [&mut hung, &mut other] {
            mover.set_moves(false);
        }
        for mover in [&mut hung, &mut other] {
            mover.set_moves(true);
        }
        assert!(
            !is_granted(&lulls.want()).await,
            "it has come to a stand meanwhile"
        );
        lulls.want().granted_within(Duration::from_millis(20)).await;
        drop(hung);
        let wish = lulls.want();
        assert!(!is_granted(&wish).await);
        other.set_moves(false);
        assert!(is_granted(&wish).await);
    }

    #[tokio::test]
    async fn a_mover_hears_of_wishes() {
        let lulls = Arc::new(Lulls::default());
        let mut mover = lulls.mover();
        assert!(!mover.is_wanted());
        let wishes = (lulls.want(), lulls.want());
        mover.changed().await;
        assert!(mover.is_wanted());
        drop(wishes.0);
        assert!(mover.is_wanted(), "one is left");
        drop(wishes.1);
        mover.changed().await;
        assert!(!mover.is_wanted());
    }
}
