//! Checkpoints: names, identity, and what a dirty bitmap's name says of one. Pure.
//!
//! QEMU stores nothing with a bitmap but its name, so the name carries what must
//! outlive this process:
//!
//! ```text
//! qemu-fleece/1/CHAIN/NAME/SIZE/TIME/ID/OWNER/IMAGE
//! ```
//! SIZE is the disk's bytes and TIME the milliseconds since 1970 at its making,
//! both in decimal; ID the identity of its point in time, `-` where there is none;
//! OWNER and IMAGE are digests of the VM and disk, and of the image file, that it was
//! made for. It travels with the image, and needs no store of ours.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// What all bitmaps of lasting checkpoints start with. No other is ever changed.
pub const PREFIX: &str = "qemu-fleece/";

/// The version of the form behind [`PREFIX`].
const FORM: &str = "1";

/// Stands for an [`Id`] where a checkpoint has none.
const NO_ID: &str = "-";

/// Longest name of a checkpoint or a chain, in bytes. The bitmap's name has both, and
/// QEMU migrates none that is longer than [`MAX_BITMAP_BYTES`].
pub const MAX_NAME_BYTES: usize = 64;

/// Longest name of a bitmap, in bytes: with a longer one a migration of the VM fails.
pub const MAX_BITMAP_BYTES: usize = 255;

/// Longest [`Id`], in bytes.
pub const MAX_ID_BYTES: usize = 32;

/// Most checkpoints of ours on one disk. Each slows every guest write by a little,
/// and takes one bit of QEMU's memory for each granule.
pub const MAX_CHECKPOINTS: usize = 128;

/// Bytes that one bit of a checkpoint's bitmap stands for: QEMU's own default,
/// and the grain in which copy-before-write works.
pub const GRANULARITY: u64 = 64 * 1024;

/// The granularities that can be asked for: powers of two in this range. QEMU
/// takes finer ones too, at a price in memory that nobody expects.
pub const GRANULARITIES: std::ops::RangeInclusive<u64> = 4096..=64 * 1024 * 1024;

/// The name of a checkpoint, or of a chain: `[A-Za-z0-9][A-Za-z0-9._-]*`, at most
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
            return Err(Error::new(Kind::InvalidRequest, "reading a name").because(format!(
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

/// The identity of a point in time on one disk: 1 to [`MAX_ID_BYTES`] of `a-z0-9`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Id(String);

impl Id {
    /// Takes an id from outside.
    ///
    /// # Errors
    /// [`Kind::InvalidRequest`] when it is none.
    pub fn parse(text: &str) -> Result<Self> {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        if text.is_empty() || text.len() > MAX_ID_BYTES || !text.bytes().all(legal) {
            return Err(
                Error::new(Kind::InvalidRequest, "reading a checkpoint's id")
                    .because(format!("an id is 1 to {MAX_ID_BYTES} of a-z 0-9")),
            );
        }
        Ok(Self(text.to_owned()))
    }

    /// 10 letters and digits, of random bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 10]) -> Self {
        const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let letter = |byte: &u8| char::from(LETTERS[usize::from(byte % 32)]);
        Self(bytes.iter().map(letter).collect())
    }

    /// The id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The first 12 hex digits of SHA-256: enough against accident, which is what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark(String);

impl Mark {
    /// Of these parts, in this order.
    #[must_use]
    pub fn of(parts: &[&str]) -> Self {
        let mut sum = Sha256::new();
        for part in parts {
            sum.update(part.as_bytes());
            sum.update([0]);
        }
        let hex =
            sum.finalize()
                .iter()
                .take(6)
                .fold(String::with_capacity(12), |mut text, byte| {
                    use std::fmt::Write as _;
                    let _never_fails = write!(text, "{byte:02x}");
                    text
                });
        Self(hex)
    }

    fn parse(text: &str) -> Option<Self> {
        let legal = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
        (text.len() == 12 && text.bytes().all(legal)).then(|| Self(text.to_owned()))
    }
}

/// A lasting checkpoint on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its chain.
    pub chain: Name,
    /// Its name, unique in its chain on the disk.
    pub name: Name,
    /// The disk's bytes when it was made.
    pub size: u64,
    /// When it was made: milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// The point in time since which it has all changes; `None`: there is no such
    /// point, and it is no base.
    pub id: Option<Id>,
    /// The VM and disk that it was made for.
    pub owner: Mark,
    /// The image file that it was made in.
    pub image: Mark,
}

impl Checkpoint {
    /// The name of its bitmap.
    #[must_use]
    pub fn bitmap(&self) -> String {
        format!(
            "{PREFIX}{FORM}/{}/{}/{}/{}/{}/{}/{}",
            self.chain,
            self.name,
            self.size,
            self.time_ms,
            self.id.as_ref().map_or(NO_ID, Id::as_str),
            self.owner.0,
            self.image.0,
        )
    }

    /// What a bitmap's name says; `None` for one that is not ours, or of a form
    /// that this version does not know.
    #[must_use]
    pub fn from_bitmap(bitmap: &str) -> Option<Self> {
        let parts: Vec<&str> = bitmap.strip_prefix(PREFIX)?.split('/').collect();
        let [FORM, chain, name, size, time_ms, id, owner, image] = parts[..] else {
            return None;
        };
        let checkpoint = Self {
            chain: Name::parse(chain).ok()?,
            name: Name::parse(name).ok()?,
            size: size.parse().ok()?,
            time_ms: time_ms.parse().ok()?,
            id: match id {
                NO_ID => None,
                id => Some(Id::parse(id).ok()?),
            },
            owner: Mark::parse(owner)?,
            image: Mark::parse(image)?,
        };
        // Numbers can be written in other ways; ours are not.
        (checkpoint.bitmap() == bitmap).then_some(checkpoint)
    }
}

/// Whether a checkpoint can serve as base on a disk, or why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// It can.
    Usable,
    /// Its bitmap was not stored when QEMU ended: changes may be missing.
    Inconsistent,
    /// The disk does not have it.
    Missing,
    /// It is disabled: changes are not recorded.
    NotRecording,
    /// It was disabled for a time, or merged from parts that do not join.
    Gap,
    /// A dirty bitmap of somebody else.
    Foreign,
    /// The disk had another size when it was made. QEMU marks grown space clean.
    SizeChanged,
    /// Its bitmap is on a backing image: changes are not recorded there.
    OnBackingImage,
    /// It was made for another VM, disk or image.
    Mismatch,
    /// Another job or export uses its bitmap.
    Busy,
}

/// Why a disk is full although a base was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum FullReason {
    /// The disk has no checkpoint of that name.
    BaseMissing,
    /// The disk had it, and QEMU lost its bitmap.
    BitmapLost,
    /// As [`Health::Inconsistent`].
    BaseInconsistent,
    /// As [`Health::NotRecording`].
    BaseNotRecording,
    /// As [`Health::Gap`].
    BaseGap,
    /// As [`Health::Mismatch`], or another point in time than the host says.
    BaseMismatch,
    /// As [`Health::Busy`].
    BaseBusy,
    /// As [`Health::OnBackingImage`].
    OnBackingImage,
    /// As [`Health::SizeChanged`].
    SizeChanged,
}

