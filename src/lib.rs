//! The engine of `qemu-fleece`: checkpoints, points in time and restores of
//! QEMU disks. It speaks QMP and NBD; it knows no JSON lines and no host.
//!
//! `ARCHITECTURE.md` shows the layers and lists the invariants by number.

pub mod abilities;
pub mod attach;
pub mod begin;
mod broken;
pub mod buffer;
mod callers;
pub mod chain;
pub mod change;
pub mod checkpoint;
pub mod chunk;
mod claim;
pub mod consumption;
mod entry;
pub mod error;
pub mod estimate;
pub mod export;
pub mod extent;
mod file_call;
mod file_lock;
mod file_node;
mod flow;
pub mod guard;
pub mod guardian;
mod hidden;
pub mod image;
pub mod inspect;
pub mod join;
mod lasting;
pub mod manage;
pub mod map;
pub mod nbd;
mod offer;
mod opening;
pub mod owner;
pub mod paint;
pub mod plan;
pub mod pull;
pub mod push;
mod qcow2;
pub mod qemu;
pub mod quiesce;
pub mod receive;
pub mod reclaim;
pub mod redefine;
pub mod relay;
pub mod repair;
pub mod restore;
pub mod room;
pub mod saved;
pub mod scratch;
pub mod server;
pub mod session;
mod stake;
mod standstill;
pub mod storage_daemon;
pub mod target;
pub mod teardown;
pub mod view;
pub mod walk;

pub use error::{Error, Kind, Result};
