//! The NBD client: one protocol step a file.
//!
//! ```text
//! client (submits, and writes from a queue) --> pending (who waits, and until when)
//!                                                  ^
//! incoming (reads, always) ------------------------+--> reply (one reply, checked) --> wire
//! handshake (one connection, one context) ---------------------------------------------^
//! status (block status -> flags) <-- reply
//! ```
//! Section names in the docstrings are those of the NBD protocol specification.

pub mod client;
pub mod handshake;
mod incoming;
mod pending;
mod reply;
pub mod status;
pub mod wire;

pub use client::{Address, Client, Ticket};
pub use handshake::Export;
