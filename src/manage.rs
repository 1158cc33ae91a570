//! Checkpoints without a backup: look, plan, change all disks in one transaction,
//! look again.
//!
//! What is planned by the first look may be out of date when the transaction comes;
//! QEMU then refuses it as a whole, and nothing has changed.

use std::time::Duration;

use crate::chain::Scope;
use crate::change::{self, Change, Made};
use crate::checkpoint::Name;
use crate::error::Result;
use crate::join;
use crate::plan;
use crate::qemu::discover::{self, Disk};
use crate::qemu::{Qmp, step};
use crate::session::{new_id, now_ms};

/// How long the transaction may take: it waits for guest I/O that is under way.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(60);

/// What a request is about.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The chain.
    pub chain: Name,
    /// The disks, by id; `None`: all that it can mean.
    pub disks: Option<Vec<String>>,
}

impl Subject {
    fn ids(&self) -> Option<Vec<&str>> {
        let disks = self.disks.as_ref()?;
        Some(disks.iter().map(String::as_str).collect())
    }
}

/// Disks as they are now, and what of them is to be told.
#[derive(Clone, Debug)]
pub struct Listed {
    /// All disks.
    pub all: Vec<Disk>,
    /// The ids of those that are to be told; `None`: all.
    pub told: Option<Vec<String>>,
    /// Of which checkpoints.
    pub scope: Scope,
}

/// Looks.
///
/// # Errors
/// [`UnknownDisk`](crate::Kind::UnknownDisk), [`InvalidRequest`](crate::Kind::InvalidRequest);
/// QEMU's, the monitor's.
pub async fn list(qmp: &Qmp, disks: Option<Vec<String>>, scope: Scope) -> Result<Listed> {
    let all = discover::disks(qmp).await?;
    if let Some(disks) = &disks {
        let ids: Vec<&str> = disks.iter().map(String::as_str).collect();
        plan::choose(&all, Some(&ids), |_| true)?;
    }
    Ok(Listed {
        all,
        told: disks,
        scope,
    })
}

/// Makes a checkpoint.
///
/// # Errors
/// Those of [`change::create`]; QEMU's and the monitor's: nothing has changed, unless
/// it was [`MonitorClosed`](crate::Kind::MonitorClosed) or
/// [`QemuTimeout`](crate::Kind::QemuTimeout).
pub async fn create(
    qmp: &Qmp,
    subject: &Subject,
    name: &Name,
    granularity: Option<u64>,
) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let made = made(subject, name);
    let change = change::create(
        &disks,
        subject.ids().as_deref(),
        &made,
        granularity,
        &new_id,
    )?;
    apply(qmp, subject, name, change).await
}

/// Deletes checkpoints: what is gone, as `disk/checkpoint`.
///
/// # Errors
/// Those of [`change::delete`]; as [`create`].
pub async fn delete(qmp: &Qmp, subject: &Subject, names: &[Name]) -> Result<Vec<String>> {
    let disks = discover::disks(qmp).await?;
    let (deleted, change) =
        change::delete(&disks, subject.ids().as_deref(), &subject.chain, names)?;
    transact(qmp, change.actions).await?;
    Ok(deleted)
}

/// Stops a checkpoint's recording.
///
/// # Errors
/// Those of [`change::disable`]; as [`create`].
pub async fn disable(qmp: &Qmp, subject: &Subject, name: &Name) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let change = change::disable(&disks, subject.ids().as_deref(), &subject.chain, name)?;
    apply(qmp, subject, name, change).await
}

/// Lets a checkpoint record again.
///
/// # Errors
/// Those of [`change::enable`]; as [`create`].
pub async fn enable(qmp: &Qmp, subject: &Subject, name: &Name) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let change = change::enable(&disks, subject.ids().as_deref(), &subject.chain, name)?;
    apply(qmp, subject, name, change).await
}

/// Joins checkpoints `from` into `name`.
///
/// # Errors
/// Those of [`join::merge`]; as [`create`].
pub async fn merge(
    qmp: &Qmp,
    subject: &Subject,
    name: &Name,
    from: &[Name],
    delete_sources: bool,
) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let made = made(subject, name);
    let change = join::merge(
        &disks,
        subject.ids().as_deref(),
        &made,
        from,
        delete_sources,
    )?;
    apply(qmp, subject, name, change).await
}

pub(crate) fn made<'a>(subject: &'a Subject, name: &'a Name) -> Made<'a> {
    Made {
        chain: &subject.chain,
        name,
        time_ms: now_ms(),
    }
}

/// Does it, and looks again.
pub(crate) async fn apply(
    qmp: &Qmp,
    subject: &Subject,
    name: &Name,
    change: Change,
) -> Result<Listed> {
    transact(qmp, change.actions).await?;
    let scope = Scope {
        chain: Some(subject.chain.clone()),
        names: Some(vec![name.clone()]),
    };
    list(qmp, Some(change.disks), scope).await
}

async fn transact(qmp: &Qmp, actions: Vec<serde_json::Value>) -> Result<()> {
    if actions.is_empty() {
        return Ok(());
    }
    let transaction = step::transaction(actions);
    qmp.execute_raw_within("transaction", transaction, TRANSACTION_DEADLINE)
        .await
        .map(drop)
}
