//! Restore: extents become an image file again, offline.
//!
//! ```text
//! begin --> (write | barrier)* --> finish --> the image, under its name
//!                        \-------> abort, or an error --> nothing
//! ```
//! A `qemu-storage-daemon` of our own writes the image beside the target under a
//! hidden name; `finish` flushes and renames it. Who calls has checked the record
//! stream: what is written here is taken for true.

use std::collections::VecDeque;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::buffer::Pool;
use crate::error::{Error, Kind, Result};
use crate::extent::{Range, length, next_cut};
use crate::file_call;
use crate::hidden;
use crate::image::{Durable, Format, unwritable};
use crate::nbd::{Address, Client, Ticket};
use crate::server::{self, text};
use crate::session::random_id;
use crate::storage_daemon::StorageDaemon;

/// Writes under way at a time, and buffers for them.
const WRITES: usize = 8;

/// Longest range that one request fills with zeros.
const ZERO_STEP: u64 = 1 << 30;

/// How long the daemon gets to answer one NBD request.
const NBD_DEADLINE: Duration = Duration::from_secs(120);

/// How long the target's file system gets for one call.
const FILE_DEADLINE: Duration = Duration::from_secs(10);

/// What is to be made, and with what.
#[derive(Clone, Debug)]
pub struct Target {
    /// The image: an absolute path where nothing is yet.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The disk's bytes.
    pub size: u64,
}

/// A restore under way.
#[derive(Debug)]
pub struct Restore {
    target: Target,
    files: Files,
    durable: Durable,
    daemon: StorageDaemon,
    client: Client,
    pool: Pool,
    tickets: VecDeque<Ticket<()>>,
}

/// Removes what a restore has made, unless it is disarmed.
#[derive(Debug)]
struct Files {
    partial: PathBuf,
    private: PathBuf,
}

impl Files {
    async fn remove(&self) -> Vec<String> {
        let removed = [
            file_call::remove(&self.partial, |path| std::fs::remove_file(path)).await,
            file_call::remove(&self.private, |path| std::fs::remove_dir_all(path)).await,
        ];
        let left = [&self.partial, &self.private].into_iter().zip(removed);
        let left = left.filter_map(|(path, removed)| Some((path, removed.err()?)));
        left.map(|(path, error)| format!("file {}: {}", path.display(), error.chain()))
            .collect()
    }
}

impl Restore {
    /// Makes an empty image of the target's size beside it, with `daemon`
    /// (`qemu-storage-daemon`).
    ///
    /// # Errors
    /// The `Target*` kinds; [`Kind::StorageDaemonFailed`]; nothing is left then but what
    /// [`Error::leftovers`] tells.
    pub async fn begin(target: Target, daemon: &Path, runtime_dir: &Path) -> Result<Self> {
        let id = random_id();
        let partial = hidden::partial_path(&target.path, &id, FILE_DEADLINE).await?;
        let files = Files {
            partial,
            private: runtime_dir.join(format!("qf-{id}")),
        };
        match Self::open(&target, &files, daemon).await {
            Ok((durable, daemon, client)) => Ok(Self {
                target,
                files,
                durable,
                daemon,
                client,
                pool: Pool::new(WRITES),
                tickets: VecDeque::new(),
            }),
            Err(error) => Err(error.leaving(files.remove().await)),
        }
    }

