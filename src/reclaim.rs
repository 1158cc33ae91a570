//! Reclaim: what dead sessions have left in QEMU is taken away.
//!
//! ```text
//! QEMU's lists --> sessions, by the names of their objects --> whose? --> dead: undone,
//! (nodes, jobs, exports, bitmaps,                                |        as its own
//!  fdsets, notes)                                                |        teardown would
//!                                                                +--> alive, kept, or not
//!                                                                     known: left alone
//! ```
//! A session is dead when the process that its note names has ended, which only this very
//! machine can tell. It is undone by the same steps in the same order as by its own
//! teardown: each looks first, so whatever the process had come to, all goes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{info, warn};

use crate::error::Result;
use crate::owner::{Life, Owner};
use crate::qemu::step::{self, Names};
use crate::qemu::{Qmp, note, query};
use crate::saved::{self, Deed, Progress};
use crate::server;
use crate::session::now_ms;
use crate::stake;
use crate::standstill;
use crate::teardown::{Teardown, Undo};

/// What is known of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process lives.
    Alive,
    /// Its process has ended, or has lost it with its monitor's connection.
    Dead,
    /// Its process has ended, and the host wants to take it over.
    Kept,
    /// Its process cannot be seen from here, or it does not say whose it is.
    Unknown,
}

/// A session that is in QEMU.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its id.
    pub id: String,
    /// What it says of itself.
    pub deed: Option<Deed>,
    /// How far the consumers of its disks are, by their places.
    pub progress: BTreeMap<usize, Progress>,
    places: BTreeSet<usize>,
    bitmaps: Vec<(String, String)>,
    fdsets: Vec<i64>,
    files: Vec<PathBuf>,
}

impl Found {
    /// Whether it lives.
    #[must_use]
    pub fn state(&self) -> State {
        let Some(deed) = &self.deed else {
            return State::Unknown;
        };
        let is_lost = deed.owner == Owner::here() && !stake::is_held(&self.id);
        match deed.owner.life() {
            Life::Alive if !is_lost => State::Alive,
            Life::Elsewhere => State::Unknown,
            Life::Alive | Life::Dead if self.kept_for() > Duration::ZERO => State::Kept,
            Life::Alive | Life::Dead => State::Dead,
        }
    }

    /// How long it is kept from now on, if its process has ended.
    #[must_use]
    pub fn kept_for(&self) -> Duration {
        let session = self.deed.as_ref().and_then(|deed| deed.session.as_ref());
        let Some(session) = session else {
            return Duration::ZERO;
        };
        let told = self.progress.values().map(|progress| progress.time_ms);
        let last = told.chain([session.time_ms]).max().unwrap_or_default();
        let until = last.saturating_add(session.keep_ms);
        Duration::from_millis(until.saturating_sub(now_ms()))
    }

    /// Its private directory, on its owner's machine; `None` where its note tells of none that
    /// it would have made.
    pub(crate) fn dir(&self) -> Option<&Path> {
        let dir = self.deed.as_ref()?.dir.as_path();
        is_ours(dir, &self.id).then_some(dir)
    }

    /// The files and directories that are removed with it, if its process ran on this machine.
    #[must_use]
    pub fn removes(&self) -> Vec<PathBuf> {
        let teardown = self.teardown(true, &BTreeSet::new());
        let paths = teardown.paths().map(Path::to_owned).collect();
        teardown.leave();
        paths
    }

    /// The socket of the NBD server that it uses, as it tells.
    fn server(&self) -> Option<PathBuf> {
        let told = self.deed.as_ref().and_then(|deed| deed.server.clone());
        told.filter(|socket| server::is_ours(socket))
    }

    /// Its NBD server; where it has not come to tell, the one that it would have started.
    fn old_server(&self) -> Option<Undo> {
        let (socket, ran) = match self.server() {
            Some(told) => (told, true),
            None => (stake::server_dir(self.dir()?).join(server::SOCKET), false),
        };
        Some(Undo::OldServer { socket, ran })
    }

    /// All that it may have made, to be undone, but for a server that is `used` by others. Files
    /// only where `here`: its process ran on this machine.
    fn teardown(&self, here: bool, used: &BTreeSet<PathBuf>) -> Teardown {
        let is_used = self.server().is_some_and(|socket| used.contains(&socket));
        let server = self.old_server().filter(|_| here && !is_used);
        let mut teardown = self.session_teardown(here, server);
        teardown.append(self.consumer_teardown(here));
        teardown
    }

