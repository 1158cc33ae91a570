//! Tests against the real QEMU.

mod nbd;
#[path = "../support/storage_daemon.rs"]
mod storage_daemon;
