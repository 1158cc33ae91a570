//! Checkpoints of the host's word: what changed since a point in time that QEMU does
//! not know. Ranges are painted first; then one transaction makes all of them.

use std::path::Path;

use crate::change::Change;
use crate::checkpoint::{GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::extent::Range;
use crate::join::{self, Changes, Point};
use crate::manage::{self, Listed, Subject};
use crate::paint::{self, Canvas};
use crate::plan;
use crate::qemu::Qmp;
use crate::qemu::discover::{self, Disk};
use crate::qemu::step::Names;
use crate::session::{new_id, random_id};
use crate::teardown::Teardown;

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

/// Makes a checkpoint, or makes it anew, on the disks of `words`.
///
/// # Errors
/// Those of [`join::redefine`] and [`paint::paint`]; [`Kind::InvalidRequest`] for no
/// disk; as [`manage::create`]. With [`Error::leftovers`] where something could not be
/// taken away again.
pub async fn redefine(
    qmp: &Qmp,
    chain: &Name,
    name: &Name,
    words: &[Word],
    granularity: Option<u64>,
    runtime_dir: &Path,
) -> Result<Listed> {
    let disks = discover::disks(qmp).await?;
    let subject = Subject {
        chain: chain.clone(),
        disks: Some(words.iter().map(|word| word.disk.clone()).collect()),
    };
    let session = random_id();
    let (change, canvases) = plan(&disks, &subject, name, words, granularity, &session)?;
    let mut teardown = Teardown::default();
    let done = async {
        paint::paint(qmp, &session, &canvases, runtime_dir, &mut teardown).await?;
        manage::apply(qmp, &subject, name, change).await
    };
    let done = done.await;
    let leftovers = teardown.run(qmp).await;
    for leftover in &leftovers {
        tracing::warn!(leftover, "left behind by a redefinition");
    }
    done.map_err(|error| error.leaving(leftovers))
}

fn plan(
    disks: &[Disk],
    subject: &Subject,
    name: &Name,
    words: &[Word],
    granularity: Option<u64>,
    session: &str,
) -> Result<(Change, Vec<Canvas>)> {
    let ids: Vec<&str> = words.iter().map(|word| word.disk.as_str()).collect();
    let chosen = plan::choose(disks, Some(&ids), Disk::is_trackable)?;
    if chosen.is_empty() {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because("there are none")
        );
    }
    let made = manage::made(subject, name);
    let mut change = Change::default();
    let mut canvases = Vec::new();
    for (index, (disk, word)) in chosen.into_iter().zip(words).enumerate() {
        let ranges = match &word.changed {
            Changed::Recorded => None,
            Changed::All => Some(Vec::from_iter((disk.size > 0).then_some(0..disk.size))),
            Changed::Ranges(ranges) => Some(ranges.clone()),
        };
        let canvas = ranges.map(|ranges| Canvas {
            names: Names::new(session, index),
            disk: disk.id.clone(),
            size: disk.size,
            granularity: granularity.unwrap_or(GRANULARITY),
            ranges,
        });
        let changes = canvas.as_ref().map_or(Changes::Recorded, |canvas| {
            Changes::Painted(canvas.names.canvas(), paint::BITMAP.to_owned())
        });
        let point = Point {
            id: word.id.clone().unwrap_or_else(new_id),
            time_ms: word.time_ms,
        };
        change.add(
            disk,
            join::redefine(disk, &made, point, &changes, granularity)?,
        );
        canvases.extend(canvas);
    }
    Ok((change, canvases))
}
