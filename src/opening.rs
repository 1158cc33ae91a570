//! One VM's way to an open point in time, in three steps that its caller spaces.
//!
//! ```text
//! Opening::prepare ----> instant ----> finish ----> Session
//!   plan, scratch,       one QMP       views, exports,
//!   NBD server           transaction   survey
//!        \__________________\______________\___ error, cancelled: all taken away
//! ```
//! All that takes time lies in the first and the last step: between them several VMs are
//! brought together, and their guests quiesced.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::abilities::Abilities;
use crate::checkpoint::GRANULARITY;
use crate::error::{Error, Kind, Result};
use crate::nbd::Address;
use crate::plan::{self, DiskPlan, Wish};
use crate::qemu::query::{self, Version};
use crate::qemu::step::{self, Instant, Names};
use crate::qemu::{Qmp, Schema, discover, note};
use crate::quiesce::Consistency;
use crate::reclaim::{self, State};
use crate::room::{self, Room};
use crate::saved::Saved;
use crate::scratch::{Limits, Scratch};
use crate::server::Server;
use crate::session::{Session, SessionDisk, new_id, now_ms, random_id};
use crate::stake::Stake;
use crate::standstill;
use crate::teardown::{Teardown, Undo};
use crate::view::View;

/// How long the transaction may take: it waits for guest I/O that is under way.
pub(crate) const TRANSACTION_DEADLINE: Duration = Duration::from_secs(60);

/// The first QEMU whose disks on an iothread can be exported: 9.0.
const FIRST_WITH_IOTHREADS: u32 = 9;

/// What is asked of one VM.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its monitor.
    pub qmp: Qmp,
    /// Its QEMU's NBD server, as far as it is ours.
    pub server: Server,
    /// What is wished for.
    pub wish: Wish,
    /// Where sockets lie.
    pub runtime_dir: PathBuf,
    /// Where scratch lies, and how much it may take.
    pub scratch: room::Wish,
    /// Whether its guest is held still for the instant.
    pub consistency: Consistency,
}

/// A point in time on its way. It is to be finished or given up; its `Drop` only logs.
#[derive(Debug)]
pub(crate) struct Opening {
    member: Member,
    cancel: CancellationToken,
    abilities: Abilities,
    stake: Stake,
    room: Room,
    time_ms: u64,
    disks: Vec<Planned>,
    address: Address,
    teardown: Teardown,
}

/// A disk on its way.
#[derive(Debug)]
struct Planned {
    plan: DiskPlan,
    names: Names,
    scratch: Scratch,
}

impl Opening {
    /// Plans, and makes all that the instant needs.
    ///
    /// # Errors
    /// Those of [`plan::plan`] before anything is made; QEMU's, scratch's and NBD's later,
    /// and [`Kind::Cancelled`]: then all is taken away again, and [`Error::leftovers`]
    /// names what could not be.
    pub(crate) async fn prepare(member: Member, cancel: &CancellationToken) -> Result<Self> {
        let qmp = &member.qmp;
        reclaim::dead(qmp).await?;
        let time_ms = now_ms();
        let version = query::version(qmp).await?;
        let mut disks = discover::disks(qmp).await?;
        if version.major < FIRST_WITH_IOTHREADS {
            discover::find_iothreads(qmp, &mut disks).await?;
        }
        let mut plans = plan::plan(&disks, &member.wish, time_ms, &new_id)?;
        refuse_what_hurts(version, &plans)?;
        let schema = Schema::probe(qmp).await?;
        refuse_what_is_lacking(&schema)?;
        let room = room::find(&member.scratch, &plans).await?;
        let abilities = Abilities::new(version, &schema, &member.scratch);
        if !abilities.breaks {
            discover::find_stops(qmp, plans.iter_mut().map(|plan| &mut plan.disk)).await?;
        }
        let mut teardown = Teardown::default();
        let made = make(&member, plans, abilities.breaks, &mut teardown, cancel).await;
        match made {
            Ok((stake, disks, address)) => Ok(Self {
                cancel: cancel.clone(),
                abilities,
                stake,
                room,
                time_ms,
                disks,
                address,
                teardown,
                member,
            }),
            Err(error) => Err(error.leaving(teardown.run(&member.qmp).await)),
        }
    }

    /// Takes everything away; the error with what could not be.
    pub(crate) async fn give_up(self, error: Error) -> Error {
        let filters: Vec<String> = self.disks.iter().map(|disk| disk.names.filter()).collect();
        error.leaving(standstill::end(&self.member.qmp, self.teardown, &filters).await)
    }

    /// Takes the instant: one transaction over all disks.
    ///
    /// # Errors
    /// QEMU's. The opening is to be given up then.
    pub(crate) async fn instant(&mut self) -> Result<()> {
        go_on(&self.cancel)?;
        let instants: Vec<Instant<'_>> = self
            .disks
            .iter()
            .map(|Planned { plan, names, .. }| Instant {
                node: &plan.disk.node,
                names,
                base: plan
                    .base
                    .as_ref()
                    .map(|base| (base.bitmaps.as_slice(), base.granularity)),
                checkpoint: plan.checkpoint.as_ref().map(|_| GRANULARITY),
            })
            .collect();
        let transaction = step::point_in_time(&instants, self.abilities.breaks);
        for Planned { plan, names, .. } in &self.disks {
            let node = plan.disk.node.clone();
            if plan.base.is_some() {
                self.teardown.push(Undo::Bitmap {
                    node: node.clone(),
                    name: names.changes(),
                });
            }
            if plan.checkpoint.is_some() {
                self.teardown.push(Undo::Bitmap {
                    node,
                    name: names.pending(),
                });
            }
            self.teardown.push(Undo::Job { id: names.job() });
        }
        self.member
            .qmp
            .execute_raw_within("transaction", transaction, TRANSACTION_DEADLINE)
            .await
            .map(drop)
    }

