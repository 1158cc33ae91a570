//! The rules of a record stream, held by whoever writes one ([`Writer`]) and
//! by whoever reads one ([`Reader`], and [`Chain`] over several). Pure.
//!
//! ```text
//! begin --> (data | zero | same)* --> end      complete: may be stored
//!                    \------------> failed     void
//!                    \--- (nothing more)       void
//! ```
//! Records lie behind each other from `begin.offset` to `begin.size` without
//! gap or overlap.

use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest, Sha256};

use crate::MAX_PAYLOAD_BYTES;
use crate::backup::Mode;
use crate::line::{Framer, LineError, Piece};
use crate::record::{Begin, End, FORMAT, Record};

/// Longest header line of a stored stream.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// Largest number of the protocol: sizes beyond it are damage.
const MAX_NUMBER: u64 = 1 << 63;

/// The running digest and counts of a stream.
#[derive(Clone, Debug)]
struct Sum {
    digest: Sha256,
    records: u64,
    data_bytes: u64,
    zero_bytes: u64,
    same_bytes: u64,
}

impl Sum {
    fn new(begin: &Begin) -> Self {
        let mut digest = Sha256::new();
        digest.update(format!(
            "qemu-fleece stream 1\n{}\n{}\n{}\n{}\n{}\n",
            begin.disk,
            begin.size,
            begin.mode.name(),
            begin.base.as_deref().unwrap_or_default(),
            begin.checkpoint.as_deref().unwrap_or_default(),
        ));
        Self {
            digest,
            records: 0,
            data_bytes: 0,
            zero_bytes: 0,
            same_bytes: 0,
        }
    }

    fn add(&mut self, kind: u8, offset: u64, length: u64, crc32: u32) {
        self.records += 1;
        match kind {
            b'd' => self.data_bytes += length,
            b'z' => self.zero_bytes += length,
            _ => self.same_bytes += length,
        }
        self.digest.update([kind]);
        self.digest.update(offset.to_be_bytes());
        self.digest.update(length.to_be_bytes());
        self.digest.update(crc32.to_be_bytes());
    }

