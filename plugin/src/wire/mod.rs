//! Between the wire's words and the engine's: the only place that knows both.

pub(crate) mod checkpoint;
mod consistency;

use std::path::{Path, PathBuf};

use qemu_fleece_engine::checkpoint::{Checkpoint, FullReason as EngineReason, Id, Name};
use qemu_fleece_engine::estimate::Estimate;
use qemu_fleece_engine::image as engine_image;
use qemu_fleece_engine::plan::{Choice, DiskPlan, Wish};
use qemu_fleece_engine::qemu::discover::Disk;
use qemu_fleece_engine::room;
use qemu_fleece_engine::session::{Committed, Session, SessionDisk};
use qemu_fleece_engine::view::View;
use qemu_fleece_engine::{Error, Kind};
use qemu_fleece_protocol::backup::{
    BackupDisk, BeginParams, BeginResult, CommitResult, DiskChoice, DiskEstimate, EstimateParams,
    FullReason, Mode,
};
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::record::Begin;
use qemu_fleece_protocol::restore::Format;
use qemu_fleece_protocol::scratch::{OnFull, ScratchChoice, ScratchRoom};
use qemu_fleece_protocol::vm::{DiskInfo, Tracking};
use qemu_fleece_protocol::{Code, WireError};

pub(crate) use consistency::{from_consistency, to_reached};

/// The code of each kind.
fn code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidRequest => Code::InvalidParams,
        Kind::MonitorUnreachable => Code::MonitorUnreachable,
        Kind::MonitorBusy => Code::MonitorBusy,
        Kind::MonitorClosed => Code::MonitorClosed,
        Kind::MonitorProtocol => Code::MonitorProtocol,
        Kind::QemuTimeout => Code::QemuTimeout,
        Kind::QemuRefused => Code::QemuRefused,
        Kind::QemuUnsupported => Code::QemuUnsupported,
        Kind::AgentUnreachable => Code::AgentUnreachable,
        Kind::AgentRefused => Code::AgentRefused,
        Kind::ConsistencyLost => Code::ConsistencyLost,
        Kind::GuestHeld => Code::GuestHeld,
        Kind::NbdServerBusy => Code::NbdServerBusy,
        Kind::NbdUnreachable => Code::NbdUnreachable,
        Kind::NbdProtocol => Code::NbdProtocol,
        Kind::NbdClosed => Code::NbdClosed,
        Kind::NbdRefused => Code::NbdRefused,
        Kind::NbdTimeout => Code::NbdTimeout,
        Kind::UnknownSession => Code::UnknownBackup,
        Kind::SessionAlive => Code::BackupBusy,
        Kind::UnknownDisk => Code::UnknownDisk,
        Kind::DiskExcluded => Code::DiskExcluded,
        Kind::CheckpointExists => Code::CheckpointExists,
        Kind::UnknownCheckpoint => Code::UnknownCheckpoint,
        Kind::TooManyCheckpoints => Code::TooManyCheckpoints,
        Kind::CheckpointBusy => Code::CheckpointBusy,
        Kind::CheckpointUnusable => Code::CheckpointUnusable,
        Kind::BaseUnusable(_) => Code::BaseUnusable,
        Kind::ScratchUnavailable => Code::ScratchUnavailable,
        Kind::ScratchFull => Code::ScratchFull,
        Kind::PointInTimeLost => Code::PointInTimeLost,
        Kind::OffsetReleased => Code::OffsetReleased,
        Kind::StreamActive => Code::StreamActive,
        Kind::Incomplete => Code::Incomplete,
        Kind::TargetExists => Code::TargetExists,
        Kind::TargetUnwritable => Code::TargetUnwritable,
        Kind::TargetUnreachable => Code::TargetUnreachable,
        Kind::TargetRefused => Code::TargetRefused,
        Kind::TargetMismatch => Code::TargetMismatch,
        Kind::TargetFailed => Code::TargetFailed,
        Kind::TargetTimeout => Code::TargetTimeout,
        Kind::StorageDaemonFailed => Code::StorageDaemonFailed,
        Kind::StreamDamaged => Code::StreamDamaged,
        Kind::Cancelled => Code::Cancelled,
        Kind::Internal => Code::Internal,
    }
}

