//! A session's stake in QEMU: whose it is, told before anything else of it is there, and a
//! private directory of its own for all that has a name on disk.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::nbd::Address;
use crate::qemu::{Qmp, note, step};
use crate::saved::{self, Deed, Saved};
use crate::server::SERVER_DIR;
use crate::teardown::{Teardown, Undo};

/// The sessions that this process holds. One that it has lost, because its monitor's
/// connection ended, is as dead as another process's.
static HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Whether this process holds session `id`.
pub(crate) fn is_held(id: &str) -> bool {
    HELD.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .contains(id)
}

/// This process holds a session as long as one of these is there.
#[derive(Debug)]
struct Hold(String);

impl Hold {
    /// `None`: this process holds it already, and goes on to.
    fn take(id: &str) -> Option<Arc<Self>> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = held.insert(id.to_owned());
        is_new.then(|| Arc::new(Self(id.to_owned())))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&self.0);
    }
}

/// A session's stake. It goes with the teardown that it was made with, as the last thing.
#[derive(Clone, Debug)]
pub(crate) struct Stake {
    /// The session's id.
    pub(crate) id: String,
    deed: Deed,
    _hold: Arc<Hold>,
}

impl Stake {
    /// Makes one for the new session `id`, with its directory below `runtime_dir`.
    ///
    /// # Errors
    /// QEMU's; [`Kind::ScratchUnavailable`] for a directory that cannot be made.
    pub(crate) async fn make(
        qmp: &Qmp,
        id: String,
        runtime_dir: &Path,
        teardown: &mut Teardown,
    ) -> Result<Self> {
        let hold = hold(&id)?;
        let dir = runtime_dir.join(format!("{}{id}", step::PREFIX));
        // Whoever finds it works in another directory.
        let dir = std::path::absolute(&dir).map_err(|error| unusable(&dir, error))?;
        let deed = Deed::new(dir.clone());
        let note = step::owner_note(&id);
        teardown.push(Undo::Object { id: note.clone() });
        note::add(qmp, &note, &saved::to_text(&deed)?).await?;
        make_private(&dir)?;
        // Not before: what is there already is somebody else's.
        teardown.push(Undo::Directory(dir));
        Ok(Self {
            id,
            deed,
            _hold: hold,
        })
    }

    /// Its directory, which only this process's user may enter.
    pub(crate) fn dir(&self) -> &Path {
        &self.deed.dir
    }

    /// The directory of QEMU's NBD server, if this session is the one to start it. It may
    /// outlive the session: the server is shared.
    pub(crate) fn server_dir(&self) -> PathBuf {
        server_dir(&self.deed.dir)
    }

    /// The session uses QEMU's NBD server at `address`, whoever has started it: the last one
    /// that does has to stop it, also where it is reclaimed.
    ///
    /// # Errors
    /// QEMU's.
    pub(crate) async fn uses(&mut self, qmp: &Qmp, address: &Address) -> Result<()> {
        self.deed.server = match address {
            Address::Unix(path) => Some(path.clone()),
            Address::Tcp(_) => None,
        };
        self.tell(qmp).await
    }

    /// Whether the session shall outlive its host.
    pub(crate) fn is_kept(&self) -> bool {
        let session = self.deed.session.as_ref();
        session.is_some_and(|session| session.keep_ms > 0)
    }

    /// The session is open: from now on it can be taken over.
    ///
    /// # Errors
    /// QEMU's.
    pub(crate) async fn open(&mut self, qmp: &Qmp, session: Saved) -> Result<()> {
        self.deed.session = Some(session);
        self.tell(qmp).await
    }

    /// Takes over the stake of a dead session: it is this process's from now on.
    ///
    /// # Errors
    /// QEMU's; [`Kind::SessionAlive`] where this process holds it.
    pub(crate) async fn take_over(qmp: &Qmp, id: String, deed: Deed) -> Result<Self> {
        let mut mine = Deed::new(deed.dir);
        mine.server = deed.server;
        mine.session = deed.session;
        let deed = mine;
        let _hold = hold(&id)?;
        let stake = Self { id, deed, _hold };
        stake.tell(qmp).await?;
        Ok(stake)
    }

    async fn tell(&self, qmp: &Qmp) -> Result<()> {
        let text = saved::to_text(&self.deed)?;
        note::change(qmp, &step::owner_note(&self.id), &text).await
    }
}

fn hold(id: &str) -> Result<Arc<Hold>> {
    let is_held = || Error::new(Kind::SessionAlive, format!("holding the backup {id}"));
    Hold::take(id).ok_or_else(is_held)
}

/// Where the NBD server of the session whose directory this is lies, if it started one.
pub(crate) fn server_dir(session_dir: &Path) -> PathBuf {
    let mut name = session_dir.as_os_str().to_owned();
    name.push(SERVER_DIR);
    PathBuf::from(name)
}

/// Makes a new directory for us alone. Whatever is there already is an error, and stays.
pub(crate) fn make_private(dir: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
    made.map_err(|error| unusable(dir, error))
}

fn unusable(dir: &Path, error: std::io::Error) -> Error {
    let doing = format!("making a private directory {}", dir.display());
    Error::new(Kind::ScratchUnavailable, doing).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_session_is_held_once_and_as_long_as_its_holder_is_there() {
        let first = hold("once").unwrap();
        assert_eq!(hold("once").unwrap_err().kind(), Kind::SessionAlive);
        assert!(is_held("once"));
        drop(first);
        assert!(!is_held("once"));
        assert!(hold("once").is_ok());
    }

    #[test]
    fn a_private_directory_is_new_and_ours_alone() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        make_private(&place("new")).unwrap();
        let mode = std::fs::metadata(place("new"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o700);
        std::fs::create_dir(place("theirs")).unwrap();
        std::fs::write(place("file"), "").unwrap();
        symlink(place("theirs"), place("link")).unwrap();
        symlink(place("nothing"), place("dangling")).unwrap();
        for planted in ["new", "theirs", "file", "link", "dangling"] {
            let error = make_private(&place(planted)).unwrap_err();
            assert_eq!(error.kind(), Kind::ScratchUnavailable, "{planted}");
            assert!(place(planted).symlink_metadata().is_ok(), "{planted}");
        }
        assert!(!place("nothing").exists());
    }
}