impl Health {
    /// Why a base of this health makes a disk full; `None`: it does not.
    #[must_use]
    pub fn full_reason(self) -> Option<FullReason> {
        match self {
            Self::Usable => None,
            Self::Inconsistent => Some(FullReason::BaseInconsistent),
            Self::Missing | Self::Foreign => Some(FullReason::BaseMissing),
            Self::NotRecording => Some(FullReason::BaseNotRecording),
            Self::Gap => Some(FullReason::BaseGap),
            Self::SizeChanged => Some(FullReason::SizeChanged),
            Self::OnBackingImage => Some(FullReason::OnBackingImage),
            Self::Mismatch => Some(FullReason::BaseMismatch),
            Self::Busy => Some(FullReason::BaseBusy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAME: &str = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}";

    proptest! {
        #[test]
        fn a_bitmaps_name_tells_its_checkpoint(
            chain in NAME, name in NAME, size: u64, time_ms: u64,
            id in proptest::option::of("[a-z0-9]{1,32}"), vm: String, file: String,
        ) {
            let checkpoint = Checkpoint {
                chain: Name::parse(&chain).unwrap(),
                name: Name::parse(&name).unwrap(),
                size,
                time_ms,
                id: id.map(|id| Id::parse(&id).unwrap()),
                owner: Mark::of(&[&vm, "disk0"]),
                image: Mark::of(&[&file]),
            };
            let bitmap = checkpoint.bitmap();
            prop_assert!(bitmap.len() <= MAX_BITMAP_BYTES);
            prop_assert_eq!(Checkpoint::from_bitmap(&bitmap), Some(checkpoint));
        }

        #[test]
        fn no_foreign_name_is_taken_for_ours(name in "\\PC{0,60}") {
            if let Some(checkpoint) = Checkpoint::from_bitmap(&name) {
                prop_assert_eq!(checkpoint.bitmap(), name);
            }
        }
    }

    #[test]
    fn odd_names_are_refused() {
        for name in ["", ".x", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert_eq!(
                Name::parse(name).unwrap_err().kind(),
                Kind::InvalidRequest,
                "{name:?}"
            );
        }
        for id in ["", "-", "A", "a/b", &"x".repeat(33)] {
            assert_eq!(Id::parse(id).unwrap_err().kind(), Kind::InvalidRequest);
        }
        let good = "qemu-fleece/1/c/a/1/2/-/0123456789ab/abcdefabcdef";
        assert!(Checkpoint::from_bitmap(good).is_some());
        for name in [
            "other",
            "qemu-fleece/1/a/1/1",
            &good.replacen('1', "2", 1),
            &good.replace("/a/", "//"),
            &good.replace("/-/", "/X/"),
            &good.replace("/1/2/", "/-1/2/"),
            &good.replace("abcdefabcdef", "abcdefabcde"),
            &good.replace("/1/2/", "/01/2/"),
            &format!("{good}/x"),
        ] {
            assert_eq!(Checkpoint::from_bitmap(name), None, "{name}");
        }
    }

    #[test]
    fn parts_of_an_identity_do_not_run_together() {
        assert_ne!(Mark::of(&["ab", "c"]), Mark::of(&["a", "bc"]));
    }
}