    /// What its consumers may have made, but for the exports to the host.
    pub(crate) fn consumer_teardown(&self, here: bool) -> Teardown {
        let mut teardown = Teardown::default();
        for names in self.names() {
            push_all(&mut teardown, consumers(&names));
        }
        for file in self.files.iter().filter(|_| here) {
            teardown.push(Undo::File(file.clone()));
        }
        teardown
    }

    fn names(&self) -> Vec<Names> {
        let places = self.places.iter();
        places.map(|place| Names::new(&self.id, *place)).collect()
    }

    /// All else, in the order in which it was made, with its part of the NBD server.
    pub(crate) fn session_teardown(&self, here: bool, server: Option<Undo>) -> Teardown {
        let mut teardown = Teardown::default();
        let note = step::owner_note(&self.id);
        teardown.push(Undo::Object { id: note });
        if let Some(dir) = self.dir().filter(|_| here) {
            teardown.push(Undo::Directory(dir.to_owned()));
        }
        for id in &self.fdsets {
            teardown.push(Undo::FdSet { id: *id });
        }
        let names = self.names();
        for names in &names {
            push_all(&mut teardown, scratch(names));
        }
        push_all(&mut teardown, server);
        for (node, name) in &self.bitmaps {
            teardown.push(Undo::Bitmap {
                node: node.clone(),
                name: name.clone(),
            });
        }
        for names in &names {
            push_all(&mut teardown, view(names));
        }
        teardown
    }
}

fn push_all(teardown: &mut Teardown, undos: impl IntoIterator<Item = Undo>) {
    for undo in undos {
        teardown.push(undo);
    }
}

fn scratch(names: &Names) -> [Undo; 2] {
    [
        Undo::Node {
            node: names.scratch_file(),
        },
        Undo::Node {
            node: names.scratch(),
        },
    ]
}

fn view(names: &Names) -> [Undo; 5] {
    [
        Undo::Job { id: names.job() },
        Undo::Object {
            id: names.progress(),
        },
        Undo::Node { node: names.view() },
        Undo::Export { id: names.job() },
        Undo::Export {
            id: names.public_export(),
        },
    ]
}

fn consumers(names: &Names) -> [Undo; 8] {
    [
        Undo::Object {
            id: names.credentials(),
        },
        Undo::Object {
            id: names.partial(),
        },
        Undo::Node {
            node: names.target_file(),
        },
        Undo::Node {
            node: names.target(),
        },
        Undo::Node {
            node: names.canvas(),
        },
        Undo::Export { id: names.canvas() },
        Undo::Job { id: names.push() },
        Undo::Export { id: names.target() },
    ]
}

/// Whether this is the directory that session `id` would make: a note could say anything.
fn is_ours(dir: &Path, id: &str) -> bool {
    let name = format!("{}{id}", step::PREFIX);
    dir.is_absolute() && dir.file_name().is_some_and(|last| *last == *name)
}

/// Whether a push of ours could have made this.
fn is_partial(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    path.is_absolute()
        && name.is_some_and(|name| name.starts_with(".qf-") && name.ends_with(".partial"))
}

/// All sessions that are in QEMU, by their ids.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn sessions(qmp: &Qmp) -> Result<Vec<Found>> {
    let mut found = Listing::default();
    let nodes = query::named_block_nodes(qmp).await?;
    for node in &nodes {
        found.see(&node.node_name);
        for bitmap in &node.dirty_bitmaps {
            let name = bitmap.name.as_deref().unwrap_or_default();
            if let Some(session) = found.see(name)
                && step::session_of(&node.node_name).is_none()
            {
                session
                    .bitmaps
                    .push((node.node_name.clone(), name.to_owned()));
            }
        }
    }
    for job in query::jobs(qmp).await? {
        found.see(&job.id);
    }
    for export in query::block_exports(qmp).await? {
        found.see(&export.id);
    }
    for id in note::ids(qmp).await? {
        found.read(qmp, &id).await?;
    }
    for (id, opaque) in query::fdsets(qmp).await? {
        // QEMU 7.2 shows removed ones for a while, so they alone are no session.
        let session = step::session_of(&opaque).and_then(|of| found.sessions.get_mut(of));
        if let Some(session) = session {
            session.fdsets.push(id);
        }
    }
    Ok(found.sessions.into_values().collect())
}