    fn end(&self) -> End {
        let digest = self.digest.clone().finalize();
        End {
            records: self.records,
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            same_bytes: self.same_bytes,
            digest: hex(&digest),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.map(byte).collect()
}

/// Makes the records of a stream; its caller keeps the order. A clone is a
/// place to go on from.
#[derive(Clone, Debug)]
pub struct Writer {
    sum: Sum,
    offset: u64,
}

impl Writer {
    /// A stream that starts with `begin`.
    #[must_use]
    pub fn new(begin: &Begin) -> Self {
        Self {
            sum: Sum::new(begin),
            offset: 0,
        }
    }

    /// This place in the stream as text, for another process to go on from: the counts and
    /// the digest's state.
    #[must_use]
    pub fn save(&self) -> String {
        let Sum {
            digest,
            records,
            data_bytes,
            zero_bytes,
            same_bytes,
        } = &self.sum;
        let state = hex(&digest.serialize());
        let offset = self.offset;
        format!("{offset} {records} {data_bytes} {zero_bytes} {same_bytes} {state}")
    }

    /// The place that [`Writer::save`] told; `None`: it is no such text, or one that no
    /// stream comes to.
    #[must_use]
    pub fn load(text: &str) -> Option<Self> {
        let (numbers, state) = text.rsplit_once(' ')?;
        let numbers = numbers.split(' ').map(|number| number.parse().ok());
        let numbers: Vec<u64> = numbers.collect::<Option<_>>()?;
        let [offset, records, data_bytes, zero_bytes, same_bytes] = *numbers.as_slice() else {
            return None;
        };
        let state = SerializedState::<Sha256>::try_from(unhex(state)?.as_slice()).ok()?;
        let sum = Sum {
            digest: Sha256::deserialize(&state).ok()?,
            records,
            data_bytes,
            zero_bytes,
            same_bytes,
        };
        let writer = Self { sum, offset };
        // Records are not empty, and lie behind each other. Numbers can be written in other
        // ways; ours are not.
        let bytes = [data_bytes, zero_bytes, same_bytes];
        let bytes = bytes.into_iter().try_fold(0_u64, u64::checked_add)?;
        let is_place = bytes == offset && offset <= MAX_NUMBER && records <= offset;
        (is_place && writer.save() == text).then_some(writer)
    }

    /// Where the next record starts.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes of all `data` records so far.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.sum.data_bytes
    }

    /// The record of the next bytes.
    pub fn data(&mut self, payload: &[u8]) -> Record {
        let (offset, length, crc32) = (self.offset, payload.len() as u64, crc32fast::hash(payload));
        self.sum.add(b'd', offset, length, crc32);
        self.offset += length;
        Record::Data {
            offset,
            length,
            crc32,
        }
    }

    /// The record of the next `length` bytes, which are zeros.
    pub fn zero(&mut self, length: u64, hole: bool) -> Record {
        let offset = self.offset;
        self.sum.add(b'z', offset, length, 0);
        self.offset += length;
        Record::Zero {
            offset,
            length,
            hole,
        }
    }

    /// The record of the next `length` bytes, which are as in the base.
    pub fn same(&mut self, length: u64) -> Record {
        let offset = self.offset;
        self.sum.add(b's', offset, length, 0);
        self.offset += length;
        Record::Same { offset, length }
    }

    /// The record that completes the stream.
    #[must_use]
    pub fn end(&self) -> End {
        self.sum.end()
    }
}

/// Why a stream must be refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stream {stream}, offset {offset}: {what}")]
pub struct Damage {
    /// Which stream of the chain, from 0.
    pub stream: usize,
    /// The disk's offset that the stream had come to.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
}

/// Holds a sequence of records to the rules of one stream.
#[derive(Debug)]
struct Checker {
    begin: Begin,
    sum: Sum,
    offset: u64,
}

impl Checker {
    fn new(begin: &Begin) -> Result<Self, String> {
        if begin.format != FORMAT {
            return Err(format!(
                "its format is {}, and only {FORMAT} is known",
                begin.format
            ));
        }
        if begin.size > MAX_NUMBER || begin.granularity > MAX_NUMBER {
            return Err(format!("it has a number over {MAX_NUMBER}"));
        }
        if begin.offset != 0 {
            return Err(format!(
                "it goes on from offset {}: the part before is missing",
                begin.offset
            ));
        }
        match (begin.mode, &begin.base) {
            (Mode::Full, Some(base)) => {
                return Err(format!("it is full and yet has the base {base}"));
            }
            (Mode::Incremental, None) => return Err("it is incremental and has no base".into()),
            _ => {}
        }
        Ok(Self {
            begin: begin.clone(),
            sum: Sum::new(begin),
            offset: 0,
        })
    }

    /// Takes a record between `begin` and `end`.
    fn take(&mut self, record: &Record, payload: Option<&[u8]>) -> Result<(), String> {
        let (kind, offset, length, crc32) = match *record {
            Record::Data {
                offset,
                length,
                crc32,
            } => (b'd', offset, length, crc32),
            Record::Zero { offset, length, .. } => (b'z', offset, length, 0),
            Record::Same { offset, length } => (b's', offset, length, 0),
            _ => return Err("a record of that kind does not belong here".into()),
        };
        if length == 0 {
            return Err("a record is empty".into());
        }
        if offset > self.offset {
            return Err(format!("a gap: the next record is at {offset}"));
        }
        if offset < self.offset {
            return Err(format!("an overlap: the next record is at {offset}"));
        }
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= self.begin.size);
        let Some(end) = end else {
            return Err(format!(
                "a record of {length} bytes reaches past the disk's {} bytes",
                self.begin.size
            ));
        };
        if kind == b'd' && length > MAX_PAYLOAD_BYTES {
            return Err(format!("a record is longer than {MAX_PAYLOAD_BYTES} bytes"));
        }
        if kind == b's' && self.begin.mode == Mode::Full {
            return Err("a `same` record in a full stream".into());
        }
        match (kind, payload) {
            (b'd', Some(bytes)) if bytes.len() as u64 == length => {
                let found = crc32fast::hash(bytes);
                if found != crc32 {
                    return Err(format!(
                        "the payload's CRC-32 is {found} and should be {crc32}"
                    ));
                }
            }
            (b'd', _) => return Err("a `data` record without its payload".into()),
            _ => {}
        }
        self.sum.add(kind, offset, length, crc32);
        self.offset = end;
        Ok(())
    }

