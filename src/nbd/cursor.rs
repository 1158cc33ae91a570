//! Block status of a range, piece by piece.

use std::collections::VecDeque;

use crate::error::{Error, Kind, Result};
use crate::extent::{Range, length};
use crate::nbd::Client;

/// Longest range of one request: fits compact headers, and keeps QEMU's answer to one
/// within its own limit in practice.
const STEP: u64 = 1 << 30;

/// Walks a range by block status, in steps, with a fixed amount of memory.
#[derive(Debug)]
pub(crate) struct Cursor {
    rest: Range,
    known: VecDeque<(u64, u64)>,
}

impl Cursor {
    pub(crate) fn new(range: Range) -> Self {
        Self {
            rest: range,
            known: VecDeque::new(),
        }
    }

    /// All that is left, at once, without asking.
    pub(crate) fn rest(&mut self) -> Option<Range> {
        let rest = self.rest.clone();
        self.rest.start = rest.end;
        (!rest.is_empty()).then_some(rest)
    }

    /// The next piece and its flags; pieces are contiguous and never empty.
    pub(crate) async fn next(&mut self, client: &Client) -> Result<Option<(Range, u64)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        if self.known.is_empty() {
            let ask = length(&self.rest).min(STEP);
            self.known = client
                .submit_block_status(self.rest.start, ask)
                .await?
                .await?
                .into();
        }
        let Some((bytes, flags)) = self.known.pop_front() else {
            return Err(
                Error::new(Kind::NbdProtocol, "reading block status").because("an empty answer")
            );
        };
        let start = self.rest.start;
        self.rest.start += bytes;
        Ok(Some((start..self.rest.start, flags)))
    }
}
