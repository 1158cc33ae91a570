//! Framing, without I/O: bytes in, lines and payloads out.
//!
//! ```text
//!            bytes               `\n` found
//!   +------+ -------> collecting ----------> Line(bytes)
//!   | Line |          over the limit
//!   +------+ -------> skipping to the next `\n` --> LineError::TooLong, once
//!      | payload(n)
//!      v
//!  +---------+  n bytes are there
//!  | Payload | ------------------> Payload(bytes), then Line again
//!  +---------+
//! ```

use memchr::memchr;

/// A complete piece of the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// A line, without its `\n`.
    Line(Vec<u8>),
    /// The bytes asked for with [`Framer::payload`].
    Payload(Vec<u8>),
}

/// What can be wrong with the framing itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// A line went over the limit; it was dropped up to and with its `\n`.
    #[error("a line is longer than {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The input ended inside a line or a payload.
    #[error("the input ends inside a {0}")]
    Truncated(&'static str),
}

#[derive(Debug)]
enum State {
    Line,
    SkipLine,
    Payload(usize),
    SkipPayload(u64),
}

/// Cuts a byte stream into lines and the payloads behind them.
///
/// Memory: at most the limit plus what one call of [`Framer::push`] brought.
#[derive(Debug)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were given out already.
    consumed: usize,
    /// Bytes behind `consumed` that hold no `\n`.
    scanned: usize,
    limit: usize,
    state: State,
}

impl Framer {
    /// A framer for lines of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            consumed: 0,
            scanned: 0,
            limit,
            state: State::Line,
        }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next piece, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`LineError::TooLong`], once for each such line; the framer goes on behind it.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, LineError> {
        loop {
            match self.state {
                State::Payload(length) => {
                    if self.rest().len() < length {
                        return Ok(None);
                    }
                    let bytes = self.rest()[..length].to_vec();
                    self.consume(length);
                    self.state = State::Line;
                    return Ok(Some(Piece::Payload(bytes)));
                }
                State::SkipPayload(left) => {
                    let here = self.rest().len();
                    let skip = usize::try_from(left).map_or(here, |left| left.min(here));
                    self.consume(skip);
                    let left = left - skip as u64;
                    if left > 0 {
                        self.state = State::SkipPayload(left);
                        return Ok(None);
                    }
                    self.state = State::Line;
                }
                State::SkipLine => match memchr(b'\n', self.rest()) {
                    Some(end) => {
                        self.consume(end + 1);
                        self.state = State::Line;
                        return Err(LineError::TooLong { limit: self.limit });
                    }
                    None => {
                        self.consume(self.rest().len());
                        return Ok(None);
                    }
                },
                State::Line => match memchr(b'\n', &self.rest()[self.scanned..]) {
                    Some(at) if self.scanned + at <= self.limit => {
                        let end = self.scanned + at;
                        let line = self.rest()[..end].to_vec();
                        self.consume(end + 1);
                        return Ok(Some(Piece::Line(line)));
                    }
                    None if self.rest().len() <= self.limit => {
                        self.scanned = self.rest().len();
                        return Ok(None);
                    }
                    _ => self.state = State::SkipLine,
                },
            }
        }
    }

    /// The next piece is a payload of `length` bytes. Call it only straight
    /// after a line, with a length that was held against a limit.
    pub fn payload(&mut self, length: usize) {
        self.state = State::Payload(length);
    }

    /// Drops the next `length` bytes unseen: a payload that is not wanted.
    pub fn skip_payload(&mut self, length: u64) {
        self.state = State::SkipPayload(length);
    }

    /// To be asked at the end of the input.
    ///
    /// # Errors
    /// [`LineError::Truncated`] when the input ended inside a line or a payload.
    pub fn finish(&self) -> Result<(), LineError> {
        match self.state {
            State::Line if self.rest().is_empty() => Ok(()),
            State::Line | State::SkipLine => Err(LineError::Truncated("line")),
            State::Payload(_) | State::SkipPayload(_) => Err(LineError::Truncated("payload")),
        }
    }

    /// How many bytes were pushed and not given out yet.
    #[must_use]
    pub fn held(&self) -> usize {
        self.rest().len()
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.consumed..]
    }

    fn consume(&mut self, length: usize) {
        self.consumed += length;
        self.scanned = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(framer: &mut Framer, out: &mut Vec<Result<Piece, LineError>>) {
        loop {
            match framer.next_piece() {
                Ok(Some(piece)) => out.push(Ok(piece)),
                Ok(None) => return,
                Err(error) => out.push(Err(error)),
            }
        }
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_pieces(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            cuts in proptest::collection::vec(1usize..20, 1..50),
        ) {
            let mut whole = Framer::new(16);
            let mut expected = Vec::new();
            whole.push(&bytes);
            drain(&mut whole, &mut expected);

            let mut split = Framer::new(16);
            let mut got = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                split.push(head);
                drain(&mut split, &mut got);
                prop_assert!(split.buffer.len() <= 16 + 20 + 1);
                rest = tail;
            }
            prop_assert_eq!(got, expected);
            prop_assert_eq!(split.finish(), whole.finish());
        }
    }

    #[test]
    fn a_payload_may_hold_anything_and_a_long_line_is_told_once() {
        let mut framer = Framer::new(4);
        framer.push(b"head\n\n{\0\nnext\nover-long\nend\n");
        assert_eq!(framer.next_piece(), Ok(Some(Piece::Line(b"head".to_vec()))));
        framer.payload(4);
        assert_eq!(
            framer.next_piece(),
            Ok(Some(Piece::Payload(b"\n{\0\n".to_vec())))
        );
        assert_eq!(framer.next_piece(), Ok(Some(Piece::Line(b"next".to_vec()))));
        assert_eq!(framer.next_piece(), Err(LineError::TooLong { limit: 4 }));
        assert_eq!(framer.next_piece(), Ok(Some(Piece::Line(b"end".to_vec()))));
        assert_eq!(framer.next_piece(), Ok(None));
        framer.skip_payload(3);
        framer.push(b"xyzab");
        assert_eq!(framer.next_piece(), Ok(None));
        assert_eq!(framer.finish(), Err(LineError::Truncated("line")));
    }
}
