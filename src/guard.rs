//! The guard of a session's scratch: it warns, and lets the guest go on when there is no room.
//!
//! ```text
//! QEMU: BLOCK_WRITE_THRESHOLD ----> Notice::High
//!       BLOCK_IO_ERROR, STOP -----> whose scratch is full?  nobody's: not ours to touch
//!         give up: the disk's job is cancelled, its room freed, cont -----> Notice::GivenUp
//!         wait:    until there is room (released by the host, or made), cont -> Notice::Resumed
//! tick: all scratch together over its limit ----> the largest is given up
//!       QEMU has given one up by itself --------> its room freed -----> Notice::GivenUp
//! ```
//! An event is an occasion to look: what QEMU says of its devices decides.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use qapi::qmp::cont;
use serde_json::json;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::error::{Error, Kind, Result};
use crate::file_call::{self, Held};
use crate::qemu::{Event, Qmp, job, query};
use crate::room::{OnFull, Room, Wish};
use crate::standstill::{is_full, is_stopped};
use crate::view::View;

/// How long a file system gets to tell what is free.
const LOOKED_AT_SOON: Duration = Duration::from_secs(2);

/// How often scratch is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long giving up a disk may take.
const GIVE_UP_DEADLINE: Duration = Duration::from_secs(10);

/// The part of a disk's room after which a warning comes: three in four.
const HIGH: (u64, u64) = (3, 4);

/// How long after a disk was given up a guest is told to have stopped for want of its scratch.
const TOLD_LATE: Duration = Duration::from_secs(5);

/// Room that has to be free again before a guest that stands still goes on.
const ENOUGH: u64 = 4 * 1024 * 1024;

/// Notices that wait to be taken.
pub const NOTICES: usize = 64;

/// What happened to the scratch of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The disk.
    pub disk: String,
    /// What.
    pub what: What,
    /// Bytes that it takes.
    pub scratch_bytes: u64,
    /// How long the guest stood still, as far as that is over.
    pub paused: Option<Duration>,
}

/// What can happen to scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It has come near its limit.
    High,
    /// It is full, and the guest stands still.
    Full,
    /// The disk's point in time was given up: it can no more be read.
    GivenUp,
    /// There is room again, and the guest goes on.
    Resumed,
}

/// A guard.
#[derive(Debug)]
pub struct Guard {
    qmp: Qmp,
    views: Vec<Arc<View>>,
    wish: Wish,
    room: Room,
    events: broadcast::Receiver<Event>,
    notices: mpsc::Sender<Notice>,
    /// When the guest was seen to stand still, and the disks whose scratch was full.
    stopped: Option<(Instant, Vec<Arc<View>>)>,
    /// When a disk was given up last.
    gave_up: Option<Instant>,
    /// The disks that were given up.
    given_up: HashSet<String>,
    /// The directory of scratch, held open to tell what is free there.
    dir: Option<Held>,
}

impl Guard {
    pub(crate) fn new(
        qmp: Qmp,
        views: Vec<Arc<View>>,
        wish: Wish,
        room: Room,
        notices: mpsc::Sender<Notice>,
    ) -> Self {
        Self {
            events: qmp.events(),
            qmp,
            views,
            wish,
            room,
            notices,
            stopped: None,
            gave_up: None,
            given_up: HashSet::new(),
            dir: None,
        }
    }

    /// Watches until `over`, or until QEMU is gone.
    pub async fn run(mut self, over: CancellationToken) {
        self.arm().await;
        // Nobody has listened so far.
        let mut looked = self.look().await;
        self.dir = self.open_dir().await;
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Err(error) = looked {
                warn!(error = error.chain(), "could not look after scratch");
            }
            looked = tokio::select! {
                () = over.cancelled() => return,
                _ = tick.tick() => self.measure().await,
                event = self.events.recv() => match event {
                    Ok(event) => self.heed(&event).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => self.look().await,
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            };
        }
    }

