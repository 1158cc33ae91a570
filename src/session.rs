//! The point in time, from begin to the host's word.
//!
//! ```text
//!              begin                       commit(disks)
//!   (nothing) -------> Session ---------------------------> lasting checkpoints
//!       ^                 |  \  pull(disk): any number,
//!       |  a step fails,  |   \ each disk once at a time
//!       +--- cancelled ---+
//!                         |    abort, or the host is gone
//!                         +-------------------------------> as before begin
//! ```
//! `begin` ([`crate::begin`]) on a VM's disks: scratch files; NBD server; one transaction
//! (filters, pending checkpoints, frozen copies of the bases); views; exports; and what
//! did not change since the base is given back at once.
//!
//! `commit` and `abort` take the session, so nothing can be read after them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::change;
use crate::checkpoint::{Checkpoint, GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::guard::{self, Guard, Notice};
use crate::lasting;
use crate::plan::DiskPlan;
use crate::qemu::step::{self, Lasting, Names};
use crate::qemu::{Event, Qmp};
use crate::room::{self, Room};
use crate::saved::SavedDisk;
use crate::stake::Stake;
use crate::standstill;
use crate::teardown::{Teardown, Undo};
use crate::view::View;

/// How long a push gets to end once it is cancelled.
const WORK_DEADLINE: Duration = Duration::from_secs(30);

/// A disk of an open session.
#[derive(Debug)]
pub struct SessionDisk {
    /// What was planned, and is.
    pub plan: DiskPlan,
    /// Most bytes that records other than `same` can cover.
    pub changed_bytes: u64,
    names: Names,
    view: Arc<View>,
}

/// An open point in time.
#[derive(Debug)]
pub struct Session {
    /// Its id: 10 lower-case letters and digits.
    pub id: String,
    stake: Stake,
    /// The chain that its checkpoints belong to.
    chain: Name,
    /// The instant: milliseconds since 1970 UTC, by this machine's clock.
    pub time_ms: u64,
    qmp: Qmp,
    disks: Vec<SessionDisk>,
    scratch: room::Wish,
    /// What there was of room for scratch when it began.
    pub room: Room,
    teardown: Teardown,
    over: CancellationToken,
}

/// What commit has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Disks that have the new checkpoint.
    pub disks: Vec<String>,
    /// Checkpoints that were deleted, as `disk/checkpoint`.
    pub deleted: Vec<String>,
    /// What could not be removed, with the reason.
    pub leftovers: Vec<String>,
}

impl SessionDisk {
    pub(crate) fn new(plan: DiskPlan, changed_bytes: u64, names: Names, view: Arc<View>) -> Self {
        Self {
            plan,
            changed_bytes,
            names,
            view,
        }
    }

    /// Its view.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// What another process needs to take it over.
    pub(crate) fn saved(&self) -> SavedDisk {
        let plan = &self.plan;
        SavedDisk {
            disk: plan.disk.id.clone(),
            node: plan.disk.node.clone(),
            wanted: plan.wanted.as_ref().map(Name::to_string),
            base: plan
                .base
                .as_ref()
                .map(|base| (base.name.to_string(), base.granularity)),
            reason: plan.reason,
            checkpoint: plan.checkpoint.as_ref().map(Checkpoint::bitmap),
            changed_bytes: self.changed_bytes,
        }
    }
}

impl Session {
    /// Takes over what was opened ([`crate::begin`], [`crate::attach`]), and its undos.
    pub(crate) fn new(
        stake: Stake,
        chain: Name,
        time_ms: u64,
        qmp: Qmp,
        disks: Vec<SessionDisk>,
        (scratch, room): (room::Wish, Room),
        teardown: Teardown,
    ) -> Self {
        Self {
            id: stake.id.clone(),
            stake,
            chain,
            time_ms,
            qmp,
            disks,
            scratch,
            room,
            teardown,
            over: CancellationToken::new(),
        }
    }

