//! The NBD client: one protocol step a file.
