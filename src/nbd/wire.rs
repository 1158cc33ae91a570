//! Numbers and layouts of the wire, all big-endian. Pure.

/// "Fixed newstyle negotiation".
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// What every option starts with.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// What every reply to an option starts with.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Server's handshake flag: it can say no to an option.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Both sides' handshake flag: no 124 zero bytes behind NBD_OPT_EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Options, "Option types".
pub mod option {
    /// Enters transmission, without a way to say no.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the negotiation.
    pub const ABORT: u32 = 2;
    /// The names of the exports.
    pub const LIST: u32 = 3;
    /// Encrypts all that follows.
    pub const START_TLS: u32 = 5;
    /// What GO would tell.
    pub const INFO: u32 = 6;
    /// Enters transmission.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// The meta contexts that there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// One meta context, for block status.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Structured replies with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options, "Option reply types".
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name before the ACK.
    pub const SERVER: u32 = 2;
    /// A piece of information before the ACK.
    pub const INFO: u32 = 3;
    /// A meta context before the ACK.
    pub const META_CONTEXT: u32 = 4;
    /// All types from here on are refusals.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The server knows it, and does not want to.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
}

/// Information types of NBD_OPT_GO.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod flag {
    /// The others mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// NBD_CMD_FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// NBD_CMD_TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// NBD_CMD_WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Connections see each other's writes after a flush.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// "Request types", and their flags.
pub mod command {
    /// Bytes.
    pub const READ: u16 = 0;
    /// Bytes to the server.
    pub const WRITE: u16 = 1;
    /// Goodbye.
    pub const DISC: u16 = 2;
    /// All writes to stable storage.
    pub const FLUSH: u16 = 3;
    /// A range is not needed any more.
    pub const TRIM: u16 = 4;
    /// Zeros without bytes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What a range is.
    pub const BLOCK_STATUS: u16 = 7;
    /// WRITE_ZEROES: keep the room allocated.
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    /// Extended headers: the length is not that of a payload.
    pub const FLAG_NONE: u16 = 0;
    /// Extended headers: the length is that of the payload behind the request.
    pub const FLAG_PAYLOAD_LEN: u16 = 1 << 5;
}

/// "Structured reply types".
pub mod chunk {
    /// Nothing; ends a reply.
    pub const NONE: u16 = 0;
    /// Bytes, behind their offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros: offset and length.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id, then 32-bit extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context id and count, then 64-bit extents.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// All types from here on are errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
    /// The last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
}

/// What a request starts with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The same, with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// What a simple reply starts with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a structured reply's chunk starts with.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// What an extended reply's chunk starts with.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string of the protocol ("Values").
pub const MAX_STRING: usize = 4096;
/// Longest reply to an option that is read; strings and a few numbers fit.
pub const MAX_OPTION_REPLY: u32 = 64 * 1024;
/// Most replies to one option: QEMU sends a handful.
pub const MAX_OPTION_REPLIES: usize = 256;
/// Longest payload that every server takes ("Block size constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 * 1024 * 1024;
/// Most extents in one reply that are read; QEMU sends at most 131,072.
pub const MAX_EXTENTS: u32 = 1024 * 1024;
/// Longest message of an error chunk.
pub const MAX_ERROR_PAYLOAD: u64 = 6 + MAX_STRING as u64 + 8;

/// How replies look, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// A header, then all bytes.
    Simple,
    /// Chunks with 32-bit lengths.
    Structured,
    /// Chunks with 64-bit lengths, and requests too.
    Extended,
}

impl Replies {
    /// The kind of a reply that starts with `magic`. A server may answer some
    /// requests with simple replies whatever was negotiated ("Simple reply message").
    #[must_use]
    pub fn of_magic(magic: u32) -> Option<Self> {
        match magic {
            SIMPLE_REPLY_MAGIC => Some(Self::Simple),
            STRUCTURED_REPLY_MAGIC => Some(Self::Structured),
            EXTENDED_REPLY_MAGIC => Some(Self::Extended),
            _ => None,
        }
    }

    /// Bytes of a reply's header.
    #[must_use]
    pub fn header_bytes(self) -> usize {
        match self {
            Self::Simple => 16,
            Self::Structured => 20,
            Self::Extended => 32,
        }
    }

    /// Longest range of one request without payload.
    #[must_use]
    pub fn max_range(self) -> u64 {
        match self {
            Self::Extended => i64::MAX.unsigned_abs(),
            // A multiple of every block size.
            _ => u64::from(u32::MAX) & !(64 * 1024 - 1),
        }
    }
}

/// A request, "Request message" and "Extended request message".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`command`].
    pub flags: u16,
    /// Of [`command`].
    pub command: u16,
    /// Names the request in its reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; at most [`Replies::max_range`].
    pub length: u64,
}

impl Request {
    /// Bytes of a header, but for extended ones.
    pub const BYTES: usize = 28;

    /// Reads a header; `None`: its magic is another one.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        (u32_at(bytes, 0) == REQUEST_MAGIC).then(|| Self {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length: u32_at(bytes, 24).into(),
        })
    }

    /// The header's bytes. `None` when the length does not fit.
    #[must_use]
    pub fn encode(&self, replies: Replies) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(32);
        let extended = replies == Replies::Extended;
        let magic = if extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        let payload = extended && self.command == command::WRITE;
        let flags = if payload {
            self.flags | command::FLAG_PAYLOAD_LEN
        } else {
            self.flags
        };
        bytes.extend(magic.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        if extended {
            bytes.extend(self.length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(self.length).ok()?.to_be_bytes());
        }
        Some(bytes)
    }
}

/// A reply's header, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// The request's.
    pub cookie: u64,
    /// Simple replies: the error. Others: 0.
    pub error: u32,
    /// Of [`chunk`]; simple replies: [`chunk::FLAG_DONE`].
    pub flags: u16,
    /// Of [`chunk`]; simple replies: [`chunk::NONE`].
    pub kind: u16,
    /// Extended replies: the request's offset.
    pub offset: Option<u64>,
    /// Bytes behind the header; simple replies: 0, the request decides.
    pub length: u64,
}

/// A slice's first bytes as a number; 0 where it is too short, which the callers'
/// fixed lengths rule out.
macro_rules! number {
    ($name:ident, $type:ty) => {
        /// The number at a place.
        #[must_use]
        pub fn $name(bytes: &[u8], at: usize) -> $type {
            const SIZE: usize = size_of::<$type>();
            let mut number = [0; SIZE];
            if let Some(found) = bytes.get(at..at + SIZE) {
                number.copy_from_slice(found);
            }
            <$type>::from_be_bytes(number)
        }
    };
}
number!(u16_at, u16);
number!(u32_at, u32);
number!(u64_at, u64);

impl ReplyHeader {
    /// Reads the first `kind.header_bytes()` bytes of a reply whose magic said
    /// that it is of this kind ([`Replies::of_magic`]).
    #[must_use]
    pub fn decode(kind: Replies, bytes: &[u8]) -> Self {
        let cookie = u64_at(bytes, 8);
        if kind == Replies::Simple {
            return Self {
                cookie,
                error: u32_at(bytes, 4),
                flags: chunk::FLAG_DONE,
                kind: chunk::NONE,
                offset: None,
                length: 0,
            };
        }
        let extended = kind == Replies::Extended;
        Self {
            cookie,
            error: 0,
            flags: u16_at(bytes, 4),
            kind: u16_at(bytes, 6),
            offset: extended.then(|| u64_at(bytes, 16)),
            length: if extended {
                u64_at(bytes, 24)
            } else {
                u64::from(u32_at(bytes, 16))
            },
        }
    }
}
