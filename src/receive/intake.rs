//! Takes in what QEMU writes: each write is answered at once.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

use crate::buffer::{Buffer, Pool};
use crate::error::{Error, Kind, Result};
use crate::extent::{Range, length};
use crate::flow::{Flow, Held};
use crate::nbd::serve::{Asked, Offered, Served};
use crate::target::Receiver;

/// Buffers that are kept for the next writes.
const IDLE: usize = 8;

/// What one write has brought.
#[derive(Debug)]
pub(super) enum Piece {
    Data(Range, Buffer),
    Zero(Range, Held),
}

impl Piece {
    pub(super) fn range(&self) -> &Range {
        match self {
            Self::Data(range, _) | Self::Zero(range, _) => range,
        }
    }
}

/// Serves QEMU, once it is there, until it says goodbye or is cut off, or nobody takes the
/// pieces any more.
///
/// # Errors
/// [`Kind::NbdProtocol`], [`Kind::NbdClosed`].
pub(super) async fn receive(
    receiver: oneshot::Receiver<Receiver>,
    size: u64,
    sink: mpsc::UnboundedSender<Piece>,
    flow: &Arc<Flow>,
) -> Result<()> {
    // Dropped where the push did not come to open its target.
    let Ok(Receiver { door, cut }) = receiver.await else {
        return Ok(());
    };
    let served = async {
        let stream = door.open().await;
        let stream = stream
            .map_err(|error| Error::new(Kind::NbdClosed, "receiving a push").because(error))?;
        serve(stream, size, &sink, flow).await
    };
    tokio::select! {
        () = cut.cancelled() => Ok(()),
        () = sink.closed() => Ok(()),
        served = served => served,
    }
}

pub(super) async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    size: u64,
    sink: &mpsc::UnboundedSender<Piece>,
    flow: &Arc<Flow>,
) -> Result<()> {
    let mut client = Served::welcome(stream, Offered::to_write(size)).await?;
    let pool = Pool::new(IDLE);
    loop {
        let (cookie, asked) = client.asked().await?;
        let piece = match asked {
            Asked::Goodbye => return Ok(()),
            Asked::Other => continue,
            Asked::Flush => {
                client.done(cookie).await?;
                continue;
            }
            Asked::Zero(range) => {
                let held = flow.take(range.start, 0);
                held.map(|held| Piece::Zero(range, held))
            }
            Asked::Write(range) => match flow.take(range.start, length(&range)) {
                Some(held) => {
                    let bytes = usize::try_from(length(&range)).unwrap_or_default();
                    let mut buffer = pool.counted(bytes, held);
                    client.payload(&mut buffer).await?;
                    Some(Piece::Data(range, buffer))
                }
                None => {
                    client.skip(length(&range)).await?;
                    None
                }
            },
        };
        let Some(piece) = piece else {
            client.refuse(cookie).await?;
            continue;
        };
        // `flow` bounds what waits there.
        if sink.send(piece).is_err() {
            return Ok(());
        }
        client.done(cookie).await?;
    }
}

#[cfg(test)]
mod tests;
