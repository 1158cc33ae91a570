//! One request's reply, held against the request. Pure: the client brings bytes.
//!
//! The legal replies, chunk by chunk (`*` any number, in any order; every reply
//! ends with the chunk that has the flag DONE, which may be of kind NONE):
//!
//! ```text
//! READ          simple(ok) + all bytes                          simple replies only
//!               (OFFSET_DATA | OFFSET_HOLE)*                    covering it, once
//!               (OFFSET_DATA | OFFSET_HOLE | ERROR)*            failed; bytes dropped
//! BLOCK_STATUS  BLOCK_STATUS[_EXT]                              once, our context
//!               ERROR*
//! others        simple(ok | error), NONE, ERROR*
//! ```

use std::ops::Range;

use crate::error::{Error, Kind};
use crate::nbd::status;
use crate::nbd::wire::{
    MAX_ERROR_PAYLOAD, MAX_EXTENTS, Replies, ReplyHeader, chunk, command, u16_at, u32_at, u64_at,
};

/// Most chunks of one reply: a READ of 32 MiB in sectors, and the end.
const MAX_CHUNKS: usize = 64 * 1024 + 1;

/// What is known of a request that waits for its reply.
#[derive(Debug)]
pub(super) struct Reply {
    command: u16,
    range: Range<u64>,
    replies: Replies,
    context: Option<u32>,
    chunks: usize,
    /// READ: what came, sorted, without touching neighbours.
    covered: Vec<Range<u64>>,
    extents: Option<Vec<(u64, u64)>>,
    error: Option<Error>,
}

/// What to read behind a chunk's header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Nothing.
    None,
    /// So many bytes, for [`Reply::small`].
    Small(usize),
    /// An offset (8 bytes), then so many bytes: see [`Reply::place`].
    Data(u64),
    /// The bytes of the whole request.
    All,
}

/// What a complete reply says.
#[derive(Debug)]
pub(super) enum Verdict {
    Done,
    Extents(Vec<(u64, u64)>),
    Refused(Error),
}

impl Reply {
    pub(super) fn new(
        command: u16,
        range: Range<u64>,
        replies: Replies,
        context: Option<u32>,
    ) -> Self {
        Self {
            command,
            range,
            replies,
            context,
            chunks: 0,
            covered: Vec::new(),
            extents: None,
            error: None,
        }
    }

    /// Takes a header: what follows it.
    ///
    /// # Errors
    /// The lie in it.
    pub(super) fn header(&mut self, header: &ReplyHeader, simple: bool) -> Result<Body, String> {
        self.chunks += 1;
        if self.chunks > MAX_CHUNKS {
            return Err(format!("a reply of more than {MAX_CHUNKS} chunks"));
        }
        if simple {
            return self.simple(header);
        }
        if header
            .offset
            .is_some_and(|offset| offset != self.range.start)
        {
            return Err(format!(
                "a reply for offset {:?} to a request at {}",
                header.offset, self.range.start
            ));
        }
        let length = usize::try_from(header.length).map_err(|error| error.to_string())?;
        match (header.kind, self.command) {
            (chunk::NONE, _) if length != 0 => Err(format!("an empty chunk with {length} bytes")),
            (chunk::NONE, _) if header.flags & chunk::FLAG_DONE == 0 => {
                Err("an empty chunk that ends nothing".into())
            }
            (chunk::NONE, _) => Ok(Body::None),
            (chunk::OFFSET_DATA, command::READ) => match header.length.checked_sub(8) {
                Some(bytes) if (1..=self.length()).contains(&bytes) => Ok(Body::Data(bytes)),
                _ => Err(format!(
                    "a data chunk of {length} bytes to a request for {}",
                    self.length()
                )),
            },
            (chunk::OFFSET_HOLE, command::READ) if length == 12 => Ok(Body::Small(length)),
            (chunk::BLOCK_STATUS, command::BLOCK_STATUS) if self.replies == Replies::Structured => {
                self.status_body(length, 4, 8)
            }
            (chunk::BLOCK_STATUS_EXT, command::BLOCK_STATUS)
                if self.replies == Replies::Extended =>
            {
                self.status_body(length, 8, 16)
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                if length < 6 || header.length > MAX_ERROR_PAYLOAD {
                    return Err(format!("an error chunk of {length} bytes"));
                }
                Ok(Body::Small(length))
            }
            (kind, command) => Err(format!(
                "a chunk of kind {kind} with {length} bytes to command {}",
                command_name(command)
            )),
        }
    }

