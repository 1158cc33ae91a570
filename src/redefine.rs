//! Checkpoints of the host's word: what changed since a point in time that QEMU does
//! not know. Ranges are painted first; then one transaction makes all of them.

use std::path::Path;

use crate::change::Change;
use crate::checkpoint::{GRANULARITY, Id, Name};
use crate::error::{Error, Kind, Result};
use crate::extent::Range;
use crate::join::{self, Changes, Point};
use crate::manage::{self, Listed, Subject};
use crate::nbd::Address;
use crate::paint::{self, Canvas};
use crate::plan;
use crate::qemu::Qmp;
use crate::qemu::discover::{self, Disk};
use crate::qemu::step::Names;
use crate::reclaim;
use crate::server::Server;
use crate::session::{new_id, random_id};
use crate::stake::Stake;
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

/// A bitmap that is to be painted for a disk.
#[derive(Debug)]
struct Painting {
    names: Names,
    disk: String,
    size: u64,
    granularity: u64,
    ranges: Vec<Range>,
}

impl Painting {
    async fn paint(self, qmp: &Qmp, address: &Address, teardown: &mut Teardown) -> Result<()> {
        let canvas = Canvas::open(
            qmp,
            &self.names,
            self.size,
            self.granularity,
            address,
            teardown,
        );
        let mut canvas = canvas.await?;
        for range in self.ranges {
            canvas.paint(range).await?;
        }
        canvas.finish().await
    }
}

/// Makes a checkpoint, or makes it anew, on the disks of `words`.
///
/// # Errors
/// Those of [`join::redefine`] and [`Canvas`]; [`Kind::InvalidRequest`] for no disk, or a
/// range that lies in none; [`Kind::NbdServerBusy`]; as [`manage::create`]. With [`Error::leftovers`] where something could not be
/// taken away again.
pub async fn redefine(
    qmp: &Qmp,
    server: &Server,
    runtime_dir: &Path,
    chain: &Name,
    name: &Name,
    words: &[Word],
    granularity: Option<u64>,
) -> Result<Listed> {
    // One of them may have QEMU's NBD server.
    reclaim::dead(qmp).await?;
    let disks = discover::disks(qmp).await?;
    let subject = Subject {
        chain: chain.clone(),
        disks: Some(words.iter().map(|word| word.disk.clone()).collect()),
    };
    let session = random_id();
    let (change, paintings) = plan(&disks, &subject, name, words, granularity, &session)?;
    let mut teardown = Teardown::default();
    let done = async {
        if !paintings.is_empty() {
            let mut stake = Stake::make(qmp, session, runtime_dir, &mut teardown).await?;
            let address = {
                let turn = qmp.turn().await;
                let dir = stake.server_dir();
                let address = server.join(&turn, dir, &mut teardown).await?;
                stake.uses(&turn, &address).await?;
                address
            };
            for painting in paintings {
                let disk = painting.disk.clone();
                let painted = painting.paint(qmp, &address, &mut teardown).await;
                painted.map_err(|error| error.on_disk(disk))?;
            }
        }
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
) -> Result<(Change, Vec<Painting>)> {
    let ids: Vec<&str> = words.iter().map(|word| word.disk.as_str()).collect();
    let chosen = plan::choose(disks, Some(&ids), Disk::is_trackable)?;
    if chosen.is_empty() {
        return Err(
            Error::new(Kind::InvalidRequest, "choosing the disks").because("there are none")
        );
    }
    let made = manage::made(subject, name);
    let mut change = Change::default();
    let mut paintings = Vec::new();
    for (index, (disk, word)) in chosen.into_iter().zip(words).enumerate() {
        let ranges = match &word.changed {
            Changed::Recorded => None,
            Changed::All => Some(Vec::from_iter((disk.size > 0).then_some(0..disk.size))),
            Changed::Ranges(ranges) => Some(ranges.clone()),
        };
        for range in ranges.iter().flatten() {
            paint::check(range, disk.size).map_err(|error| error.on_disk(disk.id.clone()))?;
        }
        let painting = ranges.map(|ranges| Painting {
            names: Names::new(session, index),
            disk: disk.id.clone(),
            size: disk.size,
            granularity: granularity.unwrap_or(GRANULARITY),
            ranges,
        });
        let changes = painting.as_ref().map_or(Changes::Recorded, |painting| {
            Changes::Painted(painting.names.canvas(), paint::BITMAP.to_owned())
        });
        let point = Point {
            id: word.id.clone().unwrap_or_else(new_id),
            time_ms: word.time_ms,
        };
        change.add(
            disk,
            join::redefine(disk, &made, point, &changes, granularity)?,
        );
        paintings.extend(painting);
    }
    Ok((change, paintings))
}
