//! QMP's lines: bytes in, JSON objects out. Pure.

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Kind, Result};

/// Longest line of QEMU: `query-qmp-schema` answers some hundred KiB in one.
pub const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;

/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;

/// What QEMU says, in the members that matter here; unknown ones are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Message {
    /// The greeting.
    #[serde(rename = "QMP")]
    pub greeting: Option<Value>,
    /// The id of the command that is answered.
    pub id: Option<u64>,
    /// A command's answer; `null` is one too.
    #[serde(rename = "return", deserialize_with = "present")]
    pub returned: Option<Value>,
    /// A command's refusal.
    pub error: Option<Desc>,
    /// An event's name.
    pub event: Option<String>,
    /// An event's data.
    pub data: Option<Value>,
}

/// Tells `null` from an absent member.
fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

/// A refusal, as QEMU words it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Desc {
    /// QEMU's error class, `GenericError` for nearly all.
    pub class: String,
    /// QEMU's words.
    pub desc: String,
}

/// Collects bytes to lines.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    scanned: usize,
}

impl Lines {
    /// Where the next bytes are appended, as they come.
    pub fn space(&mut self) -> &mut Vec<u8> {
        self.buffer.reserve(READ_BYTES);
        &mut self.buffer
    }

    /// The next message; `None` until more bytes are pushed. Blank lines are none.
    ///
    /// # Errors
    /// [`Kind::MonitorProtocol`] for a line over [`MAX_LINE_BYTES`], or one that is
    /// no JSON object. It stays, and the monitor must not be used any more, unless it is
    /// passed over.
    pub fn next_message(&mut self) -> Result<Option<Message>> {
        let broken = |why: String| {
            Error::new(Kind::MonitorProtocol, "reading a line of the monitor").because(why)
        };
        loop {
            let end = self.buffer[self.scanned..]
                .iter()
                .position(|byte| *byte == b'\n')
                .map(|at| self.scanned + at);
            let Some(end) = end else {
                self.scanned = self.buffer.len();
                if self.buffer.len() > MAX_LINE_BYTES {
                    return Err(broken(format!("it is longer than {MAX_LINE_BYTES} bytes")));
                }
                return Ok(None);
            };
            if end > MAX_LINE_BYTES {
                return Err(broken(format!("it is longer than {MAX_LINE_BYTES} bytes")));
            }
            let line = &self.buffer[..end];
            let blank = line.iter().all(u8::is_ascii_whitespace);
            // serde reads a struct from an array too.
            let object = line.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
            let message = match (blank, object) {
                (true, _) => None,
                (false, false) => return Err(broken("it is no JSON object".into())),
                (false, true) => Some(
                    serde_json::from_slice::<Message>(line)
                        .map_err(|error| broken(error.to_string()))?,
                ),
            };
            self.buffer.drain(..=end);
            self.scanned = 0;
            if message.is_some() {
                return Ok(message);
            }
        }
    }

    /// Drops the line that was refused.
    pub fn pass_over(&mut self) {
        if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            self.buffer.drain(..=end);
            self.scanned = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(pieces: &[&[u8]]) -> Vec<Option<String>> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for piece in pieces {
            lines.space().extend_from_slice(piece);
            loop {
                match lines.next_message() {
                    Ok(Some(message)) => found.push(message.event),
                    Ok(None) => break,
                    Err(_) => {
                        found.push(Some("broken".into()));
                        return found;
                    }
                }
            }
        }
        found
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_messages(
            text in "(\\{\"event\":\"[A-C]\"\\}\r?\n|\r\n|[\\[x]\n){0,8}", cut in 1usize..9,
        ) {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(cut).collect();
            prop_assert_eq!(feed(&pieces), feed(&[text.as_bytes()]));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            feed(&[&bytes]);
        }
    }
}
