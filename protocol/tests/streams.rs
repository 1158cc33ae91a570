//! Any stream that the writer makes is read back as it was, however the bytes
//! come; a changed byte never makes another image of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use qemu_fleece_protocol::backup::Mode;
use qemu_fleece_protocol::record::{Begin, FORMAT, Record};
use qemu_fleece_protocol::stream::{Chain, Damage, MAX_HEADER_BYTES, Reader, Unit, Writer};
use qemu_fleece_protocol::{MAX_LINE_BYTES, MAX_PAYLOAD_BYTES};

/// A record to be written; a `Same` in a full is written as zeros.
#[derive(Clone, Debug)]
enum Step {
    Data(Vec<u8>),
    Zero(usize, bool),
    Same(usize),
}

fn step(kind: u8, length: usize, fill: u8) -> Step {
    match kind {
        // The bytes look like lines, so that a lost boundary is not seen by luck.
        0 => Step::Data(
            b"{\"kind\":\"end\"}\n"
                .iter()
                .map(|b| b ^ fill)
                .cycle()
                .take(length)
                .collect(),
        ),
        1 => Step::Zero(length, fill.is_multiple_of(2)),
        _ => Step::Same(length),
    }
}

/// A chain of one to three streams of one disk, as the steps of each.
fn chains() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let steps = vec(
        (0u8..3, 1usize..80, prop_oneof![Just(0u8), any::<u8>()]),
        0..8,
    );
    (0usize..400, vec(steps, 1..4)).prop_map(|(size, streams)| {
        streams
            .into_iter()
            .map(|drawn| {
                let mut left = size;
                let mut steps = Vec::new();
                for (kind, length, fill) in drawn {
                    let length = length.min(left);
                    if length > 0 {
                        steps.push(step(kind, length, fill));
                        left -= length;
                    }
                }
                if left > 0 {
                    steps.push(step(1, left, 0));
                }
                steps
            })
            .collect()
    })
}

fn begin(size: u64, nth: usize) -> Begin {
    Begin {
        format: FORMAT,
        disk: "disk0".into(),
        size,
        mode: if nth == 0 {
            Mode::Full
        } else {
            Mode::Incremental
        },
        reason: None,
        base: nth.checked_sub(1).map(|last| format!("c{last}")),
        checkpoint: Some(format!("c{nth}")),
        granularity: 65536,
        offset: 0,
    }
}

/// The chain's records, and the image that its steps make.
fn write(chain: &[Vec<Step>]) -> (Vec<Unit>, Vec<u8>) {
    let (mut units, mut image) = (Vec::new(), Vec::new());
    for (nth, steps) in chain.iter().enumerate() {
        let base = std::mem::take(&mut image);
        let size = chain[0].iter().map(|step| match step {
            Step::Data(bytes) => bytes.len(),
            Step::Zero(length, _) | Step::Same(length) => *length,
        });
        let begin = begin(size.sum::<usize>() as u64, nth);
        let mut writer = Writer::new(&begin);
        units.push((Record::Begin(begin), None));
        for step in steps {
            units.push(match step {
                Step::Data(bytes) => {
                    image.extend(bytes);
                    (writer.data(bytes), Some(bytes.clone()))
                }
                Step::Same(length) if nth > 0 => {
                    image.extend_from_slice(&base[image.len()..][..*length]);
                    (writer.same(*length as u64), None)
                }
                Step::Zero(length, _) | Step::Same(length) => {
                    image.resize(image.len() + length, 0);
                    let hole = matches!(step, Step::Zero(_, true));
                    (writer.zero(*length as u64, hole), None)
                }
            });
        }
        units.push((Record::End(writer.end()), None));
    }
    (units, image)
}

fn stored(units: &[Unit]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (record, payload) in units {
        serde_json::to_writer(&mut bytes, record).unwrap();
        bytes.push(b'\n');
        bytes.extend(payload.iter().flatten());
    }
    bytes
}

/// Reads all of `bytes`, which come in pieces of the lengths of `cuts`, over and over.
fn read(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Unit>, Damage> {
    let (mut reader, mut units, mut rest) = (Reader::default(), Vec::new(), bytes);
    for cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (head, tail) = rest.split_at((*cut).min(rest.len()));
        reader.push(head);
        while let Some(unit) = reader.next_unit()? {
            units.push(unit);
        }
        rest = tail;
    }
    reader.finish()?;
    Ok(units)
}

