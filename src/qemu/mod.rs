//! QEMU over QMP: one concern a file.
