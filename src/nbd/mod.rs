//! NBD, the client and a small server: one protocol step a file.
//!
//! ```text
//! client (submits, and writes from a queue) --> pending (who waits, and until when)
//!                                                  ^
//! incoming (reads, always) ------------------------+--> reply (one reply, checked) --> wire
//! handshake (one connection, one context) ---------------------------------------------^
//! status (block status -> flags) <-- reply
//! cursor (block status of a range, piece by piece) --> client
//! serve (the server's side, for a QEMU that pushes to us) --> options --> wire
//!
//! doorman (the host's own clients come in) --> options, handshake
//! courier (their requests, and the replies) --> ledger (what is under way) --> wire
//! ```
//! Section names in the docstrings are those of the NBD protocol specification.

#[cfg(test)]
mod by_hand;
pub mod client;
pub(crate) mod courier;
mod cursor;
pub(crate) mod doorman;
pub mod handshake;
mod incoming;
mod ledger;
mod options;
mod pending;
mod reply;
pub mod serve;
pub mod status;
pub mod wire;

pub use client::{Address, Client, Ticket};
pub(crate) use cursor::Cursor;
pub use handshake::Export;
pub(crate) use handshake::{negotiate_simple, start_tls};
