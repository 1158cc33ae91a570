//! A session's stake in QEMU: whose it is, told before anything else of it is there, and a
//! private directory of its own for all that has a name on disk.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::qemu::{Qmp, note, step};
use crate::saved::{self, Claim, Saved};
use crate::teardown::{Teardown, Undo};

/// A session's stake. It goes with the teardown that it was made with, as the last thing.
#[derive(Clone, Debug)]
pub(crate) struct Stake {
    /// The session's id.
    pub(crate) id: String,
    claim: Claim,
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
        let dir = runtime_dir.join(format!("{}{id}", step::PREFIX));
        let claim = Claim::new(dir.clone());
        let note = step::owner_note(&id);
        teardown.push(Undo::Object { id: note.clone() });
        note::add(qmp, &note, &saved::to_text(&claim)?).await?;
        teardown.push(Undo::Directory(dir.clone()));
        make_private(&dir)?;
        Ok(Self { id, claim })
    }

    /// Its directory, which only this process's user may enter.
    pub(crate) fn dir(&self) -> &Path {
        &self.claim.dir
    }

    /// The directory of QEMU's NBD server, if this session is the one to start it. It may
    /// outlive the session: the server is shared.
    pub(crate) fn server_dir(&self) -> PathBuf {
        server_dir(&self.claim.dir)
    }

    /// Whether the session shall outlive its host.
    pub(crate) fn is_kept(&self) -> bool {
        let session = self.claim.session.as_ref();
        session.is_some_and(|session| session.keep_ms > 0)
    }

    /// The session is open: from now on it can be taken over.
    ///
    /// # Errors
    /// QEMU's.
    pub(crate) async fn open(&mut self, qmp: &Qmp, session: Saved) -> Result<()> {
        self.claim.session = Some(session);
        self.tell(qmp).await
    }

    /// Takes over the stake of a dead session: it is this process's from now on.
    ///
    /// # Errors
    /// QEMU's.
    pub(crate) async fn take_over(qmp: &Qmp, id: String, claim: Claim) -> Result<Self> {
        let mut mine = Claim::new(claim.dir);
        mine.session = claim.session;
        let claim = mine;
        let stake = Self { id, claim };
        stake.tell(qmp).await?;
        Ok(stake)
    }

    async fn tell(&self, qmp: &Qmp) -> Result<()> {
        let text = saved::to_text(&self.claim)?;
        note::change(qmp, &step::owner_note(&self.id), &text).await
    }
}

/// Where the NBD server of the session whose directory this is lies, if it started one.
pub(crate) fn server_dir(session_dir: &Path) -> PathBuf {
    let mut name = session_dir.as_os_str().to_owned();
    name.push("-nbd");
    PathBuf::from(name)
}

/// Makes a new directory for us alone.
pub(crate) fn make_private(dir: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
    made.map_err(|error| {
        let doing = format!("making a private directory {}", dir.display());
        Error::new(Kind::ScratchUnavailable, doing).because(error)
    })
}
