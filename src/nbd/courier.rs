//! Carries a client's requests to a server, and the replies back, so that the server never
//! waits for the client.
//!
//! ```text
//! client --request--> room for its reply? --> server
//!    ^                                          |
//!    +---- as fast as it likes ---- held <------+ always, at once
//! ```
//! QEMU waits, whenever it has to wait for all I/O, until every reply is taken, and its
//! guest waits with it. So a request goes on only when there is room to hold its whole
//! reply; and it goes on as a whole, because QEMU would wait for the rest of it too.
//!
//! The export is read-only: the bytes of a write go nowhere.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy, sink,
    split,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Kind, Result};
use crate::nbd::ledger::{Ledger, MOST, most};
use crate::nbd::wire::{Replies, Request, command};

/// Bytes of replies that are held for one client, or are to come: the longest one fits.
const ROOM: u64 = MOST;

/// Bytes that are read at a time.
const BUFFER: usize = 256 * 1024;

/// Most buffers that are kept to be used again.
const SPARE: usize = 4;

fn broken(what: &'static str) -> Error {
    Error::new(Kind::NbdProtocol, "carrying NBD requests").because(what)
}

fn closed(error: std::io::Error) -> Error {
    Error::new(Kind::NbdClosed, "carrying NBD requests").because(error)
}

/// Room for a reply, until the client has it.
type Room = OwnedSemaphorePermit;

/// What both directions know.
struct Book {
    room: Arc<Semaphore>,
    ledger: Mutex<Ledger<Room>>,
    /// Something was answered.
    answered: Notify,
}

impl Book {
    fn ledger(&self) -> MutexGuard<'_, Ledger<Room>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the reply has room, and its cookie is nobody else's.
    async fn enter(&self, request: &Request) -> Result<()> {
        let bytes = u32::try_from(most(request)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await;
        let room = room.map_err(|_closed| broken("there is no room any more"))?;
        loop {
            let answered = self.answered.notified();
            {
                let mut ledger = self.ledger();
                if !ledger.is_open(request.cookie) {
                    ledger.ask(request, room);
                    return Ok(());
                }
            }
            answered.await;
        }
    }

    /// Takes what the server says: the room of what it has answered.
    fn hear(&self, bytes: &[u8]) -> Result<Vec<Room>> {
        let rooms = self.ledger().hear(bytes).map_err(broken)?;
        if !rooms.is_empty() {
            self.answered.notify_waiters();
        }
        Ok(rooms)
    }
}

/// Bytes for the client, and the room of the replies that end in them.
struct Piece {
    buffer: Vec<u8>,
    rest: Range<usize>,
    _rooms: Vec<Room>,
}

/// What the server has said and the client has not.
struct Held {
    pieces: VecDeque<Piece>,
    /// Where the next bytes come in.
    buffer: Vec<u8>,
    spare: Vec<Vec<u8>>,
}

impl Held {
    fn new() -> Self {
        Self {
            pieces: VecDeque::new(),
            buffer: vec![0; BUFFER],
            spare: Vec::new(),
        }
    }

    /// So many bytes are in the buffer.
    fn keep(&mut self, length: usize, rooms: Vec<Room>) {
        // What is held shall not take much more than it has.
        let buffer = if length < BUFFER / 2 {
            self.buffer[..length].to_vec()
        } else {
            let next = self.spare.pop().unwrap_or_else(|| vec![0; BUFFER]);
            std::mem::replace(&mut self.buffer, next)
        };
        self.pieces.push_back(Piece {
            buffer,
            rest: 0..length,
            _rooms: rooms,
        });
    }

