//! Stored streams: any bytes that a restore may be fed.

use qemu_fleece_protocol::MAX_PAYLOAD_BYTES;
use qemu_fleece_protocol::record::Record;
use qemu_fleece_protocol::stream::{MAX_HEADER_BYTES, Reader, Unit, Writer};

use super::input::Cuts;

/// However the bytes are cut, the same records or the same damage are found; never more is
/// held than the limits allow; records that are taken lie behind each other; what is complete
/// is what our own writer would have written.
pub fn run(input: &[u8]) {
    let (units, end) = read(input, Cuts::Whole);
    let (cut_units, cut_end) = read(input, Cuts::Small);
    assert_eq!(cut_units, units);
    assert_eq!(cut_end, end);
    if end.is_ok() {
        is_as_written(&units);
    }
}

fn read(input: &[u8], cuts: Cuts) -> (Vec<Unit>, Result<String, String>) {
    let (mut reader, mut units) = (Reader::default(), Vec::new());
    for bytes in cuts.of(input) {
        reader.push(bytes);
        loop {
            match reader.next_unit() {
                Ok(Some(unit)) => units.push(unit),
                Ok(None) => break,
                Err(damage) => return (units, Err(damage.to_string())),
            }
        }
        let payload = usize::try_from(MAX_PAYLOAD_BYTES).expect("it is small");
        assert!(reader.held() <= MAX_HEADER_BYTES.max(payload) + bytes.len());
    }
    let end = reader.finish();
    let end = end.map(|last| format!("{last:?}"));
    (units, end.map_err(|damage| damage.to_string()))
}

/// Holds a complete chain against [`Writer`].
pub fn is_as_written(units: &[Unit]) {
    let mut writer = None;
    for (record, payload) in units {
        if let Record::Begin(begin) = record {
            assert!(writer.is_none(), "a stream within a stream");
            writer = Some((Writer::new(begin), begin.size));
            continue;
        }
        let (writing, size) = writer.as_mut().expect("records are within a stream");
        let expected = match record {
            Record::Data { .. } => writing.data(payload.as_deref().expect("bytes")),
            Record::Zero { length, hole, .. } => writing.zero(*length, *hole),
            Record::Same { length, .. } => writing.same(*length),
            _ => {
                assert_eq!(writing.offset(), *size);
                Record::End(writing.end())
            }
        };
        assert_eq!(*record, expected);
        if matches!(record, Record::End(_)) {
            writer = None;
        }
    }
    assert!(writer.is_none(), "a stream without its end");
}