/// An engine's error, which has left `state`.
pub(crate) fn to_error(error: &Error, state: StateLeft) -> WireError {
    let mut wire = WireError::new(code(error.kind()), error.chain()).left(state);
    wire.data.disk = error.disk().map(str::to_owned);
    wire.data.offset = error.offset();
    wire.data.leftovers = error.leftovers().to_vec();
    if let Kind::BaseUnusable(reason) = error.kind() {
        wire.data.reason = Some(to_reason(reason));
    }
    wire
}

/// An engine's error of a stream or push of `view`, whose backup is open.
pub(crate) fn of_view(error: &Error, view: &View) -> WireError {
    to_error(error, left_of(view))
}

/// What is left of a view whose stream or push has failed.
pub(crate) fn left_of(view: &View) -> StateLeft {
    if view.is_spent() {
        StateLeft::DiskSpent
    } else {
        StateLeft::BackupOpen
    }
}

/// An engine's error that has left `state`, unless QEMU may have gone on behind it.
pub(crate) fn with_unknown(error: &Error, state: StateLeft) -> WireError {
    match error.kind() {
        Kind::MonitorClosed | Kind::QemuTimeout => to_error(error, StateLeft::Unknown),
        _ => to_error(error, state),
    }
}

/// An engine's error that has changed nothing.
pub(crate) fn unchanged(error: &Error) -> WireError {
    to_error(error, StateLeft::Unchanged)
}

fn to_reason(reason: EngineReason) -> FullReason {
    match reason {
        EngineReason::BaseMissing => FullReason::BaseMissing,
        EngineReason::BaseInconsistent => FullReason::BaseInconsistent,
        EngineReason::BaseNotRecording => FullReason::BaseNotRecording,
        EngineReason::BaseGap => FullReason::BaseGap,
        EngineReason::BaseMismatch => FullReason::BaseMismatch,
        EngineReason::BaseBusy => FullReason::BaseBusy,
        EngineReason::BitmapLost => FullReason::BitmapLost,
        EngineReason::OnBackingImage => FullReason::OnBackingImage,
        EngineReason::SizeChanged => FullReason::SizeChanged,
    }
}

pub(crate) fn from_name(text: &str) -> Result<Name, WireError> {
    Name::parse(text).map_err(|error| unchanged(&error))
}

/// Most names in one request.
const MAX_NAMES: usize = 1024;

pub(crate) fn from_names(names: &[String]) -> Result<Vec<Name>, WireError> {
    if names.len() > MAX_NAMES {
        let why = format!("there are more than {MAX_NAMES} names");
        return Err(WireError::new(Code::InvalidParams, why));
    }
    names.iter().map(|name| from_name(name)).collect()
}

fn from_id(text: &str) -> Result<Id, WireError> {
    Id::parse(text).map_err(|error| unchanged(&error))
}

/// A chain; `None`: every chain.
pub(crate) fn from_chain_choice(chain: &str, all: bool) -> Result<Option<Name>, WireError> {
    from_name(chain).map(|chain| (!all).then_some(chain))
}

fn from_choices(choices: Option<&[DiskChoice]>) -> Result<Option<Vec<Choice>>, WireError> {
    let name = |text: &Option<String>| text.as_deref().map(from_name).transpose();
    let choice = |choice: &DiskChoice| {
        Ok(Choice {
            disk: choice.disk.clone(),
            base: choice.base.as_ref().map(name).transpose()?,
            base_id: choice.base_id.as_deref().map(from_id).transpose()?,
        })
    };
    let choices = choices.map(|choices| choices.iter().map(choice).collect());
    choices.transpose()
}

pub(crate) fn from_begin(params: &BeginParams) -> Result<Wish, WireError> {
    Ok(Wish {
        chain: from_name(&params.chain)?,
        disks: from_choices(params.disks.as_deref())?,
        base: params.base.as_deref().map(from_name).transpose()?,
        checkpoint: params.checkpoint.as_deref().map(from_name).transpose()?,
        strict: params.strict,
        keep_unchanged: params.keep_unchanged,
        keep_ms: params.keep_ms,
    })
}

pub(crate) fn from_estimate(params: &EstimateParams) -> Result<Wish, WireError> {
    Ok(Wish {
        chain: from_name(&params.chain)?,
        disks: from_choices(params.disks.as_deref())?,
        base: params.base.as_deref().map(from_name).transpose()?,
        checkpoint: None,
        strict: false,
        keep_unchanged: false,
        keep_ms: 0,
    })
}

