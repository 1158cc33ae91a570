//! The backups of this process: open ones, and how the last ones ended.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use qemu_fleece_engine::session::Session;
use qemu_fleece_engine::view::View;
use qemu_fleece_protocol::backup::{AbortResult, CommitResult};
use qemu_fleece_protocol::record::Begin;
use qemu_fleece_protocol::stream::Writer;
use qemu_fleece_protocol::{Code, WireError};

use crate::marks::Marks;
use crate::monitors::Monitor;
use crate::wire;

/// Ended backups that are remembered, to answer a host that asks twice.
const MAX_ENDED: usize = 64;

/// One disk's stream: how it begins, and where it can go on.
#[derive(Debug)]
pub(crate) struct DiskStream {
    pub(crate) begin: Begin,
    pub(crate) marks: Arc<Mutex<Marks>>,
}

/// An open backup.
#[derive(Debug)]
pub(crate) struct Backup {
    pub(crate) session: Session,
    pub(crate) streams: HashMap<String, DiskStream>,
    /// Keeps the connection open.
    _monitor: Arc<Monitor>,
}

impl Backup {
    /// The stream of one of its disks.
    pub(crate) fn disk(&self, disk: &str) -> Result<&DiskStream, WireError> {
        self.streams.get(disk).ok_or_else(|| {
            WireError::new(Code::UnknownDisk, format!("the backup has no disk {disk}"))
        })
    }

    /// The view of one of its disks.
    pub(crate) fn view(&self, disk: &str) -> Result<Arc<View>, WireError> {
        let view = self.session.view(disk);
        view.map_err(|error| wire::unchanged(&error))
    }
}

fn unknown(id: &str) -> WireError {
    WireError::new(Code::UnknownBackup, format!("there is no backup {id}"))
}

/// How a backup ended.
#[derive(Clone, Debug)]
pub(crate) enum Ended {
    Committed(CommitResult),
    Aborted(AbortResult),
    /// Commit failed: nothing of it is left.
    Failed,
}

/// All of them, by id.
#[derive(Debug, Default)]
pub(crate) struct Backups {
    open: HashMap<String, Backup>,
    ended: VecDeque<(String, Ended)>,
}

impl Backups {
    /// Takes over a session.
    pub(crate) fn add(&mut self, session: Session, monitor: Arc<Monitor>) {
        let streams = session.disks().iter().map(|disk| {
            let begin = wire::to_stream_begin(disk);
            // A process that takes a backup over goes on where the one before was.
            let mark = disk.view().resume().and_then(|(_, mark)| mark);
            let start = mark.as_deref().and_then(Writer::load);
            let start = start.unwrap_or_else(|| Writer::new(&begin));
            let marks = Marks::new(start, begin.size);
            (
                begin.disk.clone(),
                DiskStream {
                    begin,
                    marks: Arc::new(Mutex::new(marks)),
                },
            )
        });
        let streams = streams.collect();
        self.open.insert(
            session.id.clone(),
            Backup {
                session,
                streams,
                _monitor: monitor,
            },
        );
    }

    /// An open backup.
    pub(crate) fn get(&self, id: &str) -> Result<&Backup, WireError> {
        self.open.get(id).ok_or_else(|| self.missing(id))
    }

    /// An open backup, to be changed.
    pub(crate) fn get_mut(&mut self, id: &str) -> Result<&mut Backup, WireError> {
        if !self.open.contains_key(id) {
            return Err(self.missing(id));
        }
        self.open.get_mut(id).ok_or_else(|| unknown(id))
    }

    /// Takes an open backup out, to end it.
    pub(crate) fn take(&mut self, id: &str) -> Result<Backup, WireError> {
        self.open.remove(id).ok_or_else(|| self.missing(id))
    }

    fn missing(&self, id: &str) -> WireError {
        match self.how_ended(id) {
            Some(_) => WireError::new(Code::BackupEnded, format!("backup {id} has ended")),
            None => unknown(id),
        }
    }

    /// How a backup ended, as long as it is remembered.
    pub(crate) fn how_ended(&self, id: &str) -> Option<&Ended> {
        self.ended
            .iter()
            .find(|(other, _)| other == id)
            .map(|(_, ended)| ended)
    }

    /// Remembers how a backup ended.
    pub(crate) fn end(&mut self, id: String, ended: Ended) {
        if self.ended.len() >= MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back((id, ended));
    }

    /// Aborts all that are open: their ids, and what could not be removed. `keep`: those
    /// that shall outlive the host are left open instead.
    pub(crate) async fn abort_all(&mut self, keep: bool) -> (Vec<String>, Vec<String>) {
        let (mut ids, mut leftovers) = (Vec::new(), Vec::new());
        for (id, backup) in self.open.drain() {
            if keep && backup.session.is_kept() {
                backup.session.detach().await;
                continue;
            }
            leftovers.extend(backup.session.abort().await);
            ids.push(id);
        }
        (ids, leftovers)
    }
}
