//! QEMU over QMP: one concern a file.
//!
//! ```text
//! discover, job, note, schema, step, query --> qmp (handles) --> actor (one task owns
//! the socket) --> {line, outgoing} --> QEMU
//! turn --> {qmp, lull}
//! guest_agent --> line
//! ```

mod actor;
pub mod address;
pub mod discover;
mod greeting;
pub mod guest_agent;
mod iothread;
pub mod job;
pub mod layer;
pub mod line;
mod lull;
pub mod note;
mod outgoing;
pub mod qmp;
pub mod query;
pub mod schema;
pub mod step;
pub mod tls;
mod turn;

pub use address::Address;
pub use guest_agent::GuestAgent;
pub use lull::{Mover, Wish};
pub use qmp::{Event, Qmp, Refusal};
pub use schema::Schema;
pub use turn::Turn;
