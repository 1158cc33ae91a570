//! How points in time come to this process, and go without it: `backup.begin`,
//! `backup.begin_group`, `backup.attach`, `reclaim`.

use std::sync::Arc;

use qemu_fleece_engine::attach;
use qemu_fleece_engine::begin::{self as engine, Begun, MAX_MEMBERS, Member};
use qemu_fleece_engine::reclaim::{self, State, Which};
use qemu_fleece_engine::session::Session;
use qemu_fleece_protocol::backup::{BeginGroupParams, BeginGroupResult, BeginParams, BeginResult};
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::orphan::{
    AttachParams, AttachResult, AttachedDisk, BackupState, LeftBackup, ReclaimParams, ReclaimResult,
};
use qemu_fleece_protocol::{Code, Id, WireError};
use serde_json::value::RawValue;

use crate::monitors::Monitor;
use crate::requests::{Outcome, Started, spawn, to_raw};
use crate::serve::Server;
use crate::{events, wire};

/// Whether backups began alone, or as a group.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Together {
    Alone,
    Group,
}

pub(crate) fn begin(server: &mut Server, id: &Id, params: BeginParams) -> Started {
    begin_all(server, id, vec![params], Together::Alone)
}

pub(crate) fn begin_group(server: &mut Server, id: &Id, params: BeginGroupParams) -> Started {
    let members = params.members;
    let is_double = |at: usize| {
        let monitor = &members[at].monitor;
        members[..at].iter().any(|other| other.monitor == *monitor)
    };
    let why = if members.is_empty() || members.len() > MAX_MEMBERS {
        format!("a group has 1 to {MAX_MEMBERS} members")
    } else if (0..members.len()).any(is_double) {
        "two members have the same monitor".to_owned()
    } else {
        return begin_all(server, id, members, Together::Group);
    };
    Err(WireError::new(Code::InvalidParams, why))
}

fn begin_all(
    server: &mut Server,
    id: &Id,
    members: Vec<BeginParams>,
    together: Together,
) -> Started {
    let wishes = members.iter().map(|params| {
        let consistency = wire::from_consistency(params.consistency.as_ref())?;
        Ok((wire::from_begin(params)?, consistency))
    });
    let wishes = wishes.collect::<Result<Vec<_>, WireError>>()?;
    let guardian = server.config.guardian.clone();
    let (scratch_dir, runtime_dir) = (
        server.config.scratch_dir.clone(),
        server.config.runtime_dir.clone(),
    );
    let (monitors, cancel) = (server.monitors.clone(), server.token(id));
    Ok(spawn(server, id, async move {
        let began = async {
            let (mut all, mut used) = (Vec::new(), Vec::new());
            for (params, (wish, consistency)) in members.into_iter().zip(wishes) {
                let monitor = monitors.get(&params.monitor).await?;
                all.push(Member {
                    qmp: monitor.qmp.clone(),
                    server: monitor.server.clone(),
                    wish,
                    runtime_dir: runtime_dir.clone(),
                    scratch: wire::from_scratch(params.scratch.unwrap_or_default(), &scratch_dir),
                    consistency,
                });
                used.push(monitor);
            }
            Ok((engine::begin(all, &guardian, &cancel).await?, used))
        };
        match began.await {
            Ok((begun, used)) => Outcome::Began(begun, used, together),
            Err(error) => Outcome::Reply(Err(wire::with_unknown(&error, StateLeft::Unchanged))),
        }
    }))
}

/// Takes over what has begun; returns the answer.
pub(crate) fn began(
    server: &mut Server,
    begun: Begun,
    monitors: Vec<Arc<Monitor>>,
    together: Together,
) -> Result<Box<RawValue>, WireError> {
    let mut backups = Vec::new();
    let sessions = begun.sessions.into_iter().zip(begun.released);
    for ((session, released), monitor) in sessions.zip(monitors) {
        backups.push(BeginResult {
            consistency: wire::to_reached(&released),
            ..wire::to_began(&session)
        });
        take_in(server, session, monitor);
    }
    match together {
        Together::Alone => to_raw(backups.pop()),
        Together::Group => to_raw(BeginGroupResult {
            backups,
            skew_us: u64::try_from(begun.skew.as_micros()).unwrap_or(u64::MAX),
        }),
    }
}

/// Starts `backup.attach`.
pub(crate) fn attach(server: &mut Server, id: &Id, params: AttachParams) -> Option<Outcome> {
    let monitors = server.monitors.clone();
    spawn(server, id, async move {
        let attached = async {
            let monitor = monitors.get(&params.monitor).await?;
            let session = attach::attach(&monitor.qmp, &monitor.server, &params.backup).await?;
            Ok((session, monitor))
        };
        match attached.await {
            Ok((session, monitor)) => Outcome::Attached(Box::new(session), monitor),
            Err(error) => Outcome::Reply(Err(wire::with_unknown(&error, StateLeft::Unchanged))),
        }
    })
}

/// Takes over what was attached; returns the answer.
pub(crate) fn attached(
    server: &mut Server,
    session: Session,
    monitor: Arc<Monitor>,
) -> Result<Box<RawValue>, WireError> {
    let BeginResult {
        backup,
        time_ms,
        disks,
        ..
    } = wire::to_began(&session);
    let far = session.disks().iter().map(|disk| disk.view());
    let disks = disks.into_iter().zip(far).map(|(disk, view)| AttachedDisk {
        disk,
        resume: view.resume().map(|(offset, _)| offset),
        complete: view.is_complete(),
    });
    let result = AttachResult {
        backup,
        time_ms,
        disks: disks.collect(),
    };
    take_in(server, session, monitor);
    to_raw(result)
}

fn take_in(server: &mut Server, session: Session, monitor: Arc<Monitor>) {
    events::spawn(
        session.id.clone(),
        session.events(),
        session.over(),
        server.outlet.clone(),
    );
    let (guard, notices) = session.guard();
    tokio::spawn(guard.run(session.over()));
    events::spawn_scratch(session.id.clone(), notices, server.outlet.clone());
    server.backups.add(session, monitor);
}

/// Starts `reclaim`.
pub(crate) fn reclaim(server: &mut Server, id: &Id, params: ReclaimParams) -> Started {
    let which = match (params.backups, params.force) {
        (None, false) => Which::Dead,
        (Some(backups), false) => Which::These(backups),
        (Some(backups), true) => Which::Forced(backups),
        (None, true) => {
            let why = "force needs the names of the backups";
            return Err(WireError::new(Code::InvalidParams, why));
        }
    };
    let monitors = server.monitors.clone();
    Ok(spawn(server, id, async move {
        let reclaimed = async {
            let monitor = monitors.get(&params.monitor).await?;
            reclaim::reclaim(&monitor.qmp, &which).await
        };
        Outcome::Reply(match reclaimed.await {
            Ok(report) => to_raw(ReclaimResult {
                reclaimed: report.reclaimed,
                left: report.left.into_iter().map(to_left).collect(),
                leftovers: report.leftovers,
            }),
            Err(error) => Err(wire::with_unknown(&error, StateLeft::Unchanged)),
        })
    }))
}

fn to_left((backup, state): (String, State)) -> LeftBackup {
    let state = match state {
        State::Alive => BackupState::Alive,
        State::Dead => BackupState::Dead,
        State::Kept => BackupState::Kept,
        State::Unknown => BackupState::Unknown,
    };
    LeftBackup { backup, state }
}
