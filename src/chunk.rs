//! Chunks: what a disk's stream is made of in memory. Pure.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::extent::{Content, Extent, Range, next_cut, split_zeros};

/// Bytes of a chunk; clones and slices share the buffer.
#[derive(Clone, Debug)]
pub struct Slice {
    buffer: Arc<Buffer>,
    range: std::ops::Range<usize>,
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// A piece of the disk. Chunks are contiguous and never empty.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Where, and what it holds. Data never crosses a multiple of the stream's cut.
    pub extent: Extent,
    /// The bytes, of data.
    pub bytes: Option<Slice>,
}

/// Joins pieces of a disk, which come by offset, to chunks.
#[derive(Debug)]
pub(crate) struct Chunks {
    /// Data never crosses a multiple of it.
    cut: u64,
    /// The last piece without bytes, as long as the next may still lengthen it.
    held: Option<Extent>,
    out: VecDeque<Chunk>,
}

impl Chunks {
    pub(crate) fn new(cut: u64) -> Self {
        Self {
            cut,
            held: None,
            out: VecDeque::new(),
        }
    }

    /// The next chunk that is complete.
    pub(crate) fn pop(&mut self) -> Option<Chunk> {
        self.out.pop_front()
    }

    /// A piece without bytes: lengthens the one before, or follows it.
    pub(crate) fn known(&mut self, extent: Extent) {
        match &mut self.held {
            Some(held) if held.content == extent.content => held.range.end = extent.range.end,
            _ => {
                self.flush();
                self.held = Some(extent);
            }
        }
    }

    /// Nothing lengthens the last piece any more; whether there was one.
    pub(crate) fn flush(&mut self) -> bool {
        let held = self.held.take();
        let found = held.is_some();
        self.out.extend(held.map(|extent| Chunk {
            extent,
            bytes: None,
        }));
        found
    }

    /// Bytes: zeros among them are told as such.
    pub(crate) fn bytes(&mut self, offset: u64, buffer: Buffer) {
        let runs = split_zeros(offset, &buffer);
        let buffer = Arc::new(buffer);
        for run in runs {
            if run.content != Content::Data {
                self.known(run);
                continue;
            }
            self.flush();
            self.data(offset, &buffer, &run.range);
        }
    }

    fn data(&mut self, offset: u64, buffer: &Arc<Buffer>, range: &Range) {
        let index = |place: u64| usize::try_from(place - offset).unwrap_or(usize::MAX);
        let mut at = range.start;
        while at < range.end {
            let end = next_cut(at, self.cut, range.end);
            self.out.push_back(Chunk {
                extent: Extent {
                    range: at..end,
                    content: Content::Data,
                },
                bytes: Some(Slice {
                    buffer: Arc::clone(buffer),
                    range: index(at)..index(end),
                }),
            });
            at = end;
        }
    }
}
