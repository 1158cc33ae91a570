//! The bodies of the fuzz targets: what is read from outside, each with what has to hold
//! for any bytes. `fuzz_targets/` hands them libFuzzer's inputs; `tests/hermetic/fuzz_corpus.rs`
//! replays the committed ones, so that they stay true without a fuzzer.

pub mod answers;
pub mod chain;
pub mod handshake;
pub mod input;
pub mod lines;
pub mod peer;
pub mod qmp;
pub mod replies;
pub mod serve;
pub mod streams;
pub mod texts;

/// A target: its name, which is also that of its corpus, and its body, which panics where
/// something does not hold.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("answers", answers::run),
    ("chain", chain::run),
    ("handshake", handshake::run),
    ("lines", lines::run),
    ("qmp", qmp::run),
    ("replies", replies::run),
    ("serve", serve::run),
    ("streams", streams::run),
    ("texts", texts::run),
];
