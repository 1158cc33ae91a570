//! Tests without QEMU: scripted peers that lie, and the layers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fuzz_corpus;
mod guest_agent;
mod layers;
mod nbd_foreign;
mod nbd_lies;
mod nbd_lies_early;
mod nbd_live;
mod nbd_server;
mod promises;
mod qmp;
