//! Walking a view by offset: what changed, and what of it holds data.
//!
//! ```text
//! changes (dirty bitmap) --dirty--> allocation --> data, zero
//!        \--clean: same
//! ```

use crate::error::Result;
use crate::extent::{Content, Extent, Range, length};
use crate::nbd::{Client, Cursor, status};
use crate::view::View;

/// What a view holds, piece by piece; pieces are contiguous and never empty.
#[derive(Debug)]
pub(crate) struct Walk {
    /// For what is allocated, and for reads.
    data: Client,
    changes: Option<Client>,
    ask_allocation: bool,
    /// Changed ranges up to this length are told as data, unasked.
    unasked: u64,
    /// Walks the changes, in an incremental; the allocation, in a full.
    outer: Cursor,
    /// Walks the allocation of one changed range.
    inner: Option<Cursor>,
}

impl Walk {
    /// Connects, to walk `view` from `offset` on.
    pub(crate) async fn open(view: &View, offset: u64, unasked: u64) -> Result<Self> {
        let (_, ask_allocation) = view.read_max();
        Ok(Self {
            data: view.connect_data().await?,
            changes: view.connect_changes().await?,
            ask_allocation,
            unasked,
            outer: Cursor::new(offset..view.size()),
            inner: None,
        })
    }

    /// The connection for the view's bytes.
    pub(crate) fn data(&self) -> &Client {
        &self.data
    }

    /// Closes both connections.
    pub(crate) async fn close(self) {
        self.data.close().await;
        if let Some(changes) = self.changes {
            changes.close().await;
        }
    }

    /// The next piece.
    pub(crate) async fn next(&mut self) -> Result<Option<Extent>> {
        if let Some(inner) = &mut self.inner {
            if let Some(found) = inner.next(&self.data).await? {
                return Ok(Some(allocation(found)));
            }
            self.inner = None;
        }
        let data = |range| Extent {
            range,
            content: Content::Data,
        };
        let Some(changes) = &self.changes else {
            if !self.ask_allocation {
                return Ok(self.outer.rest().map(data));
            }
            return Ok(self.outer.next(&self.data).await?.map(allocation));
        };
        match self.outer.next(changes).await? {
            None => Ok(None),
            Some((range, flags)) if !status::is_dirty(flags) => Ok(Some(Extent {
                range,
                content: Content::Same,
            })),
            Some((range, _)) if length(&range) <= self.unasked || !self.ask_allocation => {
                Ok(Some(data(range)))
            }
            Some((range, _)) => {
                let mut inner = Cursor::new(range);
                let first = inner.next(&self.data).await?.map(allocation);
                self.inner = Some(inner);
                Ok(first)
            }
        }
    }
}

fn allocation((range, flags): (Range, u64)) -> Extent {
    Extent {
        range,
        content: status::content(flags),
    }
}
