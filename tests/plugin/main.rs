//! Tests of the real binary, spoken to over pipes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod bad_lines;
mod cancel;
mod codes;
mod ends;
mod guardian;
mod monitors;
mod restore;
mod support;
