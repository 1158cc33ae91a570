//! Tests without QEMU: scripted peers that lie, and the layers.

mod qmp;