    fn end(&self, end: &End) -> Result<(), String> {
        if self.offset != self.begin.size {
            return Err(format!(
                "it ends although the disk has {} bytes",
                self.begin.size
            ));
        }
        let sum = self.sum.end();
        if sum.digest != end.digest {
            return Err(format!(
                "its digest is {} and should be {}",
                sum.digest, end.digest
            ));
        }
        if sum != *end {
            return Err("its counts differ from what `end` says".into());
        }
        Ok(())
    }
}

/// Holds a sequence of records to the rules of a chain: a full, then
/// incrementals, each based on the checkpoint of the one before, all of one
/// disk and size.
#[derive(Debug, Default)]
pub struct Chain {
    complete: usize,
    last: Option<Begin>,
    open: Option<Checker>,
}

impl Chain {
    /// An empty chain.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next record, with the payload that goes with it.
    ///
    /// # Errors
    /// [`Damage`], after which the chain must not be used.
    pub fn take(&mut self, record: &Record, payload: Option<&[u8]>) -> Result<(), Damage> {
        let offset = self.offset();
        let stream = self.complete;
        self.step(record, payload).map_err(|what| Damage {
            stream,
            offset,
            what,
        })
    }

    fn step(&mut self, record: &Record, payload: Option<&[u8]>) -> Result<(), String> {
        if payload.is_some() && !matches!(record, Record::Data { .. }) {
            return Err("a payload with a record that has none".into());
        }
        match (&mut self.open, record) {
            (None, Record::Begin(begin)) => {
                let checker = Checker::new(begin)?;
                self.follows(begin)?;
                self.open = Some(checker);
            }
            (None, _) => return Err("a stream starts with `begin`".into()),
            (Some(_), Record::Begin(_)) => {
                return Err("a new stream begins before this one ended".into());
            }
            (Some(_), Record::Failed { code, .. }) => {
                return Err(format!("it failed with {code}"));
            }
            (Some(checker), Record::End(end)) => {
                checker.end(end)?;
                self.last = self.open.take().map(|checker| checker.begin);
                self.complete += 1;
            }
            (Some(checker), _) => checker.take(record, payload)?,
        }
        Ok(())
    }

    fn follows(&self, begin: &Begin) -> Result<(), String> {
        let Some(last) = &self.last else {
            return match &begin.base {
                None => Ok(()),
                Some(base) => Err(format!(
                    "a chain starts with a full; this one needs checkpoint {base} before it"
                )),
            };
        };
        if begin.disk != last.disk {
            return Err(format!(
                "it is of disk {}, and the one before of {}",
                begin.disk, last.disk
            ));
        }
        if begin.size != last.size {
            return Err(format!(
                "its disk has {} bytes, and the one before {}",
                begin.size, last.size
            ));
        }
        if begin.base.is_none() || begin.base != last.checkpoint {
            return Err(format!(
                "its base is {}, and the one before made {}",
                begin.base.as_deref().unwrap_or("none"),
                last.checkpoint.as_deref().unwrap_or("none"),
            ));
        }
        Ok(())
    }

    /// Where the next record of the open stream must start; 0 between streams.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.open.as_ref().map_or(0, |checker| checker.offset)
    }

    /// Number of complete streams.
    #[must_use]
    pub fn complete(&self) -> usize {
        self.complete
    }

    /// The begin of the last complete stream, once there is one and none is open.
    ///
    /// # Errors
    /// [`Damage`] when the chain is empty or stops in the middle of a stream.
    pub fn finish(&self) -> Result<&Begin, Damage> {
        let damage = |what: &str| Damage {
            stream: self.complete,
            offset: self.offset(),
            what: what.into(),
        };
        match (&self.open, &self.last) {
            (None, Some(last)) => Ok(last),
            (None, None) => Err(damage("there is no stream")),
            (Some(_), _) => Err(damage("it has no `end`")),
        }
    }
}

