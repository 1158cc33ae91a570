//! Checkpoints: names, and what a dirty bitmap's name says of one. Pure.
//!
//! QEMU stores nothing with a bitmap but its name, so the name carries what must
//! outlive this process: `qemu-fleece/1/NAME/SIZE/TIME`, where SIZE is the
//! disk's bytes and TIME the milliseconds since 1970 at its making, both in
//! decimal. It travels with the image, and needs no store of ours.

use std::fmt;

use crate::error::{Error, Kind, Result};

/// What all bitmaps of lasting checkpoints start with. No other is ever changed.
pub const PREFIX: &str = "qemu-fleece/";

/// The version of the form behind [`PREFIX`].
const FORM: &str = "1";

/// Longest name of a checkpoint, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// Bytes that one bit of a checkpoint's bitmap stands for: QEMU's own default,
/// and the grain in which copy-before-write works.
pub const GRANULARITY: u64 = 64 * 1024;

/// The name of a checkpoint: `[A-Za-z0-9][A-Za-z0-9._-]*`, at most
/// [`MAX_NAME_BYTES`] long.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// Takes a name from outside.
    ///
    /// # Errors
    /// [`Kind::InvalidRequest`] when it is none.
    pub fn parse(text: &str) -> Result<Self> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let starts_well = text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !starts_well || text.len() > MAX_NAME_BYTES || !text.bytes().all(legal) {
            return Err(Error::new(Kind::InvalidRequest, "reading a checkpoint's name").because(format!(
                "a name is 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 . _ - and starts with a letter or digit"
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A lasting checkpoint on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its name.
    pub name: Name,
    /// The disk's bytes when it was made.
    pub size: u64,
    /// When it was made: milliseconds since 1970 UTC.
    pub time_ms: u64,
}

impl Checkpoint {
    /// The name of its bitmap.
    #[must_use]
    pub fn bitmap(&self) -> String {
        format!(
            "{PREFIX}{FORM}/{}/{}/{}",
            self.name, self.size, self.time_ms
        )
    }

    /// What a bitmap's name says; `None` for one that is not ours, or of a form
    /// that this version does not know.
    #[must_use]
    pub fn from_bitmap(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.split('/');
        let (form, name, size, time_ms) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if form != FORM || parts.next().is_some() {
            return None;
        }
        Some(Self {
            name: Name::parse(name).ok()?,
            size: size.parse().ok()?,
            time_ms: time_ms.parse().ok()?,
        })
    }
}

/// Why a disk is full although a base was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FullReason {
    /// The disk has no checkpoint of that name.
    BaseMissing,
    /// Its bitmap was not stored when QEMU ended: changes may be missing.
    BaseInconsistent,
    /// It is disabled: changes were not recorded.
    BaseNotRecording,
    /// Another job or export uses its bitmap.
    BaseBusy,
    /// The disk had another size when it was made. QEMU marks grown space clean.
    SizeChanged,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bitmaps_name_tells_its_checkpoint(name in "[A-Za-z0-9][A-Za-z0-9._-]{0,127}", size: u64, time_ms: u64) {
            let checkpoint = Checkpoint { name: Name::parse(&name).unwrap(), size, time_ms };
            let bitmap = checkpoint.bitmap();
            prop_assert!(bitmap.len() < 1023, "QEMU's limit for a persistent bitmap's name");
            prop_assert_eq!(Checkpoint::from_bitmap(&bitmap), Some(checkpoint));
        }

        #[test]
        fn no_foreign_name_is_taken_for_ours(name in "\\PC{0,60}") {
            if let Some(checkpoint) = Checkpoint::from_bitmap(&name) {
                prop_assert!(name.starts_with(PREFIX));
                prop_assert_eq!(checkpoint.name.as_str(), name.split('/').nth(2).unwrap());
            }
        }
    }

    #[test]
    fn odd_names_are_refused() {
        for name in ["", ".x", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(129)] {
            assert_eq!(
                Name::parse(name).unwrap_err().kind(),
                Kind::InvalidRequest,
                "{name:?}"
            );
        }
        for name in [
            "qemu-fleece/2/a/1/1",
            "qemu-fleece/1/a/1",
            "qemu-fleece/1/a/1/1/1",
            "qemu-fleece/1/a/-1/1",
            "other",
        ] {
            assert_eq!(Checkpoint::from_bitmap(name), None, "{name}");
        }
    }
}
