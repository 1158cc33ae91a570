//! Sequences of records with right checksums, which bytes alone never hit: good ones, and
//! such as one rule forbids. What the chain takes is held against the rules written anew.

use qemu_fleece_protocol::backup::Mode;
use qemu_fleece_protocol::record::{Begin, FORMAT, Record};
use qemu_fleece_protocol::stream::{Chain, Writer};

use super::input::Input;
use super::streams::is_as_written;

/// Most records of an input.
const MOST: usize = 64;

/// What a host may do wrong with the next record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    Offset,
    Crc,
    Payload,
    Digest,
    Counts,
}

/// A record is taken if, and only if, the rules of the specification allow it.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let (mut chain, mut rules, mut units) = (Chain::new(), Rules::default(), Vec::new());
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        let (record, payload, wrong) = rules.draw(&mut input);
        let allowed = wrong == Wrong::Nothing && rules.allow(&record, payload.as_deref());
        let taken = chain.take(&record, payload.as_deref());
        assert_eq!(taken.is_ok(), allowed, "{record:?} {wrong:?}: {taken:?}");
        if taken.is_err() {
            return;
        }
        rules.pass(&record, payload.as_deref());
        assert_eq!(chain.offset(), rules.open.as_ref().map_or(0, |(_, at)| *at));
        assert_eq!(chain.complete(), rules.complete);
        units.push((record, payload));
    }
    let whole = rules.open.is_none() && rules.complete > 0;
    assert_eq!(chain.finish().is_ok(), whole);
    if whole {
        is_as_written(&units);
    }
}

/// Where a chain is.
#[derive(Default)]
struct Rules {
    complete: usize,
    last: Option<Begin>,
    open: Option<(Begin, u64)>,
    writer: Option<Writer>,
}

impl Rules {
    /// The next record, as a writer would make it, with what is wrong about it.
    fn draw(&mut self, input: &mut Input<'_>) -> (Record, Option<Vec<u8>>, Wrong) {
        let kind = input.byte();
        let wrong = match input.byte() {
            0xf0 => Wrong::Offset,
            0xf1 => Wrong::Crc,
            0xf2 => Wrong::Payload,
            0xf3 => Wrong::Digest,
            0xf4 => Wrong::Counts,
            _ => Wrong::Nothing,
        };
        let mut writer = self
            .writer
            .clone()
            .unwrap_or_else(|| Writer::new(&begin(0)));
        let length = if kind & 0x80 == 0 {
            input.short()
        } else {
            input.long()
        };
        let (record, payload) = match kind % 8 {
            0 => (Record::Begin(self.draw_begin(input)), None),
            1 | 2 => {
                let length = usize::try_from(length % 300).expect("it is small");
                let mut bytes = input.take(length).to_vec();
                bytes.resize(length, 0xee);
                (writer.data(&bytes), Some(bytes))
            }
            // Past what its sums can hold, a writer is not asked.
            3 | 4 if writer.offset().checked_add(length).is_none() => {
                let (offset, hole) = (writer.offset(), false);
                (
                    Record::Zero {
                        offset,
                        length,
                        hole,
                    },
                    None,
                )
            }
            3 => (writer.zero(length, length % 2 == 0), None),
            4 => (writer.same(length), None),
            5 => {
                let (code, action) = ("internal".to_owned(), qemu_fleece_protocol::Action::Retry);
                (
                    Record::Failed {
                        code,
                        action,
                        offset: length,
                    },
                    None,
                )
            }
            _ => (Record::End(writer.end()), None),
        };
        let (record, payload, wrong) = spoil(record, payload, wrong);
        (record, payload, wrong)
    }