    /// The client has so many bytes more.
    fn pass(&mut self, length: usize) {
        let Some(piece) = self.pieces.front_mut() else {
            return;
        };
        piece.rest.start += length;
        if piece.rest.is_empty()
            && let Some(Piece { buffer, .. }) = self.pieces.pop_front()
            && buffer.len() == BUFFER
            && self.spare.len() < SPARE
        {
            self.spare.push(buffer);
        }
    }
}

/// Carries until the server has ended and the client has all that it said, or one of them
/// breaks. They are in transmission, with simple or structured replies.
///
/// # Errors
/// [`Kind::NbdClosed`]; [`Kind::NbdProtocol`], of either side.
pub(crate) async fn carry<C, S>(client: C, server: S) -> Result<()>
where
    C: AsyncRead + AsyncWrite,
    S: AsyncRead + AsyncWrite,
{
    let (from_client, to_client) = split(client);
    let (from_server, to_server) = split(server);
    let book = Book {
        room: Arc::new(Semaphore::new(usize::try_from(ROOM).unwrap_or_default())),
        ledger: Mutex::default(),
        answered: Notify::new(),
    };
    let replies = replies(from_server, to_client, &book);
    tokio::pin!(replies);
    tokio::select! {
        ended = &mut replies => return ended,
        asked = requests(from_client, to_server, &book) => asked?,
    }
    replies.await
}

/// Until the client asks no more.
async fn requests(
    client: impl AsyncRead + Unpin,
    mut server: impl AsyncWrite + Unpin,
    book: &Book,
) -> Result<()> {
    let mut client = BufReader::new(client);
    while !client.fill_buf().await.map_err(closed)?.is_empty() {
        let mut header = [0; Request::BYTES];
        client.read_exact(&mut header).await.map_err(closed)?;
        let request = Request::decode(&header);
        let mut request = request.ok_or_else(|| broken("a request has a wrong magic"))?;
        match request.command {
            command::DISC => {
                server.write_all(&header).await.map_err(closed)?;
                break;
            }
            command::WRITE => {
                request = discard(&mut client, &request).await?;
                header = encode(&request)?;
            }
            _ => {}
        }
        book.enter(&request).await?;
        server.write_all(&header).await.map_err(closed)?;
    }
    server.shutdown().await.map_err(closed)
}

/// Passes over the bytes of a write. Instead of it the server gets what it refuses with the
/// same error, and what would change nothing if it did not.
async fn discard(client: &mut (impl AsyncRead + Unpin), write: &Request) -> Result<Request> {
    let passed = copy(&mut client.take(write.length), &mut sink()).await;
    if passed.map_err(closed)? < write.length {
        return Err(closed(std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Request {
        flags: 0,
        command: command::TRIM,
        cookie: write.cookie,
        offset: 0,
        length: 0,
    })
}

fn encode(request: &Request) -> Result<[u8; Request::BYTES]> {
    let bytes = request.encode(Replies::Structured);
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| broken("a request has no encoding"))
}

/// Until the server has ended and the client has all.
async fn replies(
    mut server: impl AsyncRead + Unpin,
    mut client: impl AsyncWrite + Unpin,
    book: &Book,
) -> Result<()> {
    let mut held = Held::new();
    let mut has_ended = false;
    while !(has_ended && held.pieces.is_empty()) {
        tokio::select! {
            read = server.read(&mut held.buffer), if !has_ended => {
                let length = read.map_err(closed)?;
                let rooms = book.hear(&held.buffer[..length])?;
                has_ended = length == 0;
                if !has_ended {
                    held.keep(length, rooms);
                }
            }
            written = write_some(&mut client, held.pieces.front()) => {
                held.pass(written.map_err(closed)?);
            }
        }
    }
    client.shutdown().await.map_err(closed)
}

/// Hands on a part of a piece: so many bytes. Without a piece it never returns.
async fn write_some(
    client: &mut (impl AsyncWrite + Unpin),
    piece: Option<&Piece>,
) -> std::io::Result<usize> {
    let Some(piece) = piece else {
        return std::future::pending().await;
    };
    match client.write(&piece.buffer[piece.rest.clone()]).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        written => Ok(written),
    }
}

#[cfg(test)]
mod tests;
