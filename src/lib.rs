//! The engine of `qemu-fleece`: checkpoints, points in time and restores of
//! QEMU disks. It speaks QMP and NBD; it knows no JSON lines and no host.
//!
//! `ARCHITECTURE.md` shows the layers and lists the invariants by number.

pub mod buffer;
pub mod error;
pub mod extent;
pub mod nbd;
pub mod qemu;

pub use error::{Error, Kind, Result};