    fn draw_begin(&self, input: &mut Input<'_>) -> Begin {
        let size = match input.byte() {
            0xff => input.long(),
            _ => self
                .last
                .as_ref()
                .map_or_else(|| input.short(), |last| last.size),
        };
        let name = |byte: u8| match byte % 4 {
            0 => None,
            1 => self.last.as_ref().and_then(|last| last.checkpoint.clone()),
            _ => Some(format!("c{}", byte / 4)),
        };
        let like_last = self
            .last
            .as_ref()
            .filter(|_| !input.byte().is_multiple_of(4));
        Begin {
            format: if input.byte() == 0xff { 2 } else { FORMAT },
            disk: like_last.map_or_else(|| format!("d{}", input.byte()), |last| last.disk.clone()),
            mode: if input.byte().is_multiple_of(2) {
                Mode::Full
            } else {
                Mode::Incremental
            },
            base: name(input.byte()),
            checkpoint: name(input.byte()),
            granularity: if input.byte() == 0xff {
                input.long()
            } else {
                65536
            },
            offset: if input.byte() == 0xff {
                input.short()
            } else {
                0
            },
            ..begin(size)
        }
    }

    /// Section 4 and 6 of the specification.
    fn allow(&self, record: &Record, payload: Option<&[u8]>) -> bool {
        if payload.is_some() != matches!(record, Record::Data { .. }) {
            return false;
        }
        let Some((begin, at)) = &self.open else {
            let Record::Begin(begin) = record else {
                return false;
            };
            let numbers = begin.size <= 1 << 63 && begin.granularity <= 1 << 63;
            let mode = match begin.mode {
                Mode::Full => begin.base.is_none() && self.last.is_none(),
                Mode::Incremental => {
                    begin.base.is_some()
                        && self.last.as_ref().is_some_and(|last| {
                            last.checkpoint == begin.base
                                && last.disk == begin.disk
                                && last.size == begin.size
                        })
                }
            };
            return begin.format == FORMAT && begin.offset == 0 && numbers && mode;
        };
        let next = |offset: &u64, length: &u64| {
            *length > 0
                && offset == at
                && u128::from(*offset) + u128::from(*length) <= begin.size.into()
        };
        match record {
            Record::Data { offset, length, .. } | Record::Zero { offset, length, .. } => {
                next(offset, length)
            }
            Record::Same { offset, length } => {
                begin.mode == Mode::Incremental && next(offset, length)
            }
            Record::End(_) => *at == begin.size,
            _ => false,
        }
    }

    fn pass(&mut self, record: &Record, payload: Option<&[u8]>) {
        match record {
            Record::Begin(begin) => {
                self.writer = Some(Writer::new(begin));
                self.open = Some((begin.clone(), 0));
            }
            Record::End(_) => {
                self.last = self.open.take().map(|(begin, _)| begin);
                self.writer = None;
                self.complete += 1;
            }
            Record::Data { length, .. }
            | Record::Zero { length, .. }
            | Record::Same { length, .. } => {
                let (_, at) = self.open.as_mut().expect("a stream is open");
                *at += length;
                let writer = self.writer.as_mut().expect("a stream is open");
                let _as_it_came = match (record, payload) {
                    (Record::Data { .. }, Some(bytes)) => writer.data(bytes),
                    (Record::Same { .. }, _) => writer.same(*length),
                    _ => writer.zero(*length, false),
                };
            }
            Record::Failed { .. } => unreachable!("it is never taken"),
        }
    }
}

fn begin(size: u64) -> Begin {
    Begin {
        format: FORMAT,
        disk: "d".into(),
        size,
        mode: Mode::Full,
        reason: None,
        base: None,
        checkpoint: None,
        granularity: 65536,
        offset: 0,
    }
}

/// Spoils a record, where that can be done to its kind.
fn spoil(
    mut record: Record,
    mut payload: Option<Vec<u8>>,
    wrong: Wrong,
) -> (Record, Option<Vec<u8>>, Wrong) {
    match (&mut record, wrong) {
        (
            Record::Data { offset, .. } | Record::Zero { offset, .. } | Record::Same { offset, .. },
            Wrong::Offset,
        ) => *offset ^= 1,
        (Record::Data { crc32, .. }, Wrong::Crc) => *crc32 ^= 1,
        (Record::Data { .. }, Wrong::Payload) => {
            payload = payload.map(|mut bytes| {
                bytes.push(0);
                bytes
            })
        }
        (_, Wrong::Payload) => payload = Some(Vec::new()),
        (Record::End(end), Wrong::Digest) => end.digest = "0".repeat(64),
        (Record::End(end), Wrong::Counts) => end.records ^= 1,
        _ => return (record, payload, Wrong::Nothing),
    }
    (record, payload, wrong)
}
