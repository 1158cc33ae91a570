//! What each method does: `dispatch` starts it, `apply` takes over what it made.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use qemu_fleece_engine::begin::Begun;
use qemu_fleece_engine::restore::{Restore, Target};
use qemu_fleece_engine::session::{Session, random_id};
use qemu_fleece_engine::{Error, inspect};
use qemu_fleece_protocol::backup::{
    AbortParams, AbortResult, AckParams, AckResult, CommitParams, CommitResult, ReadParams,
};
use qemu_fleece_protocol::envelope::Request;
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::hello::{
    CancelParams, CancelResult, Carrier, HelloParams, HelloResult, Implementation, Limits,
    NoParams, PingResult,
};
use qemu_fleece_protocol::restore::{
    RestoreBeginParams, RestoreBeginResult, RestoreParams, RestoreWriteParams,
};
use qemu_fleece_protocol::vm::{InspectParams, InspectResult};
use qemu_fleece_protocol::{
    Code, Id, MAX_CHECKPOINTS, MAX_EXTENTS, MAX_LINE_BYTES, MAX_NAME_BYTES, MAX_PAYLOAD_BYTES,
    MAX_REQUESTS, Record, VERSION, WireError,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::backups::Ended;
use crate::monitors::Monitor;
use crate::restores::{self, Answer, Order};
use crate::serve::{Done, Server};
use crate::stream::{self, Stream};
use crate::{begins, checkpoints, exports, pushes, wire};

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Only an answer.
    Reply(Result<Box<RawValue>, WireError>),
    /// Open backups, each with its monitor.
    Began(Begun, Vec<Arc<Monitor>>, begins::Together),
    /// A backup that was taken over.
    Attached(Box<Session>, Arc<Monitor>),
    /// A backup that was to be committed has ended.
    Committed(String, Result<CommitResult, WireError>),
    /// A backup has ended.
    Aborted(String, AbortResult),
    /// An open restore.
    Restoring(String, mpsc::Sender<Order>),
    /// A restore has ended.
    Restored(String, Result<Box<RawValue>, WireError>),
}

pub(crate) type Started = Result<Option<Outcome>, WireError>;

/// Starts a request: an outcome at once, or `None` when a task brings it.
pub(crate) fn dispatch(
    server: &mut Server,
    request: &Request,
    payload: Option<Vec<u8>>,
) -> Started {
    if server.carrier.is_none() != (request.method == "hello") {
        let why = "the first request is hello, and only the first";
        return Err(WireError::new(Code::HelloExpected, why));
    }
    if payload.is_some() && request.method != "restore.write" {
        let why = format!("{} takes no payload", request.method);
        return Err(WireError::new(Code::InvalidPayload, why));
    }
    match request.method.as_str() {
        "hello" => hello(server, request.params()?),
        "ping" => {
            let NoParams {} = request.params()?;
            now(PingResult {})
        }
        "cancel" => cancel(server, &request.params()?),
        "shutdown" => {
            let NoParams {} = request.params()?;
            server.shut_down(request.id.clone());
            Ok(None)
        }
        "vm.inspect" => Ok(inspect_vm(server, &request.id, request.params()?)),
        "backup.estimate" => checkpoints::estimate(server, &request.id, request.params()?),
        "backup.begin" => begins::begin(server, &request.id, request.params()?),
        "backup.begin_group" => begins::begin_group(server, &request.id, request.params()?),
        "backup.attach" => Ok(begins::attach(server, &request.id, request.params()?)),
        "reclaim" => begins::reclaim(server, &request.id, request.params()?),
        "backup.read" => backup_read(server, &request.id, request.params()?),
        "backup.push" => pushes::push(server, &request.id, request.params()?),
        "backup.export" => exports::export(server, &request.id, request.params()?),
        "backup.map" => exports::map(server, &request.id, &request.params()?),
        "backup.ack" => backup_ack(server, &request.id, request.params()?),
        "backup.commit" => backup_commit(server, &request.id, request.params()?),
        "backup.abort" => backup_abort(server, &request.id, request.params()?),
        "restore.begin" => Ok(restore_begin(server, &request.id, request.params()?)),
        "restore.write" => restore_write(server, &request.id, request.params()?, payload),
        "restore.finish" => restore_order(server, &request.id, request.params()?, Order::Finish),
        "restore.abort" => restore_order(server, &request.id, request.params()?, Order::Abort),
        method => match method.strip_prefix("checkpoint.") {
            Some(method) => checkpoints::dispatch(server, request, method),
            None => Err(WireError::new(
                Code::MethodNotFound,
                format!("there is no method {method:?}"),
            )),
        },
    }
}