    /// Its private directory, for sockets that are part of it; it goes with the session.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.stake.dir()
    }

    /// The disks, in the order that was asked for.
    #[must_use]
    pub fn disks(&self) -> &[SessionDisk] {
        &self.disks
    }

    /// QEMU's events, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.qmp.events()
    }

    /// Its guard, to be run as long as it lives, and what that has to say.
    #[must_use]
    pub fn guard(&self) -> (Guard, mpsc::Receiver<Notice>) {
        let (notices, told) = mpsc::channel(guard::NOTICES);
        let views = self.disks.iter().map(|disk| Arc::clone(&disk.view));
        let (qmp, scratch) = (self.qmp.clone(), self.scratch.clone());
        let guard = Guard::new(qmp, views.collect(), scratch, self.room, notices);
        (guard, told)
    }

    /// The view of a disk: to read it ([`crate::pull::Pull`]), and to give parts of it back.
    ///
    /// # Errors
    /// [`Kind::UnknownDisk`].
    pub fn view(&self, disk: &str) -> Result<Arc<View>> {
        Ok(Arc::clone(&self.disk(disk)?.view))
    }

    /// The view of a disk, to be exported: the export ends with the session.
    ///
    /// # Errors
    /// [`Kind::UnknownDisk`].
    pub fn exporting(&mut self, disk: &str) -> Result<Arc<View>> {
        let disk = self.disk(disk)?;
        let view = Arc::clone(&disk.view);
        let undo = Undo::Export {
            id: disk.names.public_export(),
        };
        self.teardown.forget(&undo);
        self.teardown.push(undo);
        Ok(view)
    }

    /// Fires when the session ends, by whichever way.
    #[must_use]
    pub fn over(&self) -> CancellationToken {
        self.over.clone()
    }

    fn disk(&self, id: &str) -> Result<&SessionDisk> {
        let unknown =
            || Error::new(Kind::UnknownDisk, "looking for a disk of the backup").on_disk(id);
        self.disks
            .iter()
            .find(|disk| disk.plan.disk.id == id)
            .ok_or_else(unknown)
    }

    /// Whether `commit` of these disks (`None`: all) can go ahead.
    ///
    /// # Errors
    /// [`Kind::UnknownDisk`]; [`Kind::Incomplete`] for a disk that was not read to
    /// its end.
    pub fn check_commit(&self, disks: Option<&[String]>) -> Result<()> {
        for id in disks.unwrap_or_default() {
            self.disk(id)?;
        }
        let missing = self.stored(disks).find(|disk| !disk.view.is_complete());
        match missing {
            Some(disk) => Err(Error::new(Kind::Incomplete, "committing a backup")
                .on_disk(disk.plan.disk.id.clone())),
            None => Ok(()),
        }
    }

    fn stored<'a>(&'a self, disks: Option<&'a [String]>) -> impl Iterator<Item = &'a SessionDisk> {
        self.disks
            .iter()
            .filter(move |disk| disks.is_none_or(|ids| ids.contains(&disk.plan.disk.id)))
    }

    /// Makes the new checkpoints lasting on `disks` (`None`: all), deletes
    /// checkpoints `delete` on these, and takes everything else away.
    ///
    /// # Errors
    /// QEMU's, with [`Error::leftovers`]: then no disk has the new checkpoint, and
    /// the session has ended as by abort.
    pub async fn commit(mut self, disks: Option<&[String]>, delete: &[Name]) -> Result<Committed> {
        // The session ends, whatever comes: QEMU shall not wait for the host's own readers.
        for disk in &self.disks {
            disk.view.close().await;
        }
        let lasting = self.make_lasting(disks).await;
        let committed = match lasting {
            Ok(committed) => committed,
            Err(error) => return Err(error.leaving(self.end().await)),
        };
        let (deleted, mut leftovers) = self.delete_checkpoints(disks, delete).await;
        leftovers.extend(self.end().await);
        Ok(Committed {
            disks: committed,
            deleted,
            leftovers,
        })
    }

    async fn make_lasting(&mut self, disks: Option<&[String]>) -> Result<Vec<String>> {
        let mut done = Vec::new();
        let mut parts = Vec::new();
        for disk in self.stored(disks) {
            if let Some(checkpoint) = &disk.plan.checkpoint {
                done.push(disk.plan.disk.id.clone());
                parts.push((disk, disk.names.pending(), checkpoint.bitmap()));
            }
        }
        if parts.is_empty() {
            return Ok(done);
        }
        let parts = parts.iter().map(|(disk, pending, bitmap)| Lasting {
            node: &disk.plan.disk.node,
            pending,
            bitmap,
            granularity: GRANULARITY,
            persistent: disk.plan.disk.persistent_bitmaps,
        });
        lasting::make(&self.qmp, parts.collect()).await?;
        Ok(done)
    }

    async fn delete_checkpoints(
        &self,
        disks: Option<&[String]>,
        delete: &[Name],
    ) -> (Vec<String>, Vec<String>) {
        let (mut deleted, mut leftovers) = (Vec::new(), Vec::new());
        let mut actions = Vec::new();
        // Disk by disk: what cannot go on one goes on the others.
        for disk in self.stored(disks) {
            let disk = std::slice::from_ref(&disk.plan.disk);
            for name in delete {
                match change::delete(disk, None, &self.chain, std::slice::from_ref(name)) {
                    Ok((names, change)) => {
                        deleted.extend(names);
                        actions.extend(change.actions);
                    }
                    Err(error) if error.kind() == Kind::UnknownCheckpoint => {}
                    Err(error) => leftovers.push(format!("checkpoint {name}: {}", error.chain())),
                }
            }
        }
        if actions.is_empty() {
            return (deleted, leftovers);
        }
        match self
            .qmp
            .execute_raw("transaction", step::transaction(actions))
            .await
        {
            Ok(_) => (deleted, leftovers),
            Err(error) => {
                let why = error.chain();
                let kept = deleted.iter();
                leftovers.extend(kept.map(|name| format!("checkpoint {name}: {why}")));
                (Vec::new(), leftovers)
            }
        }
    }

    /// Takes everything away, the pending checkpoints too; the base stays.
    /// Returns what could not be removed, with the reason.
    pub async fn abort(self) -> Vec<String> {
        self.end().await
    }

    /// Whether it shall outlive its host.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.stake.is_kept()
    }

    /// Leaves it open in QEMU without a process of its own, for another one to take over
    /// ([`crate::attach`]) once this one has ended.
    pub async fn detach(self) {
        self.over.cancel();
        let (guard, _told) = self.guard();
        guard.leave().await;
        for disk in &self.disks {
            let work = tokio::time::timeout(WORK_DEADLINE, disk.view.at_work()).await;
            disk.view.remember().await;
            disk.view.close().await;
            drop(work);
            disk.view.take_left().leave();
        }
        self.teardown.leave();
    }

    async fn end(mut self) -> Vec<String> {
        // Readers close their sockets first: an export with an open client that
        // does not read would not go.
        self.over.cancel();
        for disk in &self.disks {
            // What QEMU does for the host was cancelled, and cleans up.
            let _work = tokio::time::timeout(WORK_DEADLINE, disk.view.at_work()).await;
            disk.view.close().await;
            self.teardown.append(disk.view.take_left());
        }
        let filters: Vec<String> = self.disks.iter().map(|disk| disk.names.filter()).collect();
        standstill::end(&self.qmp, std::mem::take(&mut self.teardown), &filters).await
    }
}

/// A new identity.
#[must_use]
pub fn new_id() -> Id {
    let mut bytes = [0u8; 10];
    // Blocks only while the kernel has no entropy at boot; an error leaves zeros,
    // which a second session would notice as names that exist.
    let _filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    Id::from_bytes(bytes)
}

/// 10 random lower-case letters and digits.
#[must_use]
pub fn random_id() -> String {
    new_id().as_str().to_owned()
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