    fn simple(&mut self, header: &ReplyHeader) -> Result<Body, String> {
        let structured_due = matches!(self.command, command::READ | command::BLOCK_STATUS);
        if self.replies == Replies::Extended
            || (structured_due && self.replies == Replies::Structured)
        {
            return Err("a simple reply where a structured one is due".into());
        }
        if self.chunks > 1 {
            return Err("a simple reply in the middle of a structured one".into());
        }
        if header.error != 0 {
            self.refuse(header.error, "", None);
            return Ok(Body::None);
        }
        Ok(if self.command == command::READ {
            Body::All
        } else {
            Body::None
        })
    }

    fn status_body(&self, length: usize, head: usize, each: usize) -> Result<Body, String> {
        let most = usize::try_from(MAX_EXTENTS).unwrap_or(usize::MAX);
        let list = length
            .checked_sub(head)
            .filter(|list| list.is_multiple_of(each) && *list > 0);
        match list {
            Some(list) if list / each <= most && self.extents.is_none() => Ok(Body::Small(length)),
            Some(_) if self.extents.is_some() => Err("a second block status chunk".into()),
            _ => Err(format!("a block status chunk of {length} bytes")),
        }
    }

    /// Takes the bytes behind the header of a chunk that is no data.
    ///
    /// # Errors
    /// The lie in them.
    pub(super) fn small(&mut self, kind: u16, bytes: &[u8]) -> Result<Option<Range<u64>>, String> {
        match kind {
            chunk::OFFSET_HOLE => self
                .place(u64_at(bytes, 0), u64::from(u32_at(bytes, 8)))
                .map(Some),
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let wide = kind == chunk::BLOCK_STATUS_EXT;
                if Some(u32_at(bytes, 0)) != self.context {
                    return Err(format!(
                        "block status of context {}, which was not asked for",
                        u32_at(bytes, 0)
                    ));
                }
                let list = bytes.get(if wide { 8 } else { 4 }..).unwrap_or_default();
                if wide && u64::from(u32_at(bytes, 4)).checked_mul(16) != Some(list.len() as u64) {
                    return Err(format!(
                        "{} extents in {} bytes",
                        u32_at(bytes, 4),
                        list.len()
                    ));
                }
                self.extents = Some(status::extents(list, wide, self.length())?);
                Ok(None)
            }
            _ => self.error_chunk(kind, bytes).map(|()| None),
        }
    }

    fn error_chunk(&mut self, kind: u16, bytes: &[u8]) -> Result<(), String> {
        let (error, length) = (u32_at(bytes, 0), usize::from(u16_at(bytes, 4)));
        let Some(message) = bytes.get(6..6 + length) else {
            return Err(format!(
                "an error message of {length} bytes in a chunk of {}",
                bytes.len()
            ));
        };
        if error == 0 {
            return Err("an error chunk without an error".into());
        }
        let offset = match (kind, bytes.len() - 6 - length) {
            (chunk::ERROR_OFFSET, 8) => {
                let offset = u64_at(bytes, 6 + length);
                if !self.range.contains(&offset) {
                    return Err(format!("an error at offset {offset}, outside the request"));
                }
                Some(offset)
            }
            (chunk::ERROR_OFFSET, _) => return Err("an error chunk without its offset".into()),
            _ => None,
        };
        self.refuse(error, &String::from_utf8_lossy(message), offset);
        Ok(())
    }

    fn refuse(&mut self, error: u32, message: &str, offset: Option<u64>) {
        if self.error.is_none() {
            let doing = format!(
                "asking the NBD server for command {}",
                command_name(self.command)
            );
            let refused = Error::new(Kind::NbdRefused, doing)
                .because(format!("{} {message}", errno_name(error)).trim().to_owned());
            self.error = Some(refused.at(offset.unwrap_or(self.range.start)));
        }
    }

    /// Takes the place of bytes or zeros that came: where they belong in the
    /// request's buffer.
    ///
    /// # Errors
    /// When they lie outside the request, or over others.
    pub(super) fn place(&mut self, offset: u64, bytes: u64) -> Result<Range<u64>, String> {
        let end = offset
            .checked_add(bytes)
            .filter(|end| *end <= self.range.end && bytes > 0);
        let Some(end) = end.filter(|_| offset >= self.range.start) else {
            return Err(format!(
                "a chunk of {bytes} bytes at {offset}, outside the request {:?}",
                self.range
            ));
        };
        let at = self.covered.partition_point(|known| known.end <= offset);
        if self.covered.get(at).is_some_and(|known| known.start < end) {
            return Err(format!("a chunk at {offset} over another"));
        }
        match at
            .checked_sub(1)
            .and_then(|before| self.covered.get_mut(before))
        {
            Some(before) if before.end == offset => before.end = end,
            _ => self.covered.insert(at, offset..end),
        }
        Ok(offset - self.range.start..end - self.range.start)
    }

    /// The reply is complete.
    ///
    /// # Errors
    /// What is missing in it.
    pub(super) fn finish(self, simple: bool) -> Result<Verdict, String> {
        if let Some(error) = self.error {
            return Ok(Verdict::Refused(error));
        }
        match self.command {
            command::READ if !simple => {
                let mut next = self.range.start;
                for part in &self.covered {
                    if part.start != next {
                        return Err(format!(
                            "the reply lacks the bytes from {next} to {}",
                            part.start
                        ));
                    }
                    next = part.end;
                }
                if next != self.range.end {
                    return Err(format!(
                        "the reply lacks the bytes from {next} to {}",
                        self.range.end
                    ));
                }
                Ok(Verdict::Done)
            }
            command::BLOCK_STATUS => match self.extents {
                Some(extents) => Ok(Verdict::Extents(extents)),
                None => Err("the reply has no block status".into()),
            },
            _ => Ok(Verdict::Done),
        }
    }

    fn length(&self) -> u64 {
        self.range.end - self.range.start
    }
}

