//! Attach: a point in time whose process has ended is taken over by this one.
//!
//! ```text
//! process A: begin --- read, ack --- killed
//! QEMU:      the view, the pending checkpoints, and how far A was (crate::saved)
//! process B:                                  attach --- read from the last ack --- commit
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use tracing::info;

use crate::abilities::Abilities;
use crate::checkpoint::{Checkpoint, Name};
use crate::error::{Error, Kind, Result};
use crate::plan::{Base, DiskPlan};
use crate::qemu::discover::{self, Disk};
use crate::qemu::query;
use crate::qemu::step::Names;
use crate::qemu::{Qmp, Schema};
use crate::reclaim::{self, Found, State};
use crate::room;
use crate::saved::{Progress, Saved, SavedDisk};
use crate::scratch::Scratch;
use crate::server::Server;
use crate::session::{Session, SessionDisk};
use crate::stake::Stake;
use crate::teardown::Teardown;
use crate::view::View;

/// Takes over the open session `id`.
///
/// # Errors
/// [`Kind::UnknownSession`]: there is none, or it was never open; [`Kind::SessionAlive`]:
/// its process lives, or cannot be seen from here; [`Kind::UnknownDisk`] for a disk that was
/// unplugged; [`Kind::PointInTimeLost`]; [`Kind::MonitorProtocol`] for a note that lies;
/// QEMU's. All is as before then, but pushes of
/// the process that has ended are taken away.
pub async fn attach(qmp: &Qmp, server: &Server, id: &str) -> Result<Session> {
    // From the look to the taking over: nobody reclaims it meanwhile, or takes it over too.
    let turn = qmp.turn().await;
    let found = reclaim::sessions(&turn).await?;
    let found = found.into_iter().find(|found| found.id == id);
    let found = found.ok_or_else(|| Error::new(Kind::UnknownSession, doing(id)))?;
    let alive = |why: &'static str| Error::new(Kind::SessionAlive, doing(id)).because(why);
    match found.state() {
        State::Dead | State::Kept => {}
        State::Alive => return Err(alive("its process lives")),
        State::Unknown => return Err(alive("whether its process lives cannot be told from here")),
    }
    let deed = found.deed.clone();
    let session = deed.as_ref().and_then(|deed| deed.session.clone());
    let (Some(deed), Some(session)) = (deed, session) else {
        return Err(Error::new(Kind::UnknownSession, doing(id)).because("it was never open"));
    };
    if found.dir().is_none() {
        let why = "its note tells of a directory that it never made";
        return Err(Error::new(Kind::MonitorProtocol, doing(id)).because(why));
    }
    let plans = plans(qmp, &found, &session).await?;
    let version = query::version(qmp).await?;
    let schema = Schema::probe(qmp).await?;
    let scratch = room::Wish::resumed(&session.scratch);
    let abilities = Abilities::new(version, &schema, &scratch);
    let chain = Name::parse(&session.chain)?;
    let leftovers = found.consumer_teardown(true).run(&turn).await;
    if !leftovers.is_empty() {
        return Err(Error::new(Kind::QemuRefused, doing(id)).leaving(leftovers));
    }
    let mut part = Teardown::default();
    let socket = deed.server.clone().unwrap_or_default();
    let address = server.take_over(socket, &mut part).await?;
    let stake = match Stake::take_over(&turn, found.id.clone(), deed).await {
        Ok(stake) => stake,
        Err(error) => {
            // It still uses the server, but not in our name.
            server.release().await;
            part.leave();
            return Err(error);
        }
    };
    let teardown = found.session_teardown(true, part.pop());
    drop(turn);
    let disks = plans.into_iter().zip(&session.disks).enumerate();
    let disks = disks.map(|(place, (plan, saved))| {
        let names = Names::new(id, place);
        let progress = found.progress.get(&place);
        let view = view(qmp, &names, &address, &plan, abilities, progress);
        SessionDisk::new(plan, saved.changed_bytes, names, Arc::new(view))
    });
    let disks = disks.collect();
    // It is needed for warnings only.
    let room = room::find(&scratch, &[]).await.unwrap_or_default();
    info!(session = id, "point in time taken over");
    Ok(Session::new(
        stake,
        chain,
        session.time_ms,
        qmp.clone(),
        disks,
        (scratch, room),
        teardown,
    ))
}

fn doing(id: &str) -> String {
    format!("taking over the backup {id}")
}

fn view(
    qmp: &Qmp,
    names: &Names,
    address: &crate::nbd::Address,
    plan: &DiskPlan,
    abilities: Abilities,
    progress: Option<&Progress>,
) -> View {
    let scratch = Scratch::Node(names.scratch_file());
    let view = View::new(
        qmp.clone(),
        names.clone(),
        address.clone(),
        plan,
        abilities,
        scratch,
    );
    // Without a word of it that can be true, nothing is known to be there still.
    let progress = progress.filter(|progress| progress.released <= plan.disk.size);
    let unknown = Progress {
        spent: true,
        ..Progress::default()
    };
    view.resumed(progress.unwrap_or(&unknown))
}

/// The plans of its disks, all of which must be there, with their views.
async fn plans(qmp: &Qmp, found: &Found, session: &Saved) -> Result<Vec<DiskPlan>> {
    let disks = discover::disks(qmp).await?;
    let jobs = query::jobs(qmp).await?;
    let running: HashMap<&str, &str> = jobs
        .iter()
        .map(|job| (job.id.as_str(), job.status.as_str()))
        .collect();
    let mut plans = Vec::new();
    for (place, saved) in session.disks.iter().enumerate() {
        let there = disks.iter().find(|disk| disk.node == saved.node);
        let there = there.ok_or_else(|| {
            Error::new(Kind::UnknownDisk, doing(&found.id)).on_disk(saved.disk.clone())
        })?;
        let job = Names::new(&found.id, place).job();
        if running.get(job.as_str()) != Some(&"running") {
            return Err(Error::new(Kind::PointInTimeLost, doing(&found.id))
                .because("the job that keeps it does not run")
                .on_disk(saved.disk.clone()));
        }
        plans.push(plan(there, saved)?);
    }
    Ok(plans)
}

fn plan(disk: &Disk, saved: &SavedDisk) -> Result<DiskPlan> {
    let lie = |why: &'static str| Error::new(Kind::MonitorProtocol, "reading a note").because(why);
    if !discover::is_id(&saved.disk) {
        return Err(lie("no id of a disk"));
    }
    let name = |text: &String| Name::parse(text);
    let base = saved.base.as_ref().map(|(base, granularity)| {
        Ok(Base {
            name: name(base)?,
            // They were copied when the point in time was made.
            bitmaps: Vec::new(),
            granularity: *granularity,
            dirty_bytes: saved.changed_bytes,
        })
    });
    let checkpoint = saved
        .checkpoint
        .as_deref()
        .map(|bitmap| Checkpoint::from_bitmap(bitmap).ok_or_else(|| lie("no checkpoint")));
    Ok(DiskPlan {
        disk: Disk {
            id: saved.disk.clone(),
            ..disk.clone()
        },
        wanted: saved.wanted.as_ref().map(name).transpose()?,
        base: base.transpose()?,
        reason: saved.reason,
        checkpoint: checkpoint.transpose()?,
    })
}
