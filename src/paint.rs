//! Dirty bitmaps with a given content.
//!
//! QEMU has no command that sets bits. A write does: so a `null-co` node of the
//! disk's size, which keeps nothing, gets a bitmap and is exported, and zeros are
//! written over what shall be dirty. Other bitmaps then merge it.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::extent::{Range, length, next_cut};
use crate::nbd::{Address, Client};
use crate::qemu::Qmp;
use crate::qemu::step::{self, Names};
use crate::server;
use crate::teardown::{Teardown, Undo};

/// Longest range of one request: fits compact headers.
const STEP: u64 = 1 << 30;

/// Most requests under way.
const WRITES: usize = 16;

/// How long QEMU gets to answer one request.
const NBD_DEADLINE: Duration = Duration::from_secs(60);

/// The bitmap's name on its node.
pub const BITMAP: &str = "painted";

/// A bitmap to be made.
#[derive(Clone, Debug)]
pub struct Canvas {
    /// The names of its objects, of the session that is given to [`paint`].
    pub names: Names,
    /// The disk that it is for.
    pub disk: String,
    /// The disk's bytes.
    pub size: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// What is dirty.
    pub ranges: Vec<Range>,
}

/// Makes the bitmaps [`BITMAP`] on nodes [`Names::canvas`]. They live until `teardown` runs.
///
/// # Errors
/// [`Kind::InvalidRequest`] for a range that is empty, or ends behind the disk's end;
/// [`Kind::NbdServerBusy`]; QEMU's and NBD's.
pub async fn paint(
    qmp: &Qmp,
    session: &str,
    canvases: &[Canvas],
    runtime_dir: &Path,
    teardown: &mut Teardown,
) -> Result<()> {
    for canvas in canvases {
        check(canvas)?;
    }
    if canvases.is_empty() {
        return Ok(());
    }
    let address = server::start(qmp, session, runtime_dir, canvases.len(), teardown).await?;
    for canvas in canvases {
        let painted = paint_one(qmp, canvas, &address, teardown).await;
        painted.map_err(|error| error.on_disk(canvas.disk.clone()))?;
    }
    Ok(())
}

fn check(canvas: &Canvas) -> Result<()> {
    for range in &canvas.ranges {
        if range.start >= range.end || range.end > canvas.size {
            return Err(
                Error::new(Kind::InvalidRequest, "reading the changed ranges")
                    .because(format!(
                        "the disk has {} bytes, and this range is {range:?}",
                        canvas.size
                    ))
                    .on_disk(canvas.disk.clone())
                    .at(range.start),
            );
        }
    }
    Ok(())
}

async fn paint_one(
    qmp: &Qmp,
    canvas: &Canvas,
    address: &Address,
    teardown: &mut Teardown,
) -> Result<()> {
    let names = &canvas.names;
    teardown.push(Undo::Node {
        node: names.canvas(),
    });
    qmp.execute_raw("blockdev-add", step::canvas(names, canvas.size))
        .await?;
    let add = step::add_bitmap(&names.canvas(), BITMAP, canvas.granularity, false, false);
    qmp.execute_raw("transaction", step::transaction(vec![add]))
        .await?;
    teardown.push(Undo::Export { id: names.job() });
    qmp.execute_raw("block-export-add", step::canvas_export(names))
        .await?;
    let client = Client::connect(address, &names.canvas(), None, NBD_DEADLINE).await?;
    let written = write(&client, canvas).await;
    client.close().await;
    written
}

async fn write(client: &Client, canvas: &Canvas) -> Result<()> {
    let mut tickets = VecDeque::new();
    for range in &canvas.ranges {
        let mut at = range.start;
        while at < range.end {
            if tickets.len() >= WRITES
                && let Some(oldest) = tickets.pop_front()
            {
                oldest.await?;
            }
            let cut = next_cut(at, STEP, range.end);
            tickets.push_back(
                client
                    .submit_write_zeroes(at, length(&(at..cut)), false)
                    .await?,
            );
            at = cut;
        }
    }
    for ticket in tickets {
        ticket.await?;
    }
    Ok(())
}