/// What the host says of scratch; `dir` is where it lies if it says nothing.
pub(crate) fn from_scratch(choice: ScratchChoice, dir: &Path) -> room::Wish {
    room::Wish {
        is_named: choice.dir.is_some(),
        dir: choice.dir.map_or_else(|| dir.to_owned(), PathBuf::from),
        disk_max_bytes: choice.disk_max_bytes,
        max_bytes: choice.max_bytes,
        min_free_bytes: choice.min_free_bytes,
        on_full: match choice.on_full {
            OnFull::GiveUp => room::OnFull::GiveUp,
            OnFull::Wait => room::OnFull::Wait,
        },
    }
}

fn to_tracking(disk: &Disk) -> Tracking {
    if disk.persistent_bitmaps {
        Tracking::Persistent
    } else {
        Tracking::Transient
    }
}

/// What has begun, but for what it is consistent with.
pub(crate) fn to_began(session: &Session) -> BeginResult {
    BeginResult {
        backup: session.id.clone(),
        time_ms: session.time_ms,
        consistency: None,
        scratch: ScratchRoom {
            free_bytes: session.room.free_bytes,
            asked_bytes: session.room.asked_bytes,
            most_bytes: session.room.most_bytes,
        },
        disks: session.disks().iter().map(to_backup_disk).collect(),
    }
}

fn to_mode(incremental: bool) -> Mode {
    if incremental {
        Mode::Incremental
    } else {
        Mode::Full
    }
}

fn to_backup_disk(disk: &SessionDisk) -> BackupDisk {
    let plan = &disk.plan;
    BackupDisk {
        disk: plan.disk.id.clone(),
        size: plan.disk.size,
        planned: to_mode(plan.wanted.is_some()),
        mode: to_mode(plan.base.is_some()),
        reason: plan.reason.map(to_reason),
        base: plan.base.as_ref().map(|base| base.name.to_string()),
        checkpoint: plan
            .checkpoint
            .as_ref()
            .map(|checkpoint| checkpoint.name.to_string()),
        checkpoint_id: plan.checkpoint.as_ref().and_then(id),
        tracking: to_tracking(&plan.disk),
        granularity: plan.granularity(),
        changed_bytes: disk.changed_bytes,
    }
}

/// The begin record of a disk's stream from offset 0.
pub(crate) fn to_stream_begin(disk: &SessionDisk) -> Begin {
    let BackupDisk {
        disk,
        size,
        mode,
        reason,
        base,
        checkpoint,
        granularity,
        ..
    } = to_backup_disk(disk);
    Begin {
        format: 1,
        disk,
        size,
        mode,
        reason,
        base,
        checkpoint,
        granularity,
        offset: 0,
    }
}

pub(crate) fn to_committed(committed: Committed) -> CommitResult {
    CommitResult {
        committed: committed.disks,
        deleted: committed.deleted,
        leftovers: committed.leftovers,
    }
}

pub(crate) fn to_disk(disk: &Disk) -> DiskInfo {
    DiskInfo {
        disk: disk.id.clone(),
        node: disk.node.clone(),
        format: disk.format.clone(),
        file: disk.file.clone(),
        size: disk.size,
        qdev: disk.qdev.clone(),
        iothread: disk.iothread.clone(),
        tracking: to_tracking(disk),
        excluded: disk.excluded.map(|reason| reason.name().to_owned()),
    }
}

fn id(checkpoint: &Checkpoint) -> Option<String> {
    checkpoint.id.as_ref().map(|id| id.as_str().to_owned())
}

pub(crate) fn to_estimate(estimate: &Estimate) -> DiskEstimate {
    let DiskPlan {
        disk,
        wanted,
        base,
        reason,
        ..
    } = &estimate.plan;
    DiskEstimate {
        disk: disk.id.clone(),
        size: disk.size,
        planned: to_mode(wanted.is_some()),
        mode: to_mode(base.is_some()),
        reason: reason.map(to_reason),
        base: base.as_ref().map(|base| base.name.to_string()),
        changed_bytes: estimate.changed_bytes,
        read_bytes: estimate.read_bytes,
    }
}

pub(crate) fn from_format(format: Format) -> engine_image::Format {
    match format {
        Format::Raw => engine_image::Format::Raw,
        Format::Qcow2 => engine_image::Format::Qcow2,
    }
}
