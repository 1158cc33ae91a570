//! What was written, brought to the target's stable storage.

use std::time::Duration;

use super::{Run, cancelled};
use crate::entry;
use crate::error::{Error, Kind, Result};
use crate::qemu::Turn;
use crate::target::Opened;
use crate::view::NBD_DEADLINE;

/// What a file's sync gets: all that it needs. The host's page cache may hold much of what was
/// pushed, and nobody can cut QEMU off from a file anyway.
const SYNC_DEADLINE: Duration = Duration::from_secs(365 * 24 * 3600);

impl Run<'_> {
    /// QEMU flushes a node when it closes it, and tells nobody when that fails: so through an
    /// export of it.
    pub(super) async fn flush(&mut self, opened: &Opened) -> Result<()> {
        self.export().await?;
        let patience = self.timeout();
        let (entry, deadline) = if opened.is_file() {
            (patience.max(NBD_DEADLINE), SYNC_DEADLINE)
        } else {
            (patience, patience)
        };
        let flushed = async {
            // The time that others take is not the target's.
            let turn = self.qmp.turn_beside_pushes().await;
            tokio::time::timeout(deadline, self.flush_within(turn, entry, deadline)).await
        };
        let flushed = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(cancelled()),
            flushed = flushed => flushed,
        };
        let Err(error) = flushed.unwrap_or_else(|_elapsed| Err(late())) else {
            return Ok(());
        };
        let kind = match error.kind() {
            Kind::NbdTimeout | Kind::QemuTimeout => return Err(self.stalled(entry)),
            Kind::NbdRefused if error.chain().contains("ENOSPC") => Kind::TargetUnwritable,
            Kind::NbdRefused => Kind::TargetFailed,
            // QEMU's, and not the target's.
            _ => return Err(error),
        };
        Err(Error::new(kind, "flushing the target").because(error))
    }

    /// QEMU gets `entry` to let us in, and `deadline` to flush.
    async fn flush_within(&self, turn: Turn, entry: Duration, deadline: Duration) -> Result<()> {
        let (address, name) = (self.view.address(), self.view.names().target());
        let client = entry::connect(&turn, address, &name, None, deadline);
        let client = tokio::time::timeout(entry, client).await;
        let client = client.unwrap_or_else(|_elapsed| Err(late()))?;
        // QEMU waits for what it flushes, too, whenever it waits for all I/O. Not before the turn is
        // ours: who has it may wait for us.
        let _moves = turn.mover();
        drop(turn);
        let flushed = match client.submit_flush().await {
            Ok(ticket) => ticket.await,
            Err(error) => Err(error),
        };
        client.close().await;
        flushed
    }
}

fn late() -> Error {
    Error::new(Kind::NbdTimeout, "flushing the target")
}