    /// Nobody will watch any more: a guest that stands still waits for nothing.
    pub(crate) async fn leave(mut self) {
        self.wish.on_full = OnFull::GiveUp;
        if let Err(error) = self.look().await {
            warn!(error = error.chain(), "a guest may stand still");
        }
    }

    /// Where what is free there counts at all.
    async fn open_dir(&self) -> Option<Held> {
        if self.wish.on_full == OnFull::GiveUp && !self.views.iter().any(|view| view.can_break()) {
            return None;
        }
        let dir = self.wish.dir.clone();
        let open = move || {
            File::open(&dir).map_err(|error| {
                Error::new(Kind::ScratchUnavailable, "opening its directory").because(error)
            })
        };
        let opened = file_call::within(LOOKED_AT_SOON, open).await;
        opened.ok().map(Held::new)
    }

    /// Bytes that are free where scratch lies; 0 when that cannot be told.
    async fn free_bytes(&self) -> u64 {
        let Some(dir) = &self.dir else { return 0 };
        let look = |dir: &File| Ok(rustix::fs::fstatvfs(dir)?);
        let looked = dir.call(LOOKED_AT_SOON, look).await;
        looked.map_or(0, |system| system.f_bavail.saturating_mul(system.f_frsize))
    }

    /// Has QEMU say when a disk's scratch comes near what it may take.
    async fn arm(&self) {
        let limit = self
            .wish
            .cap()
            .unwrap_or(u64::MAX)
            .min(self.room.free_bytes);
        let at = limit / HIGH.1 * HIGH.0;
        for view in &self.views {
            let node = view.names().scratch_file();
            let threshold = json!({"node-name": node, "write-threshold": at});
            let set = self.qmp.execute_raw("block-set-write-threshold", threshold);
            if let Err(error) = set.await {
                warn!(
                    disk = view.disk(),
                    error = error.chain(),
                    "no early warning"
                );
            }
        }
    }

    async fn heed(&mut self, event: &Event) -> Result<()> {
        match event.name.as_str() {
            "BLOCK_WRITE_THRESHOLD" => {
                let node = &event.data["node-name"];
                let of = self
                    .views
                    .iter()
                    .find(|view| *node == view.names().scratch_file());
                if let Some(view) = of.cloned() {
                    self.tell(&view, What::High, None).await;
                }
                Ok(())
            }
            "BLOCK_IO_ERROR" | "STOP" => self.look().await,
            _ => Ok(()),
        }
    }

    /// Whether a guest stands still for want of our scratch, and what is done.
    async fn look(&mut self) -> Result<()> {
        if !is_stopped(&self.qmp).await? {
            return Ok(());
        }
        let devices = query::block_devices(&self.qmp).await?;
        let is_full = |view: &&Arc<View>| {
            let filter = view.names().filter();
            devices.iter().any(|device| is_full(device, &filter))
        };
        let full: Vec<Arc<View>> = self.views.iter().filter(is_full).cloned().collect();
        if full.is_empty() {
            // Given up already, if it is ours: what is left is to go on.
            let is_late = |at: Instant| at.elapsed() < TOLD_LATE;
            if self.stopped.is_some() || self.gave_up.is_some_and(is_late) {
                self.go_on(&[], What::GivenUp).await?;
            }
            return Ok(());
        }
        let (since, mut known) = self.stopped.take().unwrap_or((Instant::now(), Vec::new()));
        for view in &full {
            if !known.iter().any(|one| Arc::ptr_eq(one, view)) {
                self.tell(view, What::Full, None).await;
                known.push(Arc::clone(view));
            }
        }
        self.stopped = Some((since, known));
        if self.wish.on_full == OnFull::Wait {
            return Ok(());
        }
        for view in &full {
            self.give_up(view).await?;
        }
        self.go_on(&full, What::GivenUp).await
    }

