//! The engine of `qemu-fleece`: checkpoints, points in time and restores of
//! QEMU disks. It speaks QMP and NBD; it knows no JSON lines and no host.
//!
//! `ARCHITECTURE.md` shows the layers and lists the invariants by number.

pub mod buffer;
pub mod chain;
pub mod change;
pub mod checkpoint;
pub mod error;
pub mod estimate;
pub mod extent;
pub mod inspect;
pub mod join;
pub mod manage;
pub mod nbd;
pub mod paint;
pub mod plan;
pub mod pull;
pub mod qemu;
pub mod redefine;
pub mod repair;
pub mod restore;
pub mod scratch;
pub mod server;
pub mod session;
pub mod storage_daemon;
pub mod teardown;
pub mod view;

pub use error::{Error, Kind, Result};