/// Takes over what a request has made; returns its answer.
pub(crate) fn apply(server: &mut Server, outcome: Outcome) -> Result<Box<RawValue>, WireError> {
    match outcome {
        Outcome::Reply(reply) => reply,
        Outcome::Began(begun, monitors, together) => {
            begins::began(server, begun, monitors, together)
        }
        Outcome::Attached(session, monitor) => begins::attached(server, *session, monitor),
        Outcome::Committed(id, result) => {
            let ended = result.clone().map_or(Ended::Failed, Ended::Committed);
            server.backups.end(id, ended);
            result.and_then(to_raw)
        }
        Outcome::Aborted(id, result) => {
            server.backups.end(id, Ended::Aborted(result.clone()));
            to_raw(result)
        }
        Outcome::Restoring(restore, orders) => {
            server.restores.insert(restore.clone(), orders);
            to_raw(RestoreBeginResult { restore })
        }
        Outcome::Restored(restore, reply) => {
            server.restores.remove(&restore);
            reply
        }
    }
}

pub(crate) fn to_raw<T: Serialize>(result: T) -> Result<Box<RawValue>, WireError> {
    to_raw_value(&result).map_err(|error| WireError::new(Code::Internal, error.to_string()))
}

fn now<T: Serialize>(result: T) -> Started {
    Ok(Some(Outcome::Reply(to_raw(result))))
}

pub(crate) fn spawn(
    server: &mut Server,
    id: &Id,
    work: impl Future<Output = Outcome> + Send + 'static,
) -> Option<Outcome> {
    let id = id.clone();
    server.tasks.spawn(async move {
        Done {
            id,
            outcome: work.await,
        }
    });
    None
}

fn hello(server: &mut Server, params: HelloParams) -> Started {
    if !params.protocols.contains(&VERSION) {
        let why = format!("protocol {VERSION} is the only one here");
        let mut error = WireError::new(Code::VersionUnsupported, why);
        error.data.supported = vec![VERSION];
        return Err(error);
    }
    tracing::info!(host = params.host.name, version = params.host.version, carrier = ?params.carrier, "hello");
    server.carrier = Some(params.carrier);
    now(HelloResult {
        protocol: VERSION,
        plugin: Implementation {
            name: "qemu-fleece".into(),
            version: env!("CARGO_PKG_VERSION").into(),
        },
        carrier: params.carrier,
        carriers: vec![Carrier::Inline, Carrier::Framed],
        features: Vec::new(),
        limits: Limits {
            max_line_bytes: MAX_LINE_BYTES as u64,
            max_payload_bytes: MAX_PAYLOAD_BYTES,
            max_requests: MAX_REQUESTS as u64,
            max_name_bytes: MAX_NAME_BYTES as u64,
            max_checkpoints: MAX_CHECKPOINTS as u64,
            max_extents: MAX_EXTENTS as u64,
        },
    })
}

fn cancel(server: &Server, params: &CancelParams) -> Started {
    let found = server.open.get(&params.id);
    if let Some(token) = found {
        token.cancel();
    }
    now(CancelResult {
        found: found.is_some(),
    })
}

fn inspect_vm(server: &mut Server, id: &Id, params: InspectParams) -> Option<Outcome> {
    let monitors = server.monitors.clone();
    spawn(server, id, async move {
        let inspected = async {
            let monitor = monitors.get(&params.monitor).await?;
            inspect::inspect(&monitor.qmp).await
        };
        Outcome::Reply(match inspected.await {
            Err(error) => Err(wire::unchanged(&error)),
            Ok(vm) => to_raw(InspectResult {
                qemu_version: vm.version,
                name: vm.name,
                uuid: vm.uuid,
                status: vm.status,
                disks: vm.disks.iter().map(wire::to_disk).collect(),
                our_objects: vm.our_objects,
            }),
        })
    })
}

/// Spawns a request that streams from a backup: it may wait for standard output, and ends
/// with the backup.
pub(crate) fn stream<F>(
    server: &mut Server,
    id: &Id,
    over: CancellationToken,
    work: impl FnOnce(Id, CancellationToken) -> F,
) -> Option<Outcome>
where
    F: Future<Output = Result<Box<RawValue>, WireError>> + Send + 'static,
{
    let cancel = server.token(id);
    let work = work(id.clone(), cancel.clone());
    let id = id.clone();
    link(over, cancel.clone());
    server.streams.spawn(async move {
        let reply = work.await;
        cancel.cancel();
        Done {
            id,
            outcome: Outcome::Reply(reply),
        }
    });
    None
}

/// The end of a backup cancels what works on it; that token also ends this.
pub(crate) fn link(over: CancellationToken, cancel: CancellationToken) {
    tokio::spawn(async move {
        tokio::select! {
            () = over.cancelled() => cancel.cancel(),
            () = cancel.cancelled() => {}
        }
    });
}

fn backup_read(server: &mut Server, id: &Id, params: ReadParams) -> Started {
    let cut = stream::check(&params)?;
    let backup = server.backups.get(&params.backup)?;
    let view = backup.view(&params.disk)?;
    let disk = backup.disk(&params.disk)?;
    let (begin, marks) = (disk.begin.clone(), Arc::clone(&disk.marks));
    let over = backup.session.over();
    let (carrier, outlet) = (server.carrier.unwrap_or_default(), server.outlet.clone());
    Ok(stream(server, id, over, move |id, cancel| {
        let stream = Stream {
            id,
            begin,
            view,
            carrier,
            outlet,
            cancel,
        };
        async move {
            stream::run(stream, marks, params, cut)
                .await
                .and_then(to_raw)
        }
    }))
}