/// A record with its payload, as [`Reader`] finds it.
pub type Unit = (Record, Option<Vec<u8>>);

/// Reads stored streams: bytes in, checked records out.
#[derive(Debug)]
pub struct Reader {
    framer: Framer,
    chain: Chain,
    header: Option<Record>,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            framer: Framer::new(MAX_HEADER_BYTES),
            chain: Chain::new(),
            header: None,
        }
    }
}

impl Reader {
    /// Adds bytes as they came; several streams may follow each other.
    pub fn push(&mut self, bytes: &[u8]) {
        self.framer.push(bytes);
    }

    /// How many bytes were pushed and not given out yet.
    #[must_use]
    pub fn held(&self) -> usize {
        self.framer.held()
    }

    /// The next checked record, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`Damage`], after which the reader must not be used.
    pub fn next_unit(&mut self) -> Result<Option<Unit>, Damage> {
        loop {
            let piece = self
                .framer
                .next_piece()
                .map_err(|error| self.damage(error.to_string()))?;
            let (record, payload) = match piece {
                None => return Ok(None),
                Some(Piece::Payload(bytes)) => match self.header.take() {
                    Some(record) => (record, Some(bytes)),
                    None => return Err(self.damage("a payload without its record".into())),
                },
                Some(Piece::Line(line)) => {
                    // serde reads a struct from an array too.
                    if line.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
                        return Err(self.damage("no record: the line is no JSON object".into()));
                    }
                    let record: Record = serde_json::from_slice(&line)
                        .map_err(|error| self.damage(format!("no record: {error}")))?;
                    // Before its bytes are waited for: they would all be kept.
                    if let Record::Data { length, .. } = record {
                        let length = usize::try_from(length)
                            .ok()
                            .filter(|_| length <= MAX_PAYLOAD_BYTES);
                        let Some(length) = length else {
                            return Err(self.damage(format!(
                                "a record is longer than {MAX_PAYLOAD_BYTES} bytes"
                            )));
                        };
                        self.framer.payload(length);
                        self.header = Some(record);
                        continue;
                    }
                    (record, None)
                }
            };
            self.chain.take(&record, payload.as_deref())?;
            return Ok(Some((record, payload)));
        }
    }

    /// To be asked at the end of the input: the begin of the last stream.
    ///
    /// # Errors
    /// [`Damage`] when the input stops anywhere but behind an `end`.
    pub fn finish(&self) -> Result<&Begin, Damage> {
        match self.framer.finish() {
            Err(LineError::Truncated(what)) => {
                Err(self.damage(format!("it is cut off inside a {what}")))
            }
            Err(error) => Err(self.damage(error.to_string())),
            Ok(()) => self.chain.finish(),
        }
    }

    fn damage(&self, what: String) -> Damage {
        Damage {
            stream: self.chain.complete(),
            offset: self.chain.offset(),
            what,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_specifications_example() {
        let begin = Begin {
            format: 1,
            disk: "disk0".into(),
            size: 12,
            mode: Mode::Full,
            reason: None,
            base: None,
            checkpoint: Some("monday".into()),
            granularity: 65536,
            offset: 0,
        };
        let mut writer = Writer::new(&begin);
        assert_eq!(
            writer.data(b"data"),
            Record::Data {
                offset: 0,
                length: 4,
                crc32: 2_918_445_923
            }
        );
        writer.zero(8, true);
        let end = writer.end();
        assert_eq!(
            end.digest,
            "c760b76bc995d1a12e14b1ef6b183193e8104184aef32629ecb8b4c4ab9973cc"
        );
        assert_eq!(
            (end.records, end.data_bytes, end.zero_bytes, end.same_bytes),
            (2, 4, 8, 0)
        );
    }
}