fn command_name(command: u16) -> &'static str {
    match command {
        command::READ => "READ",
        command::WRITE => "WRITE",
        command::FLUSH => "FLUSH",
        command::TRIM => "TRIM",
        command::WRITE_ZEROES => "WRITE_ZEROES",
        command::BLOCK_STATUS => "BLOCK_STATUS",
        _ => "?",
    }
}

/// "Error values".
fn errno_name(error: u32) -> String {
    let name = match error {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        other => return format!("error {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: u64 = 1000;

    fn chunk_of(kind: u16, flags: u16, length: u64) -> ReplyHeader {
        ReplyHeader {
            cookie: 1,
            error: 0,
            flags,
            kind,
            offset: None,
            length,
        }
    }

    proptest! {
        #[test]
        fn a_read_is_done_when_each_byte_came_once(
            chunks in proptest::collection::vec((0u64..40, 1u64..20), 0..8), exact: bool,
        ) {
            // Half of the cases: pieces that fit together, in another order.
            let chunks: Vec<(u64, u64)> = if exact {
                let mut ends: Vec<u64> = chunks.iter().map(|(at, _)| at % 31 + 1).chain([32]).collect();
                ends.sort_unstable();
                ends.dedup();
                let mut starts = vec![0];
                starts.extend(ends.iter().take_while(|end| **end < 32));
                starts.into_iter().zip(ends).map(|(start, end)| (start, end.min(32) - start)).rev().collect()
            } else {
                chunks
            };
            let mut reply = Reply::new(command::READ, AT..AT + 32, Replies::Structured, None);
            let mut naive = [0u8; 32];
            for (at, bytes) in chunks {
                let inside = at + bytes <= 32;
                let fresh = inside && (at..at + bytes).all(|at| naive[usize::try_from(at).unwrap()] == 0);
                let place = reply.place(AT + at, bytes);
                prop_assert_eq!(place.is_ok(), fresh);
                let Ok(place) = place else { return Ok(()) };
                prop_assert_eq!(place.clone(), at..at + bytes);
                for at in place { naive[usize::try_from(at).unwrap()] = 1; }
            }
            prop_assert_eq!(reply.finish(false).is_ok(), naive.iter().all(|came| *came == 1));
        }

        #[test]
        fn arbitrary_replies_never_ask_for_more_than_the_limits(
            command in 0u16..9, wide: bool, simple: bool,
            headers in proptest::collection::vec(
                (prop_oneof![0u16..7, 0x8000u16..0x8004, any::<u16>()], any::<u16>(),
                 prop_oneof![0u64..64, any::<u64>()], any::<[u8; 64]>(), any::<u64>()),
                1..6),
        ) {
            let replies = if wide { Replies::Extended } else { Replies::Structured };
            let range = AT..AT + 4096;
            let mut reply = Reply::new(command, range.clone(), replies, Some(0));
            for (kind, flags, length, bytes, offset) in headers {
                let header = ReplyHeader { offset: wide.then_some(AT), ..chunk_of(kind, flags, length) };
                match reply.header(&header, simple) {
                    Err(_lie) => return Ok(()),
                    Ok(Body::None | Body::All) => {}
                    Ok(Body::Data(bytes)) => {
                        prop_assert!(bytes <= 4096);
                        if let Ok(place) = reply.place(offset, bytes) { prop_assert!(place.end <= 4096); }
                    }
                    Ok(Body::Small(length)) => {
                        prop_assert!(length <= 8 + 16 * usize::try_from(MAX_EXTENTS).unwrap());
                        // Bytes that are there; the client brings exactly as many.
                        let bytes: Vec<u8> = bytes.iter().copied().cycle().take(length).collect();
                        if let Ok(Some(hole)) = reply.small(kind, &bytes) { prop_assert!(hole.end <= 4096); }
                    }
                }
            }
            if let Ok(Verdict::Extents(extents)) = reply.finish(simple) {
                prop_assert!(extents.iter().map(|(length, _)| length).sum::<u64>() <= 4096);
            }
        }

        #[test]
        fn any_32_bytes_are_some_header(bytes: [u8; 32], magic in 0usize..3) {
            let kind = [Replies::Simple, Replies::Structured, Replies::Extended][magic];
            let header = ReplyHeader::decode(kind, &bytes);
            prop_assert_eq!(header.cookie.to_be_bytes(), <[u8; 8]>::try_from(&bytes[8..16]).unwrap());
            prop_assert_eq!(header.offset.is_some(), kind == Replies::Extended);
        }
    }

    #[test]
    fn a_read_of_sectors_fits_into_the_limit_of_chunks() {
        let size = 32 << 20;
        let mut reply = Reply::new(command::READ, 0..size, Replies::Structured, None);
        for at in (0..size).step_by(512) {
            let header = chunk_of(chunk::OFFSET_DATA, 0, 8 + 512);
            assert_eq!(reply.header(&header, false), Ok(Body::Data(512)));
            reply.place(at, 512).unwrap();
        }
        let end = chunk_of(chunk::NONE, chunk::FLAG_DONE, 0);
        assert_eq!(reply.header(&end, false), Ok(Body::None));
        assert!(matches!(reply.finish(false), Ok(Verdict::Done)));
    }
}
