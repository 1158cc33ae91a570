//! A point in time that QEMU has given up by itself (`on-cbw-error`, QEMU 10.1 and later): old
//! data found no room, and the guest's write went on without.
//!
//! ```text
//! asked for by anybody:      refused, from then on and for ever; nothing is told beforehand
//! the last that is to be read:  refused too?  yes: it is broken
//!                                             no:  what was refused had been given back
//! ```
//! What is given back is refused in the same way, and the last is given back last, but for pushes
//! that give back what they have written: of those only what they find out themselves counts.

use tokio::sync::OnceCell;

use crate::error::{Error, Kind, Result};
use crate::nbd::{Cursor, status};
use crate::view::View;

/// Bytes that are asked for: the least that QEMU answers for.
const SECTOR: u64 = 512;

/// Asks whether a view is broken.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    /// Where the last sector begins that is to be read; `None`: none is.
    last: OnceCell<Option<u64>>,
}

impl Probe {
    /// Whether it is; for one that a push has spent, only where something was refused.
    ///
    /// # Errors
    /// NBD's.
    pub(crate) async fn is_broken(&self, view: &View) -> Result<bool> {
        let Some(last) = *self.last.get_or_try_init(|| find_last(view)).await? else {
            return Ok(false);
        };
        let client = view.connect_data().await?;
        let length = SECTOR.min(view.size() - last);
        // What is allocated, and no byte: a disk that cannot be read is not broken.
        let answered = match client.submit_block_status(last, length).await {
            Ok(ticket) => ticket.await.map(drop),
            Err(error) => Err(error),
        };
        client.close().await;
        match answered {
            Ok(()) => Ok(false),
            // QEMU's EACCES, of which NBD knows nothing. A consumer may have come to it meanwhile.
            Err(error) if is_denied(&error) => Ok(view.released() <= last),
            Err(error) => Err(error),
        }
    }
}

fn is_denied(error: &Error) -> bool {
    error.kind() == Kind::NbdRefused && error.chain().contains("EINVAL")
}

async fn find_last(view: &View) -> Result<Option<u64>> {
    let Some(changes) = view.connect_changes().await? else {
        return Ok(last_sector(view.size()));
    };
    let mut end = 0;
    let mut cursor = Cursor::new(0..view.size());
    while let Some((range, flags)) = cursor.next(&changes).await? {
        if status::is_dirty(flags) {
            end = range.end;
        }
    }
    changes.close().await;
    Ok(last_sector(end))
}

fn last_sector(end: u64) -> Option<u64> {
    end.checked_sub(1).map(|last| last / SECTOR * SECTOR)
}
