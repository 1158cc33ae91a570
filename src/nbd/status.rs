//! Block status: flags of a context, and extents of a reply, checked. Pure.

use crate::extent::Content;
use crate::nbd::wire::{u32_at, u64_at};

/// "base:allocation": nothing is allocated for the range.
const STATE_HOLE: u64 = 1;
/// "base:allocation": the range reads as zeros.
const STATE_ZERO: u64 = 2;
/// "qemu:dirty-bitmap": the range has changed.
const STATE_DIRTY: u64 = 1;

/// What a range of `base:allocation` holds. A hole that does not read as zeros
/// is data: its bytes must be read.
#[must_use]
pub fn content(flags: u64) -> Content {
    if flags & STATE_ZERO == 0 {
        return Content::Data;
    }
    Content::Zero {
        hole: flags & STATE_HOLE != 0,
    }
}

/// Whether a range of `qemu:dirty-bitmap:NAME` has changed.
#[must_use]
pub fn is_dirty(flags: u64) -> bool {
    flags & STATE_DIRTY != 0
}

/// Reads the extents of a chunk for a request of `length` bytes: pairs of length
/// and flags, contiguous from the request's offset. `wide`: 64-bit ones.
/// They cover a prefix of the request; the last may reach past it and is cut.
///
/// # Errors
/// What is wrong with them.
pub fn extents(bytes: &[u8], wide: bool, length: u64) -> Result<Vec<(u64, u64)>, String> {
    let each = if wide { 16 } else { 8 };
    if bytes.is_empty() || !bytes.len().is_multiple_of(each) {
        return Err(format!("{} bytes are no list of extents", bytes.len()));
    }
    let mut rest = length;
    let mut extents: Vec<(u64, u64)> = Vec::new();
    for pair in bytes.chunks_exact(each) {
        let (bytes, flags) = if wide {
            (u64_at(pair, 0), u64_at(pair, 8))
        } else {
            (u64::from(u32_at(pair, 0)), u64::from(u32_at(pair, 4)))
        };
        if bytes == 0 {
            return Err("an extent of length 0".into());
        }
        if rest == 0 {
            return Err("an extent behind the end of the request".into());
        }
        let bytes = bytes.min(rest);
        rest -= bytes;
        match extents.last_mut() {
            // Servers may cut what is alike.
            Some((known, same)) if *same == flags => *known += bytes,
            _ => extents.push((bytes, flags)),
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extents_match_a_naive_map(
            pieces in proptest::collection::vec((1u32..50, 0u32..3), 1..20), cut in 0u64..60, wide: bool,
        ) {
            let total: u64 = pieces.iter().map(|(bytes, _)| u64::from(*bytes)).sum();
            let last = u64::from(pieces.last().unwrap().0);
            // The request may end anywhere inside the last extent.
            let length = total - (cut % last);
            let bytes: Vec<u8> = pieces.iter().flat_map(|(bytes, flags)| if wide {
                [u64::from(*bytes).to_be_bytes(), u64::from(*flags).to_be_bytes()].concat()
            } else {
                [bytes.to_be_bytes(), flags.to_be_bytes()].concat()
            }).collect();
            let naive: Vec<u64> = pieces.iter()
                .flat_map(|(bytes, flags)| std::iter::repeat_n(u64::from(*flags), *bytes as usize))
                .take(usize::try_from(length).unwrap()).collect();
            let found = extents(&bytes, wide, length).unwrap();
            let map: Vec<u64> = found.iter()
                .flat_map(|(bytes, flags)| std::iter::repeat_n(*flags, usize::try_from(*bytes).unwrap())).collect();
            prop_assert_eq!(map, naive);
            for pair in found.windows(2) { prop_assert_ne!(pair[0].1, pair[1].1); }
        }

        #[test]
        fn arbitrary_bytes_never_reach_past_the_request(bytes: Vec<u8>, wide: bool, length: u64) {
            if let Ok(found) = extents(&bytes, wide, length) {
                let sum: u128 = found.iter().map(|(bytes, _)| u128::from(*bytes)).sum();
                prop_assert!(sum <= u128::from(length));
                prop_assert!(found.iter().all(|(bytes, _)| *bytes > 0));
            }
        }
    }

    #[test]
    fn flags_mean_what_the_specification_says() {
        assert_eq!(content(0), Content::Data);
        assert_eq!(content(1), Content::Data);
        assert_eq!(content(2), Content::Zero { hole: false });
        assert_eq!(content(3), Content::Zero { hole: true });
        assert!(is_dirty(1) && !is_dirty(0));
    }
}
