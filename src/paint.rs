//! Dirty bitmaps with a given content.
//!
//! QEMU has no command that sets bits. A write does: so a `null-co` node of the
//! disk's size, which keeps nothing, gets a bitmap and is exported, and zeros are
//! written over what shall be dirty. Other bitmaps then merge it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::entry;
use crate::error::{Error, Kind, Result};
use crate::extent::{Range, length, next_cut};
use crate::nbd::{Address, Client, Ticket};
use crate::qemu::Qmp;
use crate::qemu::step::{self, Names};
use crate::teardown::{Teardown, Undo};

/// Longest range of one request: fits compact headers.
const STEP: u64 = 1 << 30;

/// Most requests under way.
const WRITES: usize = 16;

/// How long QEMU gets to answer one request.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// The bitmap's name on its node, [`Names::canvas`].
pub const BITMAP: &str = "painted";

/// A bitmap that is being made. It lives until the teardown runs that it was opened with.
#[derive(Debug)]
pub struct Canvas {
    size: u64,
    client: Client,
    tickets: VecDeque<Ticket<()>>,
}

impl Canvas {
    /// Makes an empty bitmap for a disk of `size` bytes, in a QEMU whose NBD server is at
    /// `address`.
    ///
    /// # Errors
    /// QEMU's and NBD's.
    pub async fn open(
        qmp: &Qmp,
        names: &Names,
        size: u64,
        granularity: u64,
        address: &Address,
        teardown: &mut Teardown,
    ) -> Result<Self> {
        let node = names.canvas();
        teardown.push(Undo::Node { node: node.clone() });
        qmp.execute_raw("blockdev-add", step::canvas(names, size))
            .await?;
        let add = step::add_bitmap(&node, BITMAP, granularity, false, false);
        qmp.execute_raw("transaction", step::transaction(vec![add]))
            .await?;
        teardown.push(Undo::Export { id: node.clone() });
        qmp.execute_raw("block-export-add", step::canvas_export(names))
            .await?;
        Ok(Self {
            size,
            client: entry::connect(qmp, address, &node, None, NBD_DEADLINE).await?,
            tickets: VecDeque::new(),
        })
    }

    /// Makes a range dirty.
    ///
    /// # Errors
    /// NBD's; [`Kind::InvalidRequest`] as [`check`].
    pub async fn paint(&mut self, range: Range) -> Result<()> {
        check(&range, self.size)?;
        let mut at = range.start;
        while at < range.end {
            if self.tickets.len() >= WRITES
                && let Some(oldest) = self.tickets.pop_front()
            {
                oldest.await?;
            }
            let end = next_cut(at, STEP, range.end);
            let zeros = self
                .client
                .submit_write_zeroes(at, length(&(at..end)), false);
            self.tickets.push_back(zeros.await?);
            at = end;
        }
        Ok(())
    }

    /// The bitmap is complete; other bitmaps can merge it.
    ///
    /// # Errors
    /// NBD's, of any of the ranges.
    pub async fn finish(mut self) -> Result<()> {
        let mut done = Ok(());
        while let Some(ticket) = self.tickets.pop_front() {
            done = done.and(ticket.await);
        }
        self.client.close().await;
        done
    }
}

/// Whether a range lies in a disk of `size` bytes.
///
/// # Errors
/// [`Kind::InvalidRequest`] where it is empty, or ends behind the disk's end.
pub fn check(range: &Range, size: u64) -> Result<()> {
    if range.start < range.end && range.end <= size {
        return Ok(());
    }
    Err(
        Error::new(Kind::InvalidRequest, "reading the changed ranges")
            .because(format!(
                "the disk has {size} bytes, and this range is {range:?}"
            ))
            .at(range.start),
    )
}
