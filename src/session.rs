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
//! `begin` on a VM's disks: scratch files; NBD server; one transaction (filters,
//! pending checkpoints, frozen copies of the bases); views; exports; and what did
//! not change since the base is given back at once.
//!
//! `commit` and `abort` take the session, so nothing can be read after them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::change;
use crate::checkpoint::{GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::plan::{self, DiskPlan, Wish};
use crate::qemu::query::{self, Version};
use crate::qemu::step::{self, Instant, Lasting, Names};
use crate::qemu::{Event, Qmp, Schema, discover};
use crate::scratch::Scratch;
use crate::server::Server;
use crate::teardown::{Teardown, Undo};
use crate::view::View;

/// How long the transaction may take: it waits for guest I/O that is under way.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(60);

/// How long a push gets to end once it is cancelled.
const WORK_DEADLINE: Duration = Duration::from_secs(30);

/// The first QEMU whose disks on an iothread can be exported: 9.0.
const FIRST_WITH_IOTHREADS: u32 = 9;

/// Where a session keeps its files.
#[derive(Clone, Debug)]
pub struct Places {
    /// Scratch files.
    pub scratch_dir: PathBuf,
    /// The NBD socket, in a private directory made below it.
    pub runtime_dir: PathBuf,
}

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
    /// The chain that its checkpoints belong to.
    chain: Name,
    /// The instant: milliseconds since 1970 UTC, by this machine's clock.
    pub time_ms: u64,
    qmp: Qmp,
    disks: Vec<SessionDisk>,
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

impl Session {
    /// Opens a point in time.
    ///
    /// # Errors
    /// Those of [`plan::plan`] before anything is made; QEMU's, scratch's and
    /// NBD's later, and [`Kind::Cancelled`]: then all is taken away again, and
    /// [`Error::leftovers`] names what could not be.
    pub async fn begin(
        qmp: &Qmp,
        server: &Server,
        wish: &Wish,
        places: &Places,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let time_ms = now_ms();
        let version = query::version(qmp).await?;
        let mut disks = discover::disks(qmp).await?;
        if version.major < FIRST_WITH_IOTHREADS {
            discover::find_iothreads(qmp, &mut disks).await?;
        }
        let plans = plan::plan(&disks, wish, time_ms, &new_id)?;
        refuse_what_hurts(version, &plans)?;
        let schema = Schema::probe(qmp).await?;
        refuse_what_is_lacking(&schema)?;
        let id = random_id();
        let mut teardown = Teardown::default();
        let opening = Opening {
            qmp,
            server,
            version,
            can_discard_source: schema.has_argument("blockdev-backup", "discard-source"),
            id: &id,
            places,
            keep_unchanged: wish.keep_unchanged,
            cancel,
        };
        let opened = opening.open(plans, &mut teardown).await;
        match opened {
            Ok(disks) => {
                info!(session = id, disks = disks.len(), "point in time open");
                Ok(Self {
                    id,
                    chain: wish.chain.clone(),
                    time_ms,
                    qmp: qmp.clone(),
                    disks,
                    teardown,
                    over: CancellationToken::new(),
                })
            }
            Err(error) => Err(error.leaving(teardown.run(qmp).await)),
        }
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
        let lasting: Vec<Lasting<'_>> = parts
            .iter()
            .map(|(disk, pending, bitmap)| Lasting {
                node: &disk.plan.disk.node,
                pending,
                bitmap,
                granularity: GRANULARITY,
                persistent: disk.plan.disk.persistent_bitmaps,
            })
            .collect();
        self.qmp
            .execute_raw_within("transaction", step::commit(&lasting), TRANSACTION_DEADLINE)
            .await?;
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

    async fn end(mut self) -> Vec<String> {
        // Readers close their sockets first: an export with an open client that
        // does not read would not go.
        self.over.cancel();
        for disk in &self.disks {
            // What QEMU does for the host was cancelled, and cleans up.
            let work = tokio::time::timeout(WORK_DEADLINE, disk.view.at_work()).await;
            disk.view.close().await;
            drop(work);
            self.teardown.append(disk.view.take_left());
        }
        std::mem::take(&mut self.teardown).run(&self.qmp).await
    }
}

/// Refuses disks whose configuration this QEMU does not survive.
fn refuse_what_hurts(version: Version, plans: &[DiskPlan]) -> Result<()> {
    if version.major >= FIRST_WITH_IOTHREADS {
        return Ok(());
    }
    // Measured: below that an NBD export of an iothread's disk aborts QEMU.
    match plans.iter().find(|plan| plan.disk.iothread.is_some()) {
        None => Ok(()),
        Some(plan) => Err(
            Error::new(Kind::QemuUnsupported, "checking what this QEMU can do")
                .because(format!(
                    "QEMU {}.{} crashes when a disk on an iothread is read over NBD; 9.0 does not",
                    version.major, version.minor
                ))
                .on_disk(plan.disk.id.clone()),
        ),
    }
}

/// Asks for what a session needs before anything is made: distributions leave
/// parts of QEMU out, and put others in, whatever the version is.
fn refuse_what_is_lacking(schema: &Schema) -> Result<()> {
    for (command, case) in [
        ("blockdev-add", "snapshot-access"),
        ("block-export-add", "nbd"),
    ] {
        if !schema.has_variant(command, case) {
            return Err(
                Error::new(Kind::QemuUnsupported, "checking what this QEMU can do").because(
                    format!("its {command} knows no {case}; QEMU 7.0 and later do"),
                ),
            );
        }
    }
    Ok(())
}

/// What opening a session goes by.
struct Opening<'a> {
    qmp: &'a Qmp,
    server: &'a Server,
    version: Version,
    can_discard_source: bool,
    id: &'a str,
    places: &'a Places,
    keep_unchanged: bool,
    cancel: &'a CancellationToken,
}

impl Opening<'_> {
    async fn open(
        &self,
        plans: Vec<DiskPlan>,
        teardown: &mut Teardown,
    ) -> Result<Vec<SessionDisk>> {
        let Self { qmp, places, .. } = self;
        let names: Vec<Names> = (0..plans.len())
            .map(|index| Names::new(self.id, index))
            .collect();
        let mut scratches = Vec::new();
        for (plan, names) in plans.iter().zip(&names) {
            go_on(self.cancel)?;
            let scratch =
                Scratch::open(qmp, names, plan.disk.size, &places.scratch_dir, teardown).await;
            scratches.push(scratch.map_err(|error| error.on_disk(plan.disk.id.clone()))?);
        }
        go_on(self.cancel)?;
        let address = self.server.join(qmp, &places.runtime_dir, teardown).await?;
        go_on(self.cancel)?;
        take_instant(qmp, &plans, &names, teardown).await?;
        let mut disks = Vec::new();
        for ((plan, names), scratch) in plans.into_iter().zip(names).zip(scratches) {
            go_on(self.cancel)?;
            let id = plan.disk.id.clone();
            let view = self.open_view(&plan, &names, address.clone(), scratch, teardown);
            let view = view.await.map_err(|error| error.on_disk(id.clone()))?;
            let changed = view.survey(self.keep_unchanged, self.cancel).await;
            disks.push(SessionDisk {
                changed_bytes: changed.map_err(|error| error.on_disk(id))?,
                view: Arc::new(view),
                plan,
                names,
            });
        }
        Ok(disks)
    }

    async fn open_view(
        &self,
        plan: &DiskPlan,
        names: &Names,
        address: crate::nbd::Address,
        scratch: Scratch,
        teardown: &mut Teardown,
    ) -> Result<View> {
        let incremental = plan.base.is_some();
        teardown.push(Undo::Node { node: names.view() });
        self.qmp
            .execute_raw("blockdev-add", step::view(names))
            .await?;
        if incremental {
            // For a push: the other one is busy once it is exported.
            let (from, copy) = (names.changes(), names.push_bitmap());
            let grain = plan.granularity();
            let copy = step::view_bitmap(names, &copy, grain, &plan.disk.node, &from);
            self.qmp.execute_raw("transaction", copy).await?;
        }
        teardown.push(Undo::Export { id: names.job() });
        let export = step::export(names, &plan.disk.node, incremental);
        self.qmp.execute_raw("block-export-add", export).await?;
        Ok(View::new(
            self.qmp.clone(),
            names.clone(),
            address,
            plan,
            (self.version, self.can_discard_source),
            scratch,
        ))
    }
}