/// What a restore makes of the records, and each stream's `begin` as far as the
/// digest covers it.
fn restored(units: &[Unit]) -> (Vec<u8>, Vec<Begin>) {
    let (mut image, mut begins) = (Vec::new(), Vec::new());
    let range = |offset: u64, length: u64| {
        let offset = usize::try_from(offset).unwrap();
        offset..offset + usize::try_from(length).unwrap()
    };
    for (record, payload) in units {
        match record {
            Record::Begin(begin) => {
                image.resize(usize::try_from(begin.size).unwrap(), 0xee);
                begins.push(Begin {
                    granularity: 0,
                    reason: None,
                    ..begin.clone()
                });
            }
            Record::Data { offset, length, .. } => {
                image[range(*offset, *length)].copy_from_slice(payload.as_deref().unwrap());
            }
            Record::Zero { offset, length, .. } => image[range(*offset, *length)].fill(0),
            _ => {}
        }
    }
    (image, begins)
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(chain in chains(), cuts in vec(1usize..200, 1..20)) {
        let (units, image) = write(&chain);
        let read = read(&stored(&units), &cuts);
        prop_assert_eq!(read.as_ref(), Ok(&units));
        prop_assert_eq!(restored(&units).0, image);
    }

    #[test]
    fn a_stream_that_stops_early_is_refused(chain in chains(), at: Index) {
        let bytes = stored(&write(&chain).0);
        let cut = at.index(bytes.len());
        // Behind each `end` is a whole chain, though a shorter one.
        match read(&bytes[..cut], &[4096]) {
            Ok(units) => prop_assert!(matches!(units.last(), Some((Record::End(_), None)))),
            Err(damage) => prop_assert!(damage.stream < chain.len()),
        }
    }

    #[test]
    fn a_changed_byte_makes_no_other_image(chain in chains(), at: Index, change in 1u8..) {
        let (units, _) = write(&chain);
        let mut bytes = stored(&units);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        if let Ok(accepted) = read(&bytes, &[4096]) {
            prop_assert_eq!(restored(&accepted), restored(&units));
        }
    }

    /// Bytes that look like records come further than any bytes do.
    #[test]
    fn no_pieces_of_records_make_a_reader_panic(
        pieces in vec(prop_oneof![
            Just(&b"{\"kind\":\"begin\",\"format\":1,\"disk\":\"d\",\"size\":9,\"mode\":\"full\",\"granularity\":1}\n"[..]),
            Just(&b"{\"kind\":\"data\",\"offset\":0,\"length\":9,\"crc32\":3421780262}\n123456789"[..]),
            Just(&b"{\"kind\":\"zero\",\"offset\":0,\"length\":18446744073709551615}\n"[..]),
            Just(&b"{\"kind\":\"data\",\"offset\":9,\"length\":"[..]),
            Just(&b"18446744073709551615,\"crc32\":0}\n"[..]),
            Just(&b"\n"[..]),
        ], 0..12),
        cuts in vec(1usize..50, 1..5),
    ) {
        let _judged = read(&pieces.concat(), &cuts);
    }
}

/// A disk of `size` bytes in one `data` record, stored.
fn one_record(size: u64) -> Vec<u8> {
    let begin = begin(size, 0);
    let mut writer = Writer::new(&begin);
    let payload = vec![0x5a; usize::try_from(size).unwrap()];
    let record = writer.data(&payload);
    stored(&[
        (Record::Begin(begin), None),
        (record, Some(payload)),
        (Record::End(writer.end()), None),
    ])
}

#[test]
fn the_longest_record_is_read_and_one_byte_more_is_refused() {
    assert!(read(&one_record(MAX_PAYLOAD_BYTES), &[4096]).is_ok());
    let damage = read(&one_record(MAX_PAYLOAD_BYTES + 1), &[4096]).unwrap_err();
    assert!(damage.what.contains("longer than 1048576"), "{damage}");
}

