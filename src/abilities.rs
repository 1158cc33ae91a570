//! What the QEMU of a point in time can do with it.

use crate::qemu::Schema;
use crate::qemu::query::Version;
use crate::room::{OnFull, Wish};

/// What it can do.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Which one it is.
    pub version: Version,
    /// A backup job can give back what it has copied.
    pub discards_source: bool,
    /// It gives up the point in time by itself when old data finds no room, so that no guest
    /// stops; not where the guest is to wait.
    pub breaks: bool,
}

impl Abilities {
    /// Of a QEMU with this version and schema, whose host said this of scratch.
    #[must_use]
    pub fn new(version: Version, schema: &Schema, scratch: &Wish) -> Self {
        let can = |argument| schema.has_argument("blockdev-backup", argument);
        Self {
            version,
            discards_source: can("discard-source"),
            breaks: can("on-cbw-error") && scratch.on_full == OnFull::GiveUp,
        }
    }
}