    /// Lets a guest that waits go on, once there is room.
    async fn wait(&mut self) -> Result<()> {
        let Some((_, waiting)) = self.stopped.clone() else {
            return Ok(());
        };
        if self.has_room(&waiting).await {
            return self.go_on(&waiting, What::Resumed).await;
        }
        Ok(())
    }

    async fn has_room(&self, full: &[Arc<View>]) -> bool {
        let cap = self.wish.cap().unwrap_or(u64::MAX);
        let enough = ENOUGH.min(cap / 4);
        for view in full {
            if view.scratch_bytes().await > cap - enough {
                return false;
            }
        }
        self.free_bytes().await >= enough
    }

    async fn go_on(&mut self, views: &[Arc<View>], what: What) -> Result<()> {
        self.qmp.execute(&cont {}).await?;
        let paused = self.stopped.take().map(|(since, _)| since.elapsed());
        for view in views {
            self.tell(view, what, paused).await;
        }
        Ok(())
    }

    /// What QEMU has given up by itself: it tells nobody.
    async fn find_broken(&mut self) -> Result<()> {
        for view in self.views.clone() {
            if !view.can_break() || self.given_up.contains(view.disk()) {
                continue;
            }
            // Whoever reads it may have found out.
            if view.is_lost() || self.has_broken(&view).await {
                self.give_up(&view).await?;
                self.tell(&view, What::GivenUp, None).await;
            }
        }
        Ok(())
    }

    async fn has_broken(&self, view: &View) -> bool {
        let cap = self.wish.cap().unwrap_or(u64::MAX);
        let is_short = view.scratch_bytes().await > cap.saturating_sub(ENOUGH)
            || self.free_bytes().await < ENOUGH;
        // A push that has begun meanwhile may have given back what was asked for.
        is_short && view.has_broken().await && !view.is_pushed()
    }

    /// All scratch together; and a guest that waits for room.
    async fn measure(&mut self) -> Result<()> {
        self.find_broken().await?;
        match (&self.stopped, self.wish.on_full) {
            (Some(_), OnFull::Wait) => self.wait().await?,
            (Some(_), OnFull::GiveUp) => self.look().await?,
            (None, _) => {}
        }
        let Some(max) = self.wish.max_bytes else {
            return Ok(());
        };
        let mut taken = Vec::new();
        for view in self.views.iter().filter(|view| !view.is_lost()) {
            taken.push((view.scratch_bytes().await, Arc::clone(view)));
        }
        let sum: u64 = taken.iter().map(|(bytes, _)| bytes).sum();
        if sum <= max || self.wish.on_full == OnFull::Wait {
            return Ok(());
        }
        if let Some((_, view)) = taken.into_iter().max_by_key(|(bytes, _)| *bytes) {
            self.give_up(&view).await?;
            self.tell(&view, What::GivenUp, None).await;
        }
        Ok(())
    }

    /// Ends the point in time of a disk: its guest's writes need no scratch any more.
    async fn give_up(&mut self, view: &View) -> Result<()> {
        info!(
            disk = view.disk(),
            "scratch is full: the point in time is given up"
        );
        view.lose();
        let job = view.names().job();
        let cancelled = job::cancel(&self.qmp, &job, GIVE_UP_DEADLINE).await;
        cancelled.map_err(|error| {
            Error::new(Kind::ScratchFull, "giving up a point in time")
                .because(error)
                .on_disk(view.disk())
        })?;
        self.given_up.insert(view.disk().to_owned());
        view.empty_scratch().await;
        self.gave_up = Some(Instant::now());
        Ok(())
    }

    async fn tell(&self, view: &View, what: What, paused: Option<Duration>) {
        let notice = Notice {
            disk: view.disk().to_owned(),
            what,
            scratch_bytes: view.scratch_bytes().await,
            paused,
        };
        // A host that takes nothing must not keep the guest waiting.
        let _full = self.notices.try_send(notice);
    }
}