    async fn open(
        target: &Target,
        files: &Files,
        program: &Path,
    ) -> Result<(Durable, StorageDaemon, Client)> {
        let (format, size) = (target.format, target.size);
        let created = hidden::create(
            &files.partial,
            &target.path,
            format,
            size,
            None,
            FILE_DEADLINE,
        );
        let (file, durable) = created.await?;
        file_call::close(file).await;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&files.private)
            .map_err(|error| unwritable(&files.private, error))?;
        let daemon = StorageDaemon::start(program).await?;
        let socket = files.private.join("nbd.sock");
        match open_image(&daemon, target, &files.partial, &socket).await {
            Ok(client) => {
                // Nobody else shall come in, and nothing stay there if we are killed.
                let _removed_at_the_end = std::fs::remove_dir_all(&files.private);
                Ok((durable, daemon, client))
            }
            Err(error) => {
                let _stopped = daemon.stop().await;
                Err(error)
            }
        }
    }

    /// The disk's bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.target.size
    }

    /// Writes bytes at `offset`. Returns before they are written.
    ///
    /// # Errors
    /// [`Kind::TargetUnwritable`], also for an earlier write.
    pub async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.make_room().await?;
        let mut buffer = self.pool.take(bytes.len()).await;
        buffer.copy_from_slice(bytes);
        let ticket = self.client.submit_write(offset, buffer).await;
        self.tickets
            .push_back(ticket.map_err(|error| self.explain(error))?);
        Ok(())
    }

    /// Makes a range read as zeros, without room where the format can.
    ///
    /// # Errors
    /// As [`Restore::write`].
    pub async fn zero(&mut self, range: Range) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            self.make_room().await?;
            let end = next_cut(at, ZERO_STEP, range.end);
            let ticket = self
                .client
                .submit_write_zeroes(at, length(&(at..end)), false)
                .await;
            self.tickets
                .push_back(ticket.map_err(|error| self.explain(error))?);
            at = end;
        }
        Ok(())
    }

    /// Waits for all writes: what comes later may overwrite what came before.
    ///
    /// # Errors
    /// As [`Restore::write`].
    pub async fn barrier(&mut self) -> Result<()> {
        while let Some(ticket) = self.tickets.pop_front() {
            ticket.await.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    async fn make_room(&mut self) -> Result<()> {
        if self.tickets.len() >= WRITES
            && let Some(oldest) = self.tickets.pop_front()
        {
            oldest.await.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    fn explain(&self, error: Error) -> Error {
        unwritable(&self.target.path, error)
    }

    /// Flushes, closes and names the image. After an error nothing is left.
    ///
    /// # Errors
    /// [`Kind::TargetUnwritable`], [`Kind::TargetExists`], [`Kind::StorageDaemonFailed`].
    pub async fn finish(mut self) -> Result<()> {
        let written = async {
            self.barrier().await?;
            let flush = self
                .client
                .submit_flush()
                .await
                .map_err(|error| self.explain(error))?;
            flush.await.map_err(|error| self.explain(error))
        };
        let written = written.await;
        let Self {
            target,
            files,
            durable,
            daemon,
            client,
            ..
        } = self;
        client.close().await;
        let closed = close_image(&daemon).await;
        let stopped = daemon.stop().await;
        let named = async {
            written.and(closed).and(stopped)?;
            // Nobody can cancel this.
            let durable = durable.sync(&CancellationToken::new()).await?;
            hidden::publish(durable, files.partial.clone(), target.path).await
        };
        let named = named.await;
        let leftovers = files.remove().await;
        named.map_err(|error| error.leaving(leftovers))
    }

    /// Removes what there is; returns what could not be removed.
    pub async fn abort(self) -> Vec<String> {
        let Self {
            files,
            daemon,
            client,
            ..
        } = self;
        client.close().await;
        let stopped = daemon.stop().await;
        let mut leftovers = files.remove().await;
        if let Err(error) = stopped {
            leftovers.push(error.chain());
        }
        leftovers
    }
}

async fn open_image(
    daemon: &StorageDaemon,
    target: &Target,
    partial: &Path,
    socket: &Path,
) -> Result<Client> {
    let qmp = &daemon.qmp;
    let file = json!({"driver": "file", "node-name": "file", "filename": text(partial)?, "discard": "unmap"});
    qmp.execute_raw("blockdev-add", file).await?;
    let image = json!({"driver": target.format.driver(), "node-name": "image", "file": "file",
        "discard": "unmap", "detect-zeroes": "unmap"});
    qmp.execute_raw("blockdev-add", image).await?;
    let address = json!({"type": "unix", "data": {"path": text(socket)?}});
    qmp.execute_raw("nbd-server-start", json!({"addr": address}))
        .await?;
    server::close_anothers(socket).await;
    let export = json!({"type": "nbd", "id": "image", "node-name": "image", "name": "image", "writable": true});
    qmp.execute_raw("block-export-add", export).await?;
    Client::connect(
        &Address::Unix(socket.to_owned()),
        "image",
        None,
        NBD_DEADLINE,
    )
    .await
}

/// Closing is what writes the last of qcow2's metadata, and what may fail.
async fn close_image(daemon: &StorageDaemon) -> Result<()> {
    let qmp = &daemon.qmp;
    let mut teardown = crate::teardown::Teardown::default();
    teardown.push(crate::teardown::Undo::Node {
        node: "file".into(),
    });
    teardown.push(crate::teardown::Undo::Node {
        node: "image".into(),
    });
    teardown.push(crate::teardown::Undo::Export { id: "image".into() });
    let failures = teardown.run(qmp).await;
    if failures.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::TargetUnwritable, "closing the image").because(failures.join("; ")))
}
