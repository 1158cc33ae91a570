//! An NBD server that does as it is told, lies included.
//!
//! Bytes are put together here by hand from the specification, not with the
//! client's own constants: a wrong constant there must not agree with itself.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::future::Future;
use std::time::Duration;

use qemu_fleece_engine::buffer::{Buffer, Pool};
use qemu_fleece_engine::nbd::Client;
use qemu_fleece_engine::{Error, Kind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest that a test may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// The deadline that clients get where the test is not about it.
pub(crate) const PATIENT: Duration = Duration::from_secs(15);
/// The meta context that clients ask for.
pub(crate) const CONTEXT: &str = "base:allocation";
/// Its id.
pub(crate) const ID: u32 = 7;

pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const SET_META_CONTEXT: u32 = 10;
pub(crate) const EXTENDED_HEADERS: u32 = 11;

pub(crate) const ACK: u32 = 1;
pub(crate) const INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;

pub(crate) const DONE: u16 = 1;
pub(crate) const NONE: u16 = 0;
pub(crate) const DATA: u16 = 1;
pub(crate) const HOLE: u16 = 2;
pub(crate) const STATUS: u16 = 5;
pub(crate) const STATUS_EXT: u16 = 6;
pub(crate) const ERROR: u16 = 0x8001;
pub(crate) const ERROR_OFFSET: u16 = 0x8002;

/// How the server negotiates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

/// Both styles with chunks.
pub(crate) const CHUNKED: [Style; 2] = [Style::Structured, Style::Extended];

/// What the server says before transmission.
#[derive(Clone, Debug)]
pub(crate) struct Hello {
    pub(crate) style: Style,
    pub(crate) size: u64,
    /// HAS_FLAGS, FLUSH, TRIM and WRITE_ZEROES.
    pub(crate) flags: u16,
    pub(crate) blocks: Option<(u32, u32, u32)>,
}

impl Hello {
    pub(crate) fn new(style: Style) -> Self {
        Self {
            style,
            size: 1 << 20,
            flags: 0b110_0101,
            blocks: Some((1, 4096, 32 << 20)),
        }
    }

    fn info_blocks(&self) -> Option<Vec<u8>> {
        let (min, preferred, max) = self.blocks?;
        let words = [min, preferred, max].map(u32::to_be_bytes).concat();
        Some([3u16.to_be_bytes().to_vec(), words].concat())
    }
}

/// NBD_INFO_EXPORT.
pub(crate) fn info_export(size: u64, flags: u16) -> Vec<u8> {
    [
        &0u16.to_be_bytes()[..],
        &size.to_be_bytes(),
        &flags.to_be_bytes(),
    ]
    .concat()
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) style: Style,
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Asked {
    /// A chunk in answer to it.
    pub(crate) fn chunk(&self, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        self.claiming(flags, kind, payload.len() as u64, payload)
    }

    /// The same, where the header may lie about the length.
    pub(crate) fn claiming(&self, flags: u16, kind: u16, length: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let extended = self.style == Style::Extended;
        let magic: u32 = if extended { 0x6e8a_278c } else { 0x668e_33ef };
        bytes.extend(magic.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        if extended {
            bytes.extend(self.offset.to_be_bytes());
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    /// All that a correct server sends to a READ of zeros but `byte`.
    pub(crate) fn all(&self, byte: u8) -> Vec<u8> {
        let bytes = vec![byte; usize::try_from(self.length).unwrap()];
        match self.style {
            Style::Simple => [simple(self.cookie, 0), bytes].concat(),
            _ => self.chunk(DONE, DATA, &data(self.offset, &bytes)),
        }
    }

    /// A block status chunk of the style's own kind.
    pub(crate) fn status(&self, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        if self.style == Style::Structured {
            return self.chunk(DONE, STATUS, &status(id, extents));
        }
        let wide: Vec<(u64, u64)> = extents
            .iter()
            .map(|(l, f)| ((*l).into(), (*f).into()))
            .collect();
        self.chunk(DONE, STATUS_EXT, &status_ext(id, extents.len(), &wide))
    }
}

pub(crate) fn simple(cookie: u64, error: u32) -> Vec<u8> {
    let mut bytes = 0x6744_6698u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

pub(crate) fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

pub(crate) fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

pub(crate) fn status(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    for (length, flags) in extents {
        bytes.extend(length.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

pub(crate) fn status_ext(id: u32, count: usize, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend(u32::try_from(count).unwrap().to_be_bytes());
    for (length, flags) in extents {
        bytes.extend(length.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

/// An error's number, its message, and what follows.
pub(crate) fn error(number: u32, message: &str, tail: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    [&number.to_be_bytes()[..], &length, message.as_bytes(), tail].concat()
}

/// The server's end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: UnixStream,
    style: Style,
}

impl Peer {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn read<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub(crate) async fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.read().await)
    }

    pub(crate) async fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.read().await)
    }

    async fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.read().await)
    }

    /// Sends the greeting with handshake flags and takes the client's.
    pub(crate) async fn greet(&mut self, flags: u16) {
        self.send(b"NBDMAGICIHAVEOPT").await;
        self.send(&flags.to_be_bytes()).await;
        assert_eq!(self.u32().await, u32::from(flags & 3));
    }

    /// Takes an option.
    pub(crate) async fn option(&mut self) -> (u32, Vec<u8>) {
        assert_eq!(&self.read::<8>().await, b"IHAVEOPT");
        let option = self.u32().await;
        let mut data = vec![0; usize::try_from(self.u32().await).unwrap()];
        self.stream.read_exact(&mut data).await.unwrap();
        (option, data)
    }

    pub(crate) async fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.option_reply_claiming(option, kind, length).await;
        self.send(data).await;
    }

    /// Only the header of a reply to an option.
    pub(crate) async fn option_reply_claiming(&mut self, option: u32, kind: u32, length: u32) {
        let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        bytes.extend([option, kind, length].map(u32::to_be_bytes).concat());
        self.send(&bytes).await;
    }

    /// Answers the options that choose the style; the next one is the caller's.
    pub(crate) async fn agree(&mut self) {
        self.agree_to(self.style).await;
    }

    /// Agrees to another style than the client was told to expect.
    pub(crate) async fn agree_to(&mut self, style: Style) {
        assert_eq!(self.option().await, (EXTENDED_HEADERS, vec![]));
        if style == Style::Extended {
            return self.option_reply(EXTENDED_HEADERS, ACK, b"").await;
        }
        self.option_reply(EXTENDED_HEADERS, ERR_UNSUP, b"no such option")
            .await;
        assert_eq!(self.option().await, (STRUCTURED_REPLY, vec![]));
        let kind = match style {
            Style::Structured => ACK,
            _ => ERR_UNSUP,
        };
        self.option_reply(STRUCTURED_REPLY, kind, b"").await;
    }

    /// Gives the context, where chunks allow one.
    pub(crate) async fn give_context(&mut self) {
        if self.style == Style::Simple {
            return;
        }
        let (option, data) = self.option().await;
        let wanted = [
            b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0f".as_slice(),
            CONTEXT.as_bytes(),
        ];
        assert_eq!((option, data), (SET_META_CONTEXT, wanted.concat()));
        let context = [&ID.to_be_bytes(), CONTEXT.as_bytes()].concat();
        self.option_reply(SET_META_CONTEXT, META_CONTEXT, &context)
            .await;
        self.option_reply(SET_META_CONTEXT, ACK, b"").await;
    }

    /// Answers GO.
    pub(crate) async fn go(&mut self, hello: &Hello) {
        let (option, data) = self.option().await;
        assert_eq!(
            (option, data.as_slice()),
            (GO, b"\0\0\0\x04disk\0\x01\0\x03".as_slice())
        );
        self.option_reply(GO, INFO, &info_export(hello.size, hello.flags))
            .await;
        if let Some(blocks) = hello.info_blocks() {
            self.option_reply(GO, INFO, &blocks).await;
        }
        self.option_reply(GO, ACK, b"").await;
    }

    /// Takes a request's header.
    pub(crate) async fn request(&mut self) -> Asked {
        self.request_or_end().await.expect("a request")
    }

    /// The same; `None` when the client has hung up instead.
    pub(crate) async fn request_or_end(&mut self) -> Option<Asked> {
        let magic = self.stream.read_u32().await.ok()?;
        let extended = self.style == Style::Extended;
        assert_eq!(magic, if extended { 0x21e4_1c71 } else { 0x2560_9513 });
        Some(Asked {
            style: self.style,
            flags: self.u16().await,
            command: self.u16().await,
            cookie: self.u64().await,
            offset: self.u64().await,
            length: match extended {
                true => self.u64().await,
                false => self.u32().await.into(),
            },
        })
    }

    /// Takes a payload.
    pub(crate) async fn payload(&mut self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    /// Sends until the client takes no more.
    pub(crate) async fn send_what_is_taken(&mut self, bytes: &[u8]) {
        let _hung_up = self.stream.write_all(bytes).await;
    }

    /// Ends the server's half of the connection.
    pub(crate) async fn shut(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Waits until the client has hung up; whatever it still sends is dropped.
    pub(crate) async fn hung_up(&mut self) {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _end = self.stream.read_to_end(&mut rest).await;
    }
}

/// Runs a client's handshake against a script.
pub(crate) async fn shake<F>(
    style: Style,
    deadline: Duration,
    script: impl FnOnce(Peer) -> F,
) -> Result<Client>
where
    F: Future<Output = Peer>,
{
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Peer {
        stream: theirs,
        style,
    };
    let context = (style != Style::Simple).then_some(CONTEXT);
    let both = async { tokio::join!(Client::over(ours, "disk", context, deadline), script(peer)) };
    let (client, _peer) = tokio::time::timeout(LIMIT, both).await.unwrap();
    client
}

/// A client past the handshake, and its server.
pub(crate) async fn connect(hello: &Hello, deadline: Duration) -> (Client, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer {
        stream: theirs,
        style: hello.style,
    };
    let context = (hello.style != Style::Simple).then_some(CONTEXT);
    let script = async {
        peer.greet(3).await;
        peer.agree().await;
        peer.give_context().await;
        peer.go(hello).await;
    };
    let (client, ()) = tokio::join!(Client::over(ours, "disk", context, deadline), script);
    (client.unwrap(), peer)
}

/// A buffer of `length` bytes that are not what servers here send.
pub(crate) async fn buffer(length: usize) -> Buffer {
    let mut buffer = Pool::new(1).take(length).await;
    buffer.fill(0xee);
    buffer
}

/// The error has the kind, and its source names the lie.
pub(crate) fn assert_says(error: &Error, kind: Kind, says: &str) {
    let chain = error.chain();
    assert_eq!(error.kind(), kind, "{chain}");
    let source = std::error::Error::source(error).map(ToString::to_string);
    assert!(
        source.is_some_and(|it| it.contains(says)),
        "{chain:?} does not say {says:?}"
    );
}

/// Nothing can be asked any more, for the same reason; and the socket is closed
/// although the client is still there: QEMU must not write to one that nobody reads.
pub(crate) async fn assert_dead(client: &Client, peer: &mut Peer, kind: Kind, says: &str) {
    let later = client.submit_read(0, buffer(1).await).await;
    assert_says(&later.expect_err("the connection is dead"), kind, says);
    tokio::time::timeout(LIMIT, peer.hung_up())
        .await
        .expect("the client hangs up");
}

/// A read still works.
pub(crate) async fn assert_lives(client: &Client, peer: &mut Peer) {
    let ticket = client.submit_read(512, buffer(1024).await).await.unwrap();
    let asked = peer.request().await;
    peer.send(&asked.all(0x5a)).await;
    let bytes = ticket.await.unwrap();
    assert!(bytes.len() == 1024 && bytes.iter().all(|byte| *byte == 0x5a));
}
