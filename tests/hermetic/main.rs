//! Tests without QEMU: scripted peers, and peers of other makes.

mod nbd_foreign;
mod nbd_lies;
mod nbd_lies_early;
mod nbd_live;
mod nbd_server;
