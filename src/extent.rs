//! Byte ranges and what is known of them. Pure.

/// Half-open range of bytes of a disk: `start <= end`, never empty where a
/// docstring says so.
pub type Range = std::ops::Range<u64>;

/// What a range of the view holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes that must be read.
    Data,
    /// Reads as zeros; `hole` when nothing is allocated for it.
    Zero {
        /// The source has no storage for the range.
        hole: bool,
    },
    /// Unchanged since the base.
    Same,
}

/// A range and its content. `range` is never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The bytes.
    pub range: Range,
    /// What they hold.
    pub content: Content,
}
