//! QEMU over QMP: one concern a file.
//!
//! ```text
//! discover, job, step, query --> qmp (one task owns the socket) --> {line, outgoing} --> QEMU
//! ```

pub mod address;
pub mod discover;
mod iothread;
pub mod job;
pub mod line;
mod outgoing;
pub mod qmp;
pub mod query;
pub mod step;

pub use address::Address;
pub use qmp::{Event, Qmp, Refusal};
