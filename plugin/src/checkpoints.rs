//! `checkpoint.*` and `backup.estimate`: what needs no open backup.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use qemu_fleece_engine::chain::Scope;
use qemu_fleece_engine::manage::{self, Subject};
use qemu_fleece_engine::{Result, estimate, redefine, repair};
use qemu_fleece_protocol::backup::{EstimateParams, EstimateResult};
use qemu_fleece_protocol::checkpoint::{
    CreateParams, DeleteParams, DeleteResult, ListParams, MergeParams, RedefineParams,
    RepairParams, ToggleParams,
};
use qemu_fleece_protocol::envelope::Request;
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::{Code, Id, WireError};
use serde::Serialize;

use crate::monitors::Monitor;
use crate::requests::{self, Outcome, Started};
use crate::serve::Server;
use crate::wire;

/// Starts the request `checkpoint.METHOD`.
pub(crate) fn dispatch(server: &mut Server, request: &Request, method: &str) -> Started {
    let id = &request.id;
    match method {
        "list" => list(server, id, request.params()?),
        "create" => create(server, id, request.params()?),
        "delete" => delete(server, id, request.params()?),
        "disable" => toggle(server, id, request.params()?, false),
        "enable" => toggle(server, id, request.params()?, true),
        "merge" => merge(server, id, request.params()?),
        "redefine" => redefine(server, id, request.params()?),
        "repair" => repair(server, id, request.params()?),
        method => Err(WireError::new(
            Code::MethodNotFound,
            format!("there is no method checkpoint.{method}"),
        )),
    }
}

/// Runs `work` with the monitor, and answers what it comes to.
fn run<T, W>(
    server: &mut Server,
    id: &Id,
    monitor: String,
    work: impl FnOnce(Arc<Monitor>) -> W + Send + 'static,
) -> Started
where
    T: Serialize,
    W: Future<Output = Result<T>> + Send,
{
    let monitors = server.monitors.clone();
    Ok(requests::spawn(server, id, async move {
        let done = async { work(monitors.get(&monitor).await?).await };
        Outcome::Reply(match done.await {
            Ok(result) => requests::to_raw(result),
            Err(error) => Err(wire::with_unknown(&error, StateLeft::Unchanged)),
        })
    }))
}

fn list(server: &mut Server, id: &Id, params: ListParams) -> Started {
    let scope = Scope {
        chain: wire::from_chain_choice(&params.chain, params.all_chains)?,
        names: params
            .checkpoints
            .as_deref()
            .map(wire::from_names)
            .transpose()?,
    };
    run(server, id, params.monitor, |monitor| async move {
        let listed = manage::list(&monitor.qmp, params.disks, scope).await?;
        Ok(wire::checkpoint::to_listed(&listed))
    })
}

fn create(server: &mut Server, id: &Id, params: CreateParams) -> Started {
    let name = wire::from_name(&params.checkpoint)?;
    let subject = subject(&params.chain, params.disks)?;
    run(server, id, params.monitor, move |monitor| async move {
        let listed = manage::create(&monitor.qmp, &subject, &name, params.granularity).await?;
        Ok(wire::checkpoint::to_listed(&listed))
    })
}

fn delete(server: &mut Server, id: &Id, params: DeleteParams) -> Started {
    let names = wire::from_names(&params.checkpoints)?;
    let subject = subject(&params.chain, params.disks)?;
    run(server, id, params.monitor, move |monitor| async move {
        let deleted = manage::delete(&monitor.qmp, &subject, &names).await?;
        Ok(DeleteResult { deleted })
    })
}

fn toggle(server: &mut Server, id: &Id, params: ToggleParams, on: bool) -> Started {
    let name = wire::from_name(&params.checkpoint)?;
    let subject = subject(&params.chain, params.disks)?;
    run(server, id, params.monitor, move |monitor| async move {
        let listed = if on {
            manage::enable(&monitor.qmp, &subject, &name).await?
        } else {
            manage::disable(&monitor.qmp, &subject, &name).await?
        };
        Ok(wire::checkpoint::to_listed(&listed))
    })
}

fn merge(server: &mut Server, id: &Id, params: MergeParams) -> Started {
    let name = wire::from_name(&params.checkpoint)?;
    let from = wire::from_names(&params.from)?;
    let subject = subject(&params.chain, params.disks)?;
    run(server, id, params.monitor, move |monitor| async move {
        let delete = params.delete_sources;
        let listed = manage::merge(&monitor.qmp, &subject, &name, &from, delete).await?;
        Ok(wire::checkpoint::to_listed(&listed))
    })
}

fn redefine(server: &mut Server, id: &Id, params: RedefineParams) -> Started {
    let chain = wire::from_name(&params.chain)?;
    let name = wire::from_name(&params.checkpoint)?;
    let words = params.disks.into_iter().map(wire::checkpoint::from_word);
    let words = words.collect::<std::result::Result<Vec<_>, _>>()?;
    let runtime_dir: PathBuf = server.config.runtime_dir.clone();
    run(server, id, params.monitor, move |monitor| async move {
        let grain = params.granularity;
        let redefined = redefine::redefine(
            &monitor.qmp,
            &monitor.server,
            &runtime_dir,
            &chain,
            &name,
            &words,
            grain,
        )
        .await?;
        Ok(wire::checkpoint::to_listed(&redefined))
    })
}

fn repair(server: &mut Server, id: &Id, params: RepairParams) -> Started {
    let scope = Scope {
        chain: wire::from_chain_choice(&params.chain, params.all_chains)?,
        names: None,
    };
    run(server, id, params.monitor, move |monitor| async move {
        let report = repair::repair(&monitor.qmp, params.disks.as_deref(), &scope).await?;
        Ok(wire::checkpoint::to_repaired(&report, &scope))
    })
}

/// Starts `backup.estimate`.
pub(crate) fn estimate(server: &mut Server, id: &Id, params: EstimateParams) -> Started {
    let wish = wire::from_estimate(&params)?;
    run(server, id, params.monitor, move |monitor| async move {
        let estimates = estimate::estimate(&monitor.qmp, &wish).await?;
        Ok(EstimateResult {
            disks: estimates.iter().map(wire::to_estimate).collect(),
        })
    })
}

fn subject(chain: &str, disks: Option<Vec<String>>) -> std::result::Result<Subject, WireError> {
    Ok(Subject {
        chain: wire::from_name(chain)?,
        disks,
    })
}