fn go_on(cancel: &CancellationToken) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "opening a point in time"));
    }
    Ok(())
}

async fn take_instant(
    qmp: &Qmp,
    plans: &[DiskPlan],
    names: &[Names],
    teardown: &mut Teardown,
) -> Result<()> {
    let instants: Vec<Instant<'_>> = plans
        .iter()
        .zip(names)
        .map(|(plan, names)| Instant {
            node: &plan.disk.node,
            names,
            base: plan
                .base
                .as_ref()
                .map(|base| (base.bitmaps.as_slice(), base.granularity)),
            checkpoint: plan.checkpoint.as_ref().map(|_| GRANULARITY),
        })
        .collect();
    for (plan, names) in plans.iter().zip(names) {
        let node = plan.disk.node.clone();
        if plan.base.is_some() {
            teardown.push(Undo::Bitmap {
                node: node.clone(),
                name: names.changes(),
            });
        }
        if plan.checkpoint.is_some() {
            teardown.push(Undo::Bitmap {
                node,
                name: names.pending(),
            });
        }
        teardown.push(Undo::Job { id: names.job() });
    }
    let transaction = step::point_in_time(&instants);
    qmp.execute_raw_within("transaction", transaction, TRANSACTION_DEADLINE)
        .await
        .map(drop)
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