#[test]
fn a_header_that_promises_too_much_is_refused_before_its_bytes_come() {
    let mut reader = Reader::default();
    reader.push(&stored(&[(Record::Begin(begin(1 << 40, 0)), None)]));
    reader.next_unit().unwrap();
    reader.push(b"{\"kind\":\"data\",\"offset\":0,\"length\":1099511627776,\"crc32\":0}\n");
    assert!(reader.next_unit().is_err());
}

#[test]
fn a_header_without_end_is_refused() {
    let mut reader = Reader::default();
    for _ in 0..64 {
        reader.push(&[b' '; MAX_HEADER_BYTES]);
        assert_eq!(reader.next_unit(), Ok(None));
    }
    assert!(reader.finish().is_err());
    reader.push(b"\n");
    assert!(reader.next_unit().is_err());
}

/// A chain is also fed by `restore.write`, without a reader before it.
#[test]
fn a_chain_holds_the_rules_of_payloads_itself() {
    let begin = begin(MAX_PAYLOAD_BYTES + 1, 0);
    let open = || {
        let mut chain = Chain::new();
        chain.take(&Record::Begin(begin.clone()), None).unwrap();
        chain
    };
    let bytes = vec![0; usize::try_from(begin.size).unwrap()];
    let long = Writer::new(&begin).data(&bytes);
    assert!(open().take(&long, Some(&bytes)).is_err());
    let short = Writer::new(&begin).data(b"data");
    assert!(open().take(&short, None).is_err());
    assert!(open().take(&short, Some(b"dat")).is_err());
    assert!(open().take(&short, Some(b"data")).is_ok());
    let zero = Writer::new(&begin).zero(4, false);
    assert!(open().take(&zero, Some(b"data")).is_err());
    assert!(open().take(&zero, None).is_ok());
    let begin = Record::Begin(begin.clone());
    assert!(Chain::new().take(&begin, Some(b"")).is_err());
}

/// The longest record has room in a line, in base64 and with all that is around it.
#[test]
fn an_inline_record_fits_a_line() {
    let base64 = usize::try_from(MAX_PAYLOAD_BYTES.div_ceil(3) * 4).unwrap();
    assert!(base64 + MAX_HEADER_BYTES < MAX_LINE_BYTES);
}

proptest! {
    /// Another process goes on with the very same digest and counts.
    #[test]
    fn a_place_survives_as_text(before in vec(any::<u8>(), 0..300), zeros in 0u64..1 << 40, after in vec(any::<u8>(), 0..300)) {
        let mut whole = Writer::new(&begin(1 << 41, 0));
        whole.data(&before);
        whole.zero(zeros, true);
        let text = whole.save();
        let mut again = Writer::load(&text).unwrap();
        prop_assert_eq!(again.offset(), whole.offset());
        for writer in [&mut whole, &mut again] {
            writer.same(7);
            writer.data(&after);
        }
        prop_assert_eq!(again.end(), whole.end());
        prop_assert_eq!(again.save(), whole.save());
    }

    #[test]
    fn no_other_text_is_a_place(text in "[ 0-9a-f]{0,300}") {
        if let Some(writer) = Writer::load(&text) {
            prop_assert_eq!(writer.save(), text);
        }
    }
}

/// Numbers that are written in another way, and places that no stream comes to.
#[test]
fn a_text_that_lies_is_no_place() {
    let mut writer = Writer::new(&begin(1 << 41, 0));
    writer.data(b"data");
    writer.zero(8, false);
    let text = writer.save();
    let state = text.rsplit_once(' ').unwrap().1;
    assert_eq!(text, format!("12 2 4 8 0 {state}"));
    let (head, tail) = state.split_at(2);
    let most = u64::MAX;
    for lie in [
        format!("+12 2 4 8 0 {state}"),
        format!("012 2 4 8 0 {state}"),
        format!("12 2 4 8 0 +{}{tail}", &head[1..]),
        format!("12 2 4 8 0 {}", state.to_uppercase()),
        format!("13 2 4 8 0 {state}"),
        format!("12 13 4 8 0 {state}"),
        format!("{most} 2 4 8 0 {state}"),
        format!("{most} 1 {most} 0 0 {state}"),
        format!("12 2 {most} 13 0 {state}"),
    ] {
        assert!(Writer::load(&lie).is_none(), "{lie}");
    }
    assert!(Writer::load(&text).is_some());
}
