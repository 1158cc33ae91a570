//! Byte ranges of a disk and what is known of them. Pure.

/// Half-open range of bytes of a disk.
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

/// The length of a range, 0 where it is empty.
#[must_use]
pub fn length(range: &Range) -> u64 {
    range.end.saturating_sub(range.start)
}

/// The first multiple of `step` behind `offset`, but at most `end`: cuts a range
/// so that no piece crosses a multiple of `step`.
#[must_use]
pub fn next_cut(offset: u64, step: u64, end: u64) -> u64 {
    let next = (offset / step).saturating_add(1).saturating_mul(step);
    next.min(end)
}

/// The part of `range` that lies on whole multiples of `step`, where the end of
/// the disk counts as one; empty (as `start..start`) where there is none.
#[must_use]
pub fn inner_aligned(range: &Range, step: u64, disk_size: u64) -> Range {
    let start = range.start.div_ceil(step).saturating_mul(step);
    let end = if range.end >= disk_size {
        disk_size
    } else {
        range.end / step * step
    };
    start..end.max(start)
}

/// Grain in which read data is searched for zeros.
pub const ZERO_GRAIN: u64 = 64 * 1024;

/// Cuts bytes that were read from `offset` on into runs that are all zeros and
/// runs that are not, by the grains of [`ZERO_GRAIN`] that they lie on. The runs
/// are contiguous, cover the bytes, and alternate.
#[must_use]
pub fn split_zeros(offset: u64, bytes: &[u8]) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    let mut rest = bytes;
    let mut at = offset;
    while !rest.is_empty() {
        let cut = next_cut(at, ZERO_GRAIN, at.saturating_add(rest.len() as u64));
        let take = usize::try_from(cut - at).unwrap_or(rest.len());
        let (grain, tail) = rest.split_at(take);
        let content = if is_zero(grain) {
            Content::Zero { hole: false }
        } else {
            Content::Data
        };
        match runs.last_mut() {
            Some(run) if run.content == content => run.range.end = cut,
            _ => runs.push(Extent {
                range: at..cut,
                content,
            }),
        }
        rest = tail;
        at = cut;
    }
    runs
}

/// Whether all bytes are 0: a comparison with itself, shifted by one, which the
/// C library's memcmp does at memory speed.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn zero_runs_match_a_naive_look_at_each_grain(
            first in 0u64..3 * ZERO_GRAIN,
            grains in proptest::collection::vec((any::<bool>(), 1usize..3), 0..5),
        ) {
            let bytes: Vec<u8> = grains.iter()
                .flat_map(|(zero, count)| vec![u8::from(!*zero); *count * 30_000]).collect();
            let runs = split_zeros(first, &bytes);
            let mut at = first;
            for (index, run) in runs.iter().enumerate() {
                prop_assert_eq!(run.range.start, at);
                prop_assert!(length(&run.range) > 0);
                if index > 0 { prop_assert_ne!(runs[index - 1].content, run.content); }
                at = run.range.end;
            }
            prop_assert_eq!(at, first + bytes.len() as u64);
            for run in &runs {
                let slice = |range: &Range| &bytes[usize::try_from(range.start - first).unwrap()..usize::try_from(range.end - first).unwrap()];
                let mut grain = run.range.start;
                while grain < run.range.end {
                    let cut = next_cut(grain, ZERO_GRAIN, run.range.end);
                    let zero = slice(&(grain..cut)).iter().all(|byte| *byte == 0);
                    prop_assert_eq!(zero, run.content == Content::Zero { hole: false });
                    grain = cut;
                }
            }
        }

        #[test]
        fn inner_alignment_never_reaches_outside(start in 0u64..1000, len in 0u64..1000, tail in 0u64..100) {
            let range = start..start + len;
            let disk = range.end + tail;
            let inner = inner_aligned(&range, 64, disk);
            if length(&inner) > 0 {
                prop_assert!(inner.start >= range.start && inner.end <= range.end);
                prop_assert_eq!(inner.start % 64, 0);
                prop_assert!(inner.end.is_multiple_of(64) || inner.end == disk);
            }
        }
    }
}
