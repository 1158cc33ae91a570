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
