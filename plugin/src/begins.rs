//! `backup.begin` and `backup.begin_group`: points in time of one VM, or of several.

use std::path::PathBuf;
use std::sync::Arc;

use qemu_fleece_engine::begin::{self as engine, Begun, MAX_MEMBERS, Member};
use qemu_fleece_protocol::backup::{BeginGroupParams, BeginGroupResult, BeginParams};
use qemu_fleece_protocol::error::StateLeft;
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
    let wishes = members.iter().map(wire::from_begin);
    let wishes = wishes.collect::<Result<Vec<_>, _>>()?;
    let places = server.config.places.clone();
    let (monitors, cancel) = (server.monitors.clone(), server.token(id));
    Ok(spawn(server, id, async move {
        let began = async {
            let (mut all, mut used) = (Vec::new(), Vec::new());
            for (params, wish) in members.into_iter().zip(wishes) {
                let monitor = monitors.get(&params.monitor).await?;
                let mut places = places.clone();
                if let Some(dir) = params.scratch_dir {
                    places.scratch_dir = PathBuf::from(dir);
                }
                all.push(Member {
                    qmp: monitor.qmp.clone(),
                    server: monitor.server.clone(),
                    wish,
                    places,
                });
                used.push(monitor);
            }
            Ok((engine::begin(all, &cancel).await?, used))
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
    for (session, monitor) in begun.sessions.into_iter().zip(monitors) {
        backups.push(wire::to_began(&session));
        events::spawn(
            session.id.clone(),
            session.events(),
            session.over(),
            server.outlet.clone(),
        );
        server.backups.add(session, monitor);
    }
    match together {
        Together::Alone => to_raw(backups.pop()),
        Together::Group => to_raw(BeginGroupResult {
            backups,
            skew_us: u64::try_from(begun.skew.as_micros()).unwrap_or(u64::MAX),
        }),
    }
}
