//! What a session keeps in QEMU about itself, for whoever finds it after its process has
//! ended: to take it away ([`crate::reclaim`]), or to take it over ([`crate::attach`]).
//! Pure: the texts of the notes ([`crate::qemu::note`]).
//!
//! ```text
//! qf-SESSION-owner   Deed     before anything else is made; anew once the session is open
//! qf-SESSION-N-at    Progress  of disk N: anew before anything of its view is given back
//! qf-SESSION-N-tp    a path    of a file that a push of disk N has not named yet
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checkpoint::FullReason;
use crate::error::{Error, Kind, Result};
use crate::owner::Owner;

/// The form of these texts. Another one is a session of another version: whose it is, and
/// what it holds, is not known.
const FORM: u32 = 1;

/// Whose a session is, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deed {
    form: u32,
    /// The process that it belongs to.
    pub owner: Owner,
    /// Its private directory, on the owner's machine.
    pub dir: PathBuf,
    /// The socket of QEMU's NBD server, which another session may have started; `None` as long
    /// as it does not use it.
    pub server: Option<PathBuf>,
    /// The session; `None` as long as it is not open.
    pub session: Option<Saved>,
}

impl Deed {
    /// This process's, with nothing open.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self {
            form: FORM,
            owner: Owner::here(),
            dir,
            server: None,
            session: None,
        }
    }
}

/// An open session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The chain of its checkpoints.
    pub chain: String,
    /// Its instant: milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// How long it outlives its process, in milliseconds.
    pub keep_ms: u64,
    /// What the host said of scratch.
    pub scratch: SavedScratch,
    /// Its disks; their places are the numbers in the names of their objects.
    pub disks: Vec<SavedDisk>,
}

/// What the host said of scratch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedScratch {
    /// The directory.
    pub dir: PathBuf,
    /// Most bytes for each disk.
    pub disk_max_bytes: Option<u64>,
    /// Most bytes for all disks together.
    pub max_bytes: Option<u64>,
    /// The guest waits for room, rather than go on without the point in time.
    pub waits: bool,
}

/// A disk of an open session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// The disk's id.
    pub disk: String,
    /// Its node.
    pub node: String,
    /// The base that was asked for.
    pub wanted: Option<String>,
    /// The base: its name and granularity; `None`: full.
    pub base: Option<(String, u64)>,
    /// Why it is full although a base was asked for.
    pub reason: Option<FullReason>,
    /// The bitmap of the checkpoint that commit makes.
    pub checkpoint: Option<String>,
    /// Bytes that changed since the base.
    pub changed_bytes: u64,
}

/// How far the consumer of a disk is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// When this was written: milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// The view before this offset was given back.
    pub released: u64,
    /// Where its stream can go on, in the words of whoever streams; `None`: at its start.
    pub mark: Option<String>,
    /// A stream reached the end of the disk, or a push is done.
    pub complete: bool,
    /// The host reads it by itself.
    pub exported: bool,
    /// Parts of the view are given back that `released` does not tell.
    pub spent: bool,
    /// What did not change since the base was given back.
    pub partial: bool,
}

/// The text of a note.
///
/// # Errors
/// [`Kind::Internal`]: a path that is no UTF-8.
pub fn to_text(note: &impl Serialize) -> Result<String> {
    serde_json::to_string(note)
        .map_err(|error| Error::new(Kind::Internal, "writing a note").because(error))
}

/// The note of a text; `None`: it is none, or of another form.
#[must_use]
pub fn deed(text: &str) -> Option<Deed> {
    let deed: Deed = serde_json::from_str(text).ok()?;
    (deed.form == FORM).then_some(deed)
}

/// The progress that a text tells; `None`: none.
#[must_use]
pub fn progress(text: &str) -> Option<Progress> {
    serde_json::from_str(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deed_is_read_as_it_was_written_and_one_of_another_form_is_not() {
        let mut there = Deed::new("/run/qf-x".into());
        there.server = Some("/run/qf-y-nbd/nbd.sock".into());
        there.session = Some(Saved {
            chain: "default".into(),
            time_ms: 5,
            keep_ms: 6,
            scratch: SavedScratch {
                dir: "/s".into(),
                disk_max_bytes: None,
                max_bytes: Some(8),
                waits: true,
            },
            disks: vec![SavedDisk {
                disk: "d".into(),
                node: "n".into(),
                wanted: Some("a".into()),
                base: None,
                reason: Some(FullReason::SizeChanged),
                checkpoint: None,
                changed_bytes: 7,
            }],
        });
        let text = to_text(&there).unwrap();
        assert_eq!(deed(&text), Some(there));
        assert_eq!(deed(&text.replace("\"form\":1", "\"form\":2")), None);
        assert_eq!(deed("{}"), None);
        assert_eq!(progress("[]"), None);
    }
}
