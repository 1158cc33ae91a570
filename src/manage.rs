//! Checkpoints without a backup: look, plan, change all disks in one transaction,
//! look again.
//!
//! What is planned by the first look may be out of date when the transaction comes;
//! QEMU then refuses it as a whole, and nothing has changed.

use std::path::Path;
use std::time::Duration;

use crate::chain::Scope;
use crate::change::{self, Change, Made};
use crate::checkpoint::{GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::extent::Range;
use crate::join::{self, Changes, Point};
use crate::paint::{self, Canvas};
use crate::plan;
use crate::qemu::discover::{self, Disk};
use crate::qemu::{Qmp, step};
use crate::session::{new_id, now_ms};
use crate::teardown::Teardown;

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
/// [`Kind::UnknownDisk`], [`Kind::InvalidRequest`]; QEMU's, the monitor's.
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
/// it was [`Kind::MonitorClosed`] or [`Kind::QemuTimeout`].
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

/// What the host says of a disk.
#[derive(Clone, Debug)]
pub struct Word {
    /// The disk.
    pub disk: String,
    /// The identity that the host knows the point in time by; `None`: a new one.
    pub id: Option<Id>,
    /// When the point in time was; `None`: as of the checkpoint that is replaced, else now.
    pub time_ms: Option<u64>,
    /// What has changed since.
    pub changed: Changed,
}

/// What has changed on a disk.
#[derive(Clone, Debug)]
pub enum Changed {
    /// Everything.
    All,
    /// What its bitmaps of that name hold.
    Recorded,
    /// These ranges.
    Ranges(Vec<Range>),
}

/// Makes a checkpoint of the host's word. Ranges are written to nodes that keep
/// nothing but their dirty bitmaps, which become the checkpoint's.
///
/// # Errors
/// Those of [`join::redefine`] and [`paint::paint`]; as [`create`]. With
/// [`Error::leftovers`] where something could not be taken away again.
pub async fn redefine(
    qmp: &Qmp,
    chain: &Name,
    name: &Name,
    words: &[Word],
    granularity: Option<u64>,
    runtime_dir: &Path,
) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let ids: Vec<&str> = words.iter().map(|word| word.disk.as_str()).collect();
    let chosen = plan::choose(&disks, Some(&ids), Disk::is_trackable)?;
    if chosen.is_empty() {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because("there are none")
        );
    }
    let subject = Subject {
        chain: chain.clone(),
        disks: Some(words.iter().map(|word| word.disk.clone()).collect()),
    };
    let mut teardown = Teardown::default();
    let done = async {
        let pairs: Vec<(&Disk, &Word)> = chosen.into_iter().zip(words).collect();
        let canvas = |(disk, word): &(&Disk, &Word)| {
            let ranges = match &word.changed {
                Changed::Recorded => return None,
                Changed::All => Vec::from_iter((disk.size > 0).then_some(0..disk.size)),
                Changed::Ranges(ranges) => ranges.clone(),
            };
            Some(Canvas {
                disk: disk.id.clone(),
                size: disk.size,
                granularity: granularity.unwrap_or(GRANULARITY),
                ranges,
            })
        };
        let canvases: Vec<Canvas> = pairs.iter().filter_map(canvas).collect();
        // Before anything is made: what can be refused is refused.
        let planned = actions(
            &pairs,
            &made(&subject, name),
            granularity,
            &mut std::iter::empty(),
        )?;
        drop(planned);
        let mut painted = paint::paint(qmp, &canvases, runtime_dir, &mut teardown)
            .await?
            .into_iter();
        let actions = actions(&pairs, &made(&subject, name), granularity, &mut painted)?;
        let change = Change {
            disks: subject.disks.clone().unwrap_or_default(),
            actions,
        };
        apply(qmp, &subject, name, change).await
    };
    let done = done.await;
    let leftovers = teardown.run(qmp).await;
    match done {
        Ok(listed) => {
            for leftover in leftovers {
                tracing::warn!(leftover, "left behind by a redefinition");
            }
            Ok(listed)
        }
        Err(error) => Err(error.leaving(leftovers)),
    }
}

fn actions(
    pairs: &[(&Disk, &Word)],
    made: &Made<'_>,
    granularity: Option<u64>,
    painted: &mut dyn Iterator<Item = (String, String)>,
) -> Result<Vec<serde_json::Value>> {
    let mut actions = Vec::new();
    for (disk, word) in pairs {
        let changes = match &word.changed {
            Changed::Recorded => Changes::Recorded,
            Changed::All | Changed::Ranges(_) => {
                let (node, bitmap) = painted.next().unwrap_or_default();
                Changes::Painted(node, bitmap)
            }
        };
        let point = Point {
            id: word.id.clone().unwrap_or_else(new_id),
            time_ms: word.time_ms,
        };
        actions.extend(join::redefine(disk, made, point, &changes, granularity)?);
    }
    Ok(actions)
}

fn made<'a>(subject: &'a Subject, name: &'a Name) -> Made<'a> {
    Made {
        chain: &subject.chain,
        name,
        time_ms: now_ms(),
    }
}

async fn apply(qmp: &Qmp, subject: &Subject, name: &Name, change: Change) -> Result<Listed> {
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