#[derive(Default)]
struct Listing {
    sessions: BTreeMap<String, Found>,
}

impl Listing {
    /// Takes the name of an object: the session that it is of.
    fn see(&mut self, name: &str) -> Option<&mut Found> {
        let id = step::session_of(name)?;
        let found = self.sessions.entry(id.to_owned()).or_default();
        id.clone_into(&mut found.id);
        found.places.extend(step::place_of(name));
        Some(found)
    }

    async fn read(&mut self, qmp: &Qmp, id: &str) -> Result<()> {
        let Some(found) = self.see(id) else {
            return Ok(());
        };
        let place = step::place_of(id);
        let names = place.map(|place| Names::new(&found.id, place));
        let is = |note: fn(&Names) -> String| names.as_ref().is_some_and(|names| note(names) == id);
        if id == step::owner_note(&found.id) {
            let text = note::read(qmp, id).await?;
            found.deed = text.as_deref().and_then(saved::deed);
        } else if is(Names::progress) {
            let text = note::read(qmp, id).await?;
            let progress = text.as_deref().and_then(saved::progress);
            found.progress.extend(place.zip(progress));
        } else if is(Names::partial) {
            let text = note::read(qmp, id).await?;
            let path = text.map(PathBuf::from).filter(|path| is_partial(path));
            found.files.extend(path);
        }
        Ok(())
    }
}

/// Which sessions are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that are dead, and not kept.
    Dead,
    /// These, also where they are kept.
    These(Vec<String>),
    /// These, also where it is not known whether they live: the caller knows.
    Forced(Vec<String>),
}

impl Which {
    fn means(&self, found: &Found) -> bool {
        let state = found.state();
        match self {
            Self::Dead => state == State::Dead,
            Self::These(ids) => {
                ids.contains(&found.id) && matches!(state, State::Dead | State::Kept)
            }
            Self::Forced(ids) => ids.contains(&found.id) && state != State::Alive,
        }
    }
}

/// What was reclaimed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Sessions of which nothing is left, but for `leftovers`.
    pub reclaimed: Vec<String>,
    /// Sessions that were left alone.
    pub left: Vec<(String, State)>,
    /// What could not be removed, with the reason.
    pub leftovers: Vec<String>,
}

/// Takes away what these sessions have left. Twice does no harm.
///
/// # Errors
/// QEMU's, the monitor's. What could not be removed is no error.
pub async fn reclaim(qmp: &Qmp, which: &Which) -> Result<Report> {
    // One at a time: two would undo the same things.
    let turn = qmp.turn().await;
    let qmp = &*turn;
    let mut report = Report::default();
    let found = sessions(qmp).await?.into_iter();
    let (meant, others): (Vec<_>, Vec<_>) = found.partition(|found| which.means(found));
    // By an export that is there, or by one that is to come.
    let used = others.iter().filter_map(Found::server).collect();
    let left = others.into_iter();
    report.left = left
        .map(|found| (found.id.clone(), found.state()))
        .collect();
    for found in meant {
        let state = found.state();
        info!(session = found.id, ?state, "reclaiming");
        let teardown = found.teardown(state != State::Unknown, &used);
        let filters: Vec<String> = found.names().iter().map(Names::filter).collect();
        let leftovers = standstill::end(qmp, teardown, &filters).await;
        report.leftovers.extend(leftovers);
        report.reclaimed.push(found.id);
    }
    Ok(report)
}

/// [`reclaim`] of the dead, before a session begins. With none it costs one question.
///
/// # Errors
/// QEMU's, the monitor's.
pub(crate) async fn dead(qmp: &Qmp) -> Result<()> {
    let is_note = |id: &String| step::session_of(id).is_some_and(|of| *id == step::owner_note(of));
    if !note::ids(qmp).await?.iter().any(is_note) {
        return Ok(());
    }
    let report = reclaim(qmp, &Which::Dead).await?;
    for leftover in &report.leftovers {
        warn!(leftover, "a dead session's");
    }
    Ok(())
}
