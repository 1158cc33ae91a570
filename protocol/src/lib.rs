#![doc = include_str!("../README.md")]

pub mod backup;
pub mod checkpoint;
pub mod consistency;
pub mod envelope;
pub mod error;
pub mod event;
pub mod export;
pub mod hello;
pub mod line;
pub mod orphan;
pub mod push;
pub mod record;
pub mod restore;
pub mod schema;
pub mod scratch;
pub mod stream;
pub mod vm;

pub use envelope::{Id, Request};
pub use error::{Action, Code, WireError};
pub use record::Record;

/// The version of the protocol that this crate describes.
pub const VERSION: u32 = 1;

/// Longest line that a peer may send, without its `\n`; announced in the hello.
pub const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;

/// Longest payload behind a line, and so the longest `data` record.
pub const MAX_PAYLOAD_BYTES: u64 = 1024 * 1024;

/// Most requests that may be unanswered at a time.
pub const MAX_REQUESTS: usize = 32;

/// Longest name of a checkpoint, or of a chain.
pub const MAX_NAME_BYTES: usize = 64;

/// Most checkpoints of ours on one disk, those of all chains together.
pub const MAX_CHECKPOINTS: usize = 128;

/// Most ranges that `checkpoint.redefine` takes for one disk.
pub const MAX_EXTENTS: usize = 262_144;
