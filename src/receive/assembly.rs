//! Writes in any order become chunks by offset.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::chunk::{Chunk, Chunks};
use crate::error::{Error, Kind, Result};
use crate::extent::{Content, Extent};
use crate::flow::Flow;
use crate::receive::intake::Piece;
use crate::receive::plan::{Plan, Step};
use crate::view::READ_MAX;

/// What comes next.
#[derive(Debug)]
pub(super) enum Next {
    Chunk(Chunk),
    /// Nothing: all is there, and no more was written.
    End,
    /// Nothing is written any more, and something is missing.
    Early,
}

/// Puts pieces in order, and holds them against the plan.
#[derive(Debug)]
pub(super) struct Assembly {
    pieces: mpsc::UnboundedReceiver<Piece>,
    /// What came ahead of its turn, by offset.
    ahead: BTreeMap<u64, Piece>,
    flow: Arc<Flow>,
    plan: Plan,
    chunks: Chunks,
    /// What is in order before it is in `chunks`, or handed over.
    at: u64,
    /// What will be written, up to here, is known.
    expected: u64,
}

impl Assembly {
    pub(super) fn new(plan: Plan, pieces: mpsc::UnboundedReceiver<Piece>, flow: Arc<Flow>) -> Self {
        Self {
            pieces,
            ahead: BTreeMap::new(),
            flow,
            plan,
            chunks: Chunks::new(READ_MAX),
            at: 0,
            expected: 0,
        }
    }

    /// # Errors
    /// [`Kind::NbdProtocol`] where something is written that is not to be; NBD's, of the
    /// look at what changed.
    pub(super) async fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(chunk) = self.chunks.pop() {
                return Ok(Next::Chunk(chunk));
            }
            if self.at < self.expected {
                match self.piece().await? {
                    Some(piece) => self.put(piece),
                    None => return Ok(Next::Early),
                }
                continue;
            }
            match self.plan.next().await? {
                Some(Step::Same(range)) if range.start == self.at => {
                    self.at = range.end;
                    self.expected = range.end;
                    self.chunks.known(Extent {
                        range,
                        content: Content::Same,
                    });
                }
                Some(Step::Same(_)) => return Err(unplanned()),
                Some(Step::Written(end)) => self.expected = end,
                None if self.chunks.flush() => {}
                None => return self.end().await,
            }
        }
    }

    fn put(&mut self, piece: Piece) {
        match piece {
            Piece::Zero(range, _held) => self.chunks.known(Extent {
                range,
                content: Content::Zero { hole: false },
            }),
            Piece::Data(range, buffer) => self.chunks.bytes(range.start, buffer),
        }
    }

    /// The piece at `at`; `None`: nothing is written any more.
    async fn piece(&mut self) -> Result<Option<Piece>> {
        let mut is_awaited = false;
        loop {
            if let Some(piece) = self.ahead.remove(&self.at) {
                self.at = piece.range().end;
                self.flow.wait_for(None);
                return Ok(Some(piece));
            }
            if !is_awaited {
                self.flow.wait_for(Some(self.at));
                is_awaited = true;
            }
            match self.pieces.recv().await {
                Some(piece) => self.keep(piece)?,
                None => return Ok(None),
            }
        }
    }

    fn keep(&mut self, piece: Piece) -> Result<()> {
        let range = piece.range().clone();
        let before = self.ahead.range(..range.end).next_back();
        let overlaps = before.is_some_and(|(_, piece)| piece.range().end > range.start);
        if range.start < self.at || overlaps {
            return Err(broken("a range that is written twice"));
        }
        self.ahead.insert(range.start, piece);
        Ok(())
    }

    /// Waits until nothing more can be written.
    async fn end(&mut self) -> Result<Next> {
        if !self.ahead.is_empty() || self.pieces.recv().await.is_some() {
            return Err(unplanned());
        }
        Ok(Next::End)
    }
}

fn broken(what: &'static str) -> Error {
    Error::new(Kind::NbdProtocol, "receiving a push").because(what)
}

fn unplanned() -> Error {
    broken("a write of what did not change")
}

#[cfg(test)]
mod tests;
