//! Tests without QEMU: scripted peers that lie, and the layers.

mod nbd_foreign;
mod nbd_lies;
mod nbd_lies_early;
mod nbd_live;
mod nbd_server;
mod qmp;
