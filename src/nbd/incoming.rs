//! The task that takes in replies, always, whatever becomes of those who asked: a
//! client that does not read freezes QEMU at its next drain.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::nbd::pending::{Answer, Pending, Shared, Work};
use crate::nbd::reply::{Body, Verdict};
use crate::nbd::wire::{Replies, ReplyHeader, chunk, u32_at, u64_at};

/// Bytes that may be read behind a header in one go, and are copied once more.
const STASH: usize = 512;

/// Takes in replies until the connection is over, then ends the writer too: a
/// socket that is open but not read would be the freeze that this task prevents.
pub(super) async fn receive<R: AsyncRead + Unpin>(
    reader: R,
    replies: Replies,
    shared: Arc<Shared>,
    deadline: Duration,
    alive: CancellationToken,
) {
    let mut incoming = Incoming {
        reader,
        stash: [0; STASH],
        start: 0,
        end: 0,
        shared: Arc::clone(&shared),
        replies,
    };
    let error = tokio::select! {
        () = alive.cancelled() => Error::new(Kind::NbdClosed, "reading NBD replies")
            .because("the connection was closed"),
        error = shared.late(deadline) => error,
        error = incoming.run() => error,
    };
    shared.kill(&error);
    alive.cancel();
}

struct Incoming<R> {
    reader: R,
    stash: [u8; STASH],
    start: usize,
    end: usize,
    shared: Arc<Shared>,
    replies: Replies,
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    /// Takes replies until the connection ends; tells how.
    async fn run(&mut self) -> Error {
        loop {
            if let Err(error) = self.reply().await {
                return error;
            }
        }
    }

    /// Takes one simple reply, or one chunk.
    async fn reply(&mut self) -> Result<()> {
        let header = self.header().await?;
        let simple = header.is_simple;
        let header = header.fields;
        let mut work = self.take(header.cookie)?;
        self.chunk(&header, simple, &mut work).await?;
        if header.flags & chunk::FLAG_DONE == 0 {
            if let Some(pending) = self.shared.table().pending.get_mut(&header.cookie) {
                pending.work = Some(work);
            }
            return Ok(());
        }
        let Work { reply, buffer } = work;
        let result = match (reply.finish(simple).map_err(broken)?, buffer) {
            (Verdict::Refused(error), _) => Err(error),
            (Verdict::Extents(extents), _) => Ok(Answer::Extents(extents)),
            (Verdict::Done, Some(buffer)) => Ok(Answer::Bytes(buffer)),
            (Verdict::Done, None) => Ok(Answer::Done),
        };
        let pending = self.shared.table().pending.remove(&header.cookie);
        if let Some(Pending { answer, .. }) = pending {
            // Whoever asked may be gone; the reply is drained all the same.
            let _gone = answer.send(result);
        }
        Ok(())
    }

    async fn header(&mut self) -> Result<Header> {
        let mut bytes = [0; 32];
        // The magic first: what follows a wrong one may never come.
        self.fill(&mut bytes[..4]).await?;
        let magic = u32_at(&bytes, 0);
        let kind = Replies::of_magic(magic)
            .ok_or_else(|| broken(format!("a reply with magic {magic:#x}")))?;
        let is_simple = kind == Replies::Simple;
        // Whether a simple reply is due is known with its request.
        if !is_simple && kind != self.replies {
            return Err(broken("a reply of a kind that was not negotiated"));
        }
        self.fill(&mut bytes[4..kind.header_bytes()]).await?;
        Ok(Header {
            is_simple,
            fields: ReplyHeader::decode(kind, &bytes),
        })
    }

    fn take(&self, cookie: u64) -> Result<Work> {
        let mut table = self.shared.table();
        let pending = table.pending.get_mut(&cookie);
        pending.and_then(|it| it.work.take()).ok_or_else(|| {
            broken(format!(
                "a reply with cookie {cookie}, which no request waits for"
            ))
        })
    }

    async fn chunk(&mut self, header: &ReplyHeader, simple: bool, work: &mut Work) -> Result<()> {
        match work.reply.header(header, simple).map_err(broken)? {
            Body::None => {}
            Body::All => {
                if let Some(buffer) = &mut work.buffer {
                    self.fill(buffer).await?;
                }
            }
            Body::Data(length) => {
                let mut offset = [0; 8];
                self.fill(&mut offset).await?;
                let place = work
                    .reply
                    .place(u64_at(&offset, 0), length)
                    .map_err(broken)?;
                self.fill(part(work, &place)?).await?;
            }
            Body::Small(length) => {
                let mut bytes = vec![0; length];
                self.fill(&mut bytes).await?;
                if let Some(hole) = work.reply.small(header.kind, &bytes).map_err(broken)? {
                    part(work, &hole)?.fill(0);
                }
            }
        }
        Ok(())
    }

    async fn fill(&mut self, mut rest: &mut [u8]) -> Result<()> {
        while !rest.is_empty() {
            if self.start < self.end {
                let length = rest.len().min(self.end - self.start);
                let (head, tail) = rest.split_at_mut(length);
                head.copy_from_slice(&self.stash[self.start..self.start + length]);
                self.start += length;
                rest = tail;
            } else if rest.len() >= STASH {
                let length = some(self.reader.read(rest).await)?;
                rest = &mut rest[length..];
            } else {
                self.start = 0;
                self.end = 0;
                self.end = some(self.reader.read(&mut self.stash).await)?;
            }
        }
        Ok(())
    }
}

struct Header {
    is_simple: bool,
    fields: ReplyHeader,
}

/// What one read brought; 0 bytes are the end.
fn some(read: std::io::Result<usize>) -> Result<usize> {
    let closed = || Error::new(Kind::NbdClosed, "reading NBD replies");
    match read {
        Ok(0) => Err(closed().because("end of file")),
        Ok(length) => Ok(length),
        Err(error) => Err(closed().because(error)),
    }
}

fn part<'a>(work: &'a mut Work, place: &std::ops::Range<u64>) -> Result<&'a mut [u8]> {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    work.buffer
        .as_mut()
        .and_then(|buffer| buffer.get_mut(index(place.start)..index(place.end)))
        .ok_or_else(|| broken("bytes for a request that has no buffer"))
}

fn broken(what: impl Into<String>) -> Error {
    Error::new(Kind::NbdProtocol, "reading NBD replies").because(what.into())
}
