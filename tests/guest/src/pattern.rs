//! Data that tells where and in which write it was written, so that a stale or a
//! misplaced block never looks right.

/// The 64-bit word, little-endian on disk, at byte offset `8 * index`.
pub fn word(seed: u64, index: u64) -> u64 {
    mix(mix(seed) ^ index)
}

/// Fills `buffer`, which will stand at `offset` (a multiple of 8, as is its length).
pub fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    let key = mix(seed);
    for (index, bytes) in (offset / 8..).zip(buffer.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&mix(key ^ index).to_le_bytes());
    }
}

/// The step of the generator SplitMix64.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