    /// Opens the views.
    ///
    /// # Errors
    /// As [`Opening::prepare`].
    pub(crate) async fn finish(mut self) -> Result<Session> {
        let planned = std::mem::take(&mut self.disks);
        let opened = async {
            let disks = self.open_views(planned).await?;
            let saved = self.saved(&disks);
            self.stake.open(&self.member.qmp, saved).await?;
            Ok(disks)
        };
        match opened.await {
            Ok(disks) => Ok(Session::new(
                self.stake,
                self.member.wish.chain,
                self.time_ms,
                self.member.qmp,
                disks,
                (self.member.scratch, self.room),
                self.teardown,
            )),
            Err(error) => Err(self.give_up(error).await),
        }
    }

    fn saved(&self, disks: &[SessionDisk]) -> Saved {
        Saved {
            chain: self.member.wish.chain.to_string(),
            time_ms: self.time_ms,
            keep_ms: self.member.wish.keep_ms,
            scratch: self.member.scratch.saved(),
            disks: disks.iter().map(SessionDisk::saved).collect(),
        }
    }

    async fn open_views(&mut self, planned: Vec<Planned>) -> Result<Vec<SessionDisk>> {
        let mut disks = Vec::new();
        for disk in planned {
            go_on(&self.cancel)?;
            let id = disk.plan.disk.id.clone();
            let opened = self.open_view(disk).await;
            disks.push(opened.map_err(|error| error.on_disk(id))?);
        }
        Ok(disks)
    }

    async fn open_view(&mut self, disk: Planned) -> Result<SessionDisk> {
        let Planned {
            plan,
            names,
            scratch,
        } = disk;
        let qmp = &self.member.qmp;
        let incremental = plan.base.is_some();
        self.teardown.push(Undo::Object {
            id: names.progress(),
        });
        note::add(qmp, &names.progress(), "{}").await?;
        self.teardown.push(Undo::Node { node: names.view() });
        qmp.execute_raw("blockdev-add", step::view(&names)).await?;
        if incremental {
            // For a push: the other one is busy once it is exported.
            let (from, copy) = (names.changes(), names.push_bitmap());
            let grain = plan.granularity();
            let copy = step::view_bitmap(&names, &copy, grain, &plan.disk.node, &from);
            qmp.execute_raw("transaction", copy).await?;
        }
        self.teardown.push(Undo::Export { id: names.job() });
        let export = step::export(&names, &plan.disk.node, incremental);
        qmp.execute_raw("block-export-add", export).await?;
        let view = View::new(
            qmp.clone(),
            names.clone(),
            self.address.clone(),
            &plan,
            self.abilities,
            scratch,
        );
        let keep_unchanged = self.member.wish.keep_unchanged;
        let changed_bytes = view.survey(keep_unchanged, &self.cancel).await?;
        view.remember().await;
        Ok(SessionDisk::new(plan, changed_bytes, names, Arc::new(view)))
    }
}

/// The stake, scratch for each disk, and the NBD server.
async fn make(
    member: &Member,
    plans: Vec<DiskPlan>,
    breaks: bool,
    teardown: &mut Teardown,
    cancel: &CancellationToken,
) -> Result<(Stake, Vec<Planned>, Address)> {
    let Member {
        qmp,
        server,
        runtime_dir,
        scratch: wish,
        ..
    } = member;
    let mut stake = Stake::make(qmp, random_id(), runtime_dir, teardown).await?;
    let mut disks = Vec::new();
    for (index, plan) in plans.into_iter().enumerate() {
        go_on(cancel)?;
        let names = Names::new(&stake.id, index);
        // Only then can its guest never meet an error.
        let reserve = (!breaks && !plan.disk.stops_when_full).then(|| room::all_of(&plan.disk));
        let limits = Limits {
            dir: &wish.dir,
            cap: wish.cap(),
            reserve,
        };
        let scratch = Scratch::open(qmp, &names, plan.disk.size, &limits, teardown).await;
        let scratch = scratch.map_err(|error| error.on_disk(plan.disk.id.clone()))?;
        disks.push(Planned {
            plan,
            names,
            scratch,
        });
    }
    go_on(cancel)?;
    let turn = qmp.turn().await;
    let address = join_server(&turn, server, &stake, teardown).await?;
    // Before anybody reclaims whoever has started it.
    stake.uses(&turn, &address).await?;
    Ok((stake, disks, address))
}

/// QEMU has one NBD server: where a session that is kept for its host uses it, we do too.
async fn join_server(
    qmp: &Qmp,
    server: &Server,
    stake: &Stake,
    teardown: &mut Teardown,
) -> Result<Address> {
    let busy = match server.join(qmp, stake.server_dir(), teardown).await {
        Err(error) if error.kind() == Kind::NbdServerBusy => error,
        joined => return joined,
    };
    for found in reclaim::sessions(qmp).await? {
        let kept = found.state() == State::Kept;
        let socket = found.deed.and_then(|deed| deed.server);
        if let Some(socket) = socket.filter(|_| kept)
            && tokio::net::UnixStream::connect(&socket).await.is_ok()
        {
            return server.take_over(socket, teardown).await;
        }
    }
    Err(busy)
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

fn go_on(cancel: &CancellationToken) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "opening a point in time"));
    }
    Ok(())
}
