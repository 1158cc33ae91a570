//! Requests under way, and how far their replies are: enough of the protocol to know when
//! which one is answered, whatever is in the replies. Pure.

use std::collections::HashMap;

use crate::nbd::wire::{
    DEFAULT_MAX_PAYLOAD, Replies, ReplyHeader, Request, chunk, command, u32_at,
};

/// Bytes that the reply to any request may have, besides what it is about: headers, and
/// an error with its message.
const OVERHEAD: u64 = 8 * 1024;

/// Bytes that the reply to a BLOCK_STATUS may have: QEMU sends at most 131,072 extents a
/// context, and has three contexts.
const STATUS: u64 = 4 * 1024 * 1024;

/// Most bytes that the reply to any request may have.
pub(super) const MOST: u64 = most_of_read(DEFAULT_MAX_PAYLOAD as u64);

/// A read that comes in the smallest of pieces, sectors, has so many bytes at most.
const fn most_of_read(length: u64) -> u64 {
    length + length / 16 + OVERHEAD
}

/// Most bytes that the reply to a request may have.
pub(super) fn most(request: &Request) -> u64 {
    match request.command {
        // A longer one is refused.
        command::READ => most_of_read(request.length.min(DEFAULT_MAX_PAYLOAD.into())),
        command::BLOCK_STATUS => STATUS,
        _ => OVERHEAD,
    }
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Open<T> {
    token: T,
    /// Bytes behind a simple reply without an error.
    data: u64,
    /// Bytes that the reply may have still.
    left: u64,
}

/// The requests of one connection, each with a token that comes back with its reply.
#[derive(Debug)]
pub(super) struct Ledger<T> {
    open: HashMap<u64, Open<T>>,
    /// What there is of the header that is being read.
    header: Vec<u8>,
    /// Bytes to come behind the last header.
    rest: u64,
    /// The request whose reply ends with them.
    ends: Option<u64>,
}

impl<T> Default for Ledger<T> {
    fn default() -> Self {
        Self {
            open: HashMap::new(),
            header: Vec::new(),
            rest: 0,
            ends: None,
        }
    }
}

impl<T> Ledger<T> {
    /// Whether a request of this cookie is not answered yet. No second one may be sent:
    /// nobody could tell their replies apart.
    pub(super) fn is_open(&self, cookie: u64) -> bool {
        self.open.contains_key(&cookie)
    }

    /// A request goes out.
    pub(super) fn ask(&mut self, request: &Request, token: T) {
        let is_read = request.command == command::READ;
        let open = Open {
            token,
            data: if is_read { request.length } else { 0 },
            left: most(request),
        };
        self.open.insert(request.cookie, open);
    }

    /// Bytes of replies have come, cut anywhere: the tokens of the requests that are
    /// answered with them.
    ///
    /// # Errors
    /// A lie; the connection is of no use then.
    pub(super) fn hear(&mut self, mut bytes: &[u8]) -> Result<Vec<T>, &'static str> {
        let mut answered = Vec::new();
        while !bytes.is_empty() {
            bytes = if self.rest > 0 {
                self.pass(bytes)
            } else {
                self.read_header(bytes)?
            };
            if self.rest == 0
                && let Some(cookie) = self.ends.take()
            {
                answered.extend(self.open.remove(&cookie).map(|open| open.token));
            }
        }
        Ok(answered)
    }

    fn pass<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let rest = usize::try_from(self.rest).unwrap_or(usize::MAX);
        let (passed, bytes) = bytes.split_at(rest.min(bytes.len()));
        self.rest -= passed.len() as u64;
        bytes
    }

    fn read_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], &'static str> {
        const MAGIC: usize = 4;
        let mut length = MAGIC;
        if self.header.len() >= MAGIC {
            length = self.kind()?.header_bytes();
        }
        let missing = length - self.header.len();
        let (found, bytes) = bytes.split_at(missing.min(bytes.len()));
        self.header.extend(found);
        if self.header.len() == length && length > MAGIC {
            let header = ReplyHeader::decode(self.kind()?, &self.header);
            let is_simple = self.kind()? == Replies::Simple;
            self.header.clear();
            self.begin(&header, is_simple, length)?;
        }
        Ok(bytes)
    }

    fn kind(&self) -> Result<Replies, &'static str> {
        match Replies::of_magic(u32_at(&self.header, 0)) {
            Some(kind @ (Replies::Simple | Replies::Structured)) => Ok(kind),
            _ => Err("a reply has a wrong magic"),
        }
    }

    /// A header has been read, of so many bytes.
    fn begin(
        &mut self,
        header: &ReplyHeader,
        is_simple: bool,
        length: usize,
    ) -> Result<(), &'static str> {
        let open = self.open.get_mut(&header.cookie);
        let open = open.ok_or("a reply to what nobody asked")?;
        self.rest = match (is_simple, header.error) {
            (true, 0) => open.data,
            (true, _) => 0,
            (false, _) => header.length,
        };
        let left = open.left.checked_sub(length as u64 + self.rest);
        open.left = left.ok_or("a reply is longer than it can be")?;
        if header.flags & chunk::FLAG_DONE != 0 {
            self.ends = Some(header.cookie);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::by_hand::{chunk as part, request, simple};

    const DONE: u16 = chunk::FLAG_DONE;

    /// A ledger with these requests; each one's token is its cookie.
    fn asked(requests: &[Vec<u8>]) -> Ledger<u64> {
        let mut ledger = Ledger::default();
        for bytes in requests {
            let request = Request::decode(bytes[..].try_into().unwrap()).unwrap();
            assert!(!ledger.is_open(request.cookie));
            ledger.ask(&request, request.cookie);
            assert!(ledger.is_open(request.cookie));
        }
        ledger
    }

    #[test]
    fn each_kind_of_reply() {
        let mut ledger = asked(&[
            request(command::READ, 1, 0, 3),
            request(command::READ, 2, 0, 512),
            request(command::READ, 3, 0, 4096),
            request(command::BLOCK_STATUS, 4, 0, 4096),
            request(command::FLUSH, 5, 0, 0),
        ]);
        let says = [
            part(0, chunk::OFFSET_DATA, 3, &[0; 8 + 512]),
            [simple(0, 1), b"abc".to_vec()].concat(),
            simple(5, 2),
            part(0, chunk::OFFSET_HOLE, 3, &[0; 12]),
            part(DONE, chunk::BLOCK_STATUS, 4, &[0; 12]),
            part(DONE, chunk::NONE, 3, &[]),
            simple(0, 5),
        ];
        let answered: Vec<_> = says
            .iter()
            .map(|bytes| ledger.hear(bytes).unwrap())
            .collect();
        let expected: [&[u64]; 7] = [&[], &[1], &[2], &[], &[4], &[3], &[5]];
        assert_eq!(answered, expected);
        assert!((1..=5).all(|cookie| !ledger.is_open(cookie)));
    }

    #[test]
    fn replies_that_cannot_be() {
        let mut extended = 0x6e8a_278c_u32.to_be_bytes().to_vec();
        extended.resize(32, 0);
        let length = usize::try_from(STATUS).unwrap();
        for (says, why) in [
            (vec![0; 16], "a wrong magic"),
            (extended, "a wrong magic"),
            (simple(0, 2), "nobody asked"),
            (part(DONE, chunk::NONE, 2, &[]), "nobody asked"),
            (simple(0, 1).repeat(2), "nobody asked"),
            (
                part(0, chunk::BLOCK_STATUS, 1, &vec![0; length]),
                "longer than",
            ),
            (
                part(0, chunk::NONE, 1, &[]).repeat(length / 20 + 1),
                "longer than",
            ),
        ] {
            let mut ledger = asked(&[request(command::BLOCK_STATUS, 1, 0, 4096)]);
            let error = ledger.hear(&says).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_a_reply_may_have_covers_what_the_protocol_makes_of_it() {
        let read = |length| Request {
            flags: 0,
            command: command::READ,
            cookie: 0,
            offset: 0,
            length,
        };
        for sectors in [1, 2, 255, 2048, 65536] {
            let smallest = sectors * (512 + 28) + 20;
            assert!(smallest <= most(&read(sectors * 512)), "{sectors}");
        }
        assert_eq!(most(&read(u32::MAX.into())), MOST);
        const { assert!(STATUS <= MOST) };
    }

    proptest! {
        /// Where the bytes are cut makes no difference.
        #[test]
        fn replies_cut_anywhere(cuts in proptest::collection::vec(1usize..60, 1..40), order: u8) {
            let requests = [
                request(command::READ, 1, 0, 100),
                request(command::READ, 2, 0, 30),
                request(command::TRIM, 3, 0, 30),
            ];
            let mut replies = [
                part(DONE, chunk::OFFSET_DATA, 1, &[0x67; 108]),
                [simple(0, 2), vec![0x44; 30]].concat(),
                part(DONE, chunk::ERROR_BIT | 1, 3, &[0, 0, 0, 1, 0, 0]),
            ];
            replies.rotate_left(usize::from(order % 3));
            let says = replies.concat();
            let (mut whole, mut cut) = (asked(&requests), asked(&requests));
            let expected = whole.hear(&says).unwrap();
            prop_assert_eq!(expected.len(), 3);
            let (mut answered, mut rest) = (Vec::new(), &says[..]);
            for length in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*length).min(rest.len()));
                answered.extend(cut.hear(now).unwrap());
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(answered, expected);
        }

        /// Whatever a server says is taken or refused, and takes no memory.
        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..3) {
            let mut says = match kind {
                0 => vec![],
                1 => simple(0, 1),
                _ => part(0, chunk::OFFSET_DATA, 1, &[]),
            };
            says.extend(&bytes);
            let mut ledger = asked(&[request(command::READ, 1, 0, 16)]);
            let _lie = ledger.hear(&says);
            prop_assert!(ledger.header.len() <= 20);
        }
    }
}