fn backup_ack(server: &mut Server, id: &Id, params: AckParams) -> Started {
    let backup = server.backups.get(&params.backup)?;
    let view = backup.view(&params.disk)?;
    let marks = &backup.disk(&params.disk)?.marks;
    let active = |error: Error| wire::to_error(&error, StateLeft::BackupOpen);
    let (released, resume) = if view.check_release().map_err(active)? {
        let released = view.release(params.offset.min(view.size()));
        let released = released.map_err(active)?;
        let resume = released.offset;
        (released, resume)
    } else {
        let place = marks
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .acknowledge(params.offset);
        let released = view.acknowledge(place.offset(), place.save());
        (released.map_err(active)?, place.offset())
    };
    Ok(spawn(server, id, async move {
        // First, so that a process that takes over never counts on what is gone.
        view.remember().await;
        view.give_back(released).await;
        Outcome::Reply(to_raw(AckResult { resume }))
    }))
}

fn backup_commit(server: &mut Server, id: &Id, params: CommitParams) -> Started {
    let delete = wire::from_names(&params.delete_checkpoints)?;
    if let Some(Ended::Committed(result)) = server.backups.how_ended(&params.backup) {
        return now(result.clone());
    }
    let backup = server.backups.get(&params.backup)?;
    let checked = backup.session.check_commit(params.disks.as_deref());
    checked.map_err(|error| wire::to_error(&error, StateLeft::BackupOpen))?;
    let backup = server.backups.take(&params.backup)?;
    Ok(spawn(server, id, async move {
        let committed = backup
            .session
            .commit(params.disks.as_deref(), &delete)
            .await;
        let result = committed
            .map(wire::to_committed)
            .map_err(|error| wire::with_unknown(&error, StateLeft::Aborted));
        Outcome::Committed(params.backup, result)
    }))
}

fn backup_abort(server: &mut Server, id: &Id, params: AbortParams) -> Started {
    if let Some(Ended::Aborted(result)) = server.backups.how_ended(&params.backup) {
        return now(result.clone());
    }
    let backup = server.backups.take(&params.backup)?;
    Ok(spawn(server, id, async move {
        let leftovers = backup.session.abort().await;
        Outcome::Aborted(params.backup, AbortResult { leftovers })
    }))
}

fn restore_begin(server: &mut Server, id: &Id, params: RestoreBeginParams) -> Option<Outcome> {
    let config = server.config.clone();
    let target = Target {
        path: PathBuf::from(&params.target),
        format: wire::from_format(params.format),
        size: params.size,
    };
    spawn(server, id, async move {
        match Restore::begin(target, &config.storage_daemon, &config.runtime_dir).await {
            Ok(restore) => Outcome::Restoring(random_id(), restores::spawn(restore, params.target)),
            Err(error) => Outcome::Reply(Err(wire::unchanged(&error))),
        }
    })
}

fn restore_write(
    server: &mut Server,
    id: &Id,
    params: RestoreWriteParams,
    payload: Option<Vec<u8>>,
) -> Started {
    let bytes =
        match (server.carrier, payload, &params.data) {
            (Some(Carrier::Framed), payload, None) => payload,
            (Some(Carrier::Inline), None, Some(text)) => {
                let decoded = base64_simd::STANDARD.decode_to_vec(text);
                Some(decoded.map_err(|_error| {
                    WireError::new(Code::InvalidPayload, "`data` is not base64")
                })?)
            }
            (_, None, None) => None,
            _ => {
                return Err(WireError::new(
                    Code::InvalidPayload,
                    "the bytes do not travel as the hello agreed",
                ));
            }
        };
    let expected = match &params.record {
        Record::Data { length, .. } => *length,
        _ => 0,
    };
    let found = bytes.as_ref().map_or(0, Vec::len) as u64;
    if found != expected || found > MAX_PAYLOAD_BYTES {
        let why = format!(
            "the record has {expected} bytes, at most {MAX_PAYLOAD_BYTES}, and {found} came with it"
        );
        return Err(WireError::new(Code::InvalidPayload, why));
    }
    let (record, restore) = (
        params.record,
        RestoreParams {
            restore: params.restore,
        },
    );
    restore_order(server, id, restore, |answer| {
        Order::Write(record, bytes, answer)
    })
}

fn restore_order(
    server: &mut Server,
    id: &Id,
    params: RestoreParams,
    order: impl FnOnce(Answer) -> Order,
) -> Started {
    let unknown = || {
        WireError::new(
            Code::UnknownRestore,
            "there is no such restore, or it has ended",
        )
    };
    let orders = server.restores.get(&params.restore).ok_or_else(unknown)?;
    let (answer, answered) = oneshot::channel();
    let order = order(answer);
    let last = !matches!(order, Order::Write(..));
    orders.try_send(order).map_err(|_closed| unknown())?;
    Ok(spawn(server, id, async move {
        let reply = answered.await.unwrap_or_else(|_dropped| Err(unknown()));
        // Whatever error ended it: the task is gone.
        if last || reply.is_err() {
            Outcome::Restored(params.restore, reply)
        } else {
            Outcome::Reply(reply)
        }
    }))
}
