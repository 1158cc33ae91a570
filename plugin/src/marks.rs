//! Places in a stream that it can go on from: the digest's state at ends of records.
//!
//! A fixed number is kept. When it is reached every other one is dropped, so they
//! lie further apart the longer the host does not acknowledge.

use std::collections::VecDeque;

use qemu_fleece_protocol::stream::Writer;

/// Most places that are kept.
const MAX: usize = 1024;

/// The places of one disk's stream, by offset.
#[derive(Debug)]
pub(crate) struct Marks {
    marks: VecDeque<Writer>,
    /// Least distance of two places, in bytes.
    apart: u64,
    /// The disk's end is a place whatever the distance.
    size: u64,
}

impl Marks {
    /// The only place is the start of the stream.
    pub(crate) fn new(start: Writer, size: u64) -> Self {
        Self {
            marks: VecDeque::from([start]),
            apart: 0,
            size,
        }
    }

    /// The stream has come to here.
    pub(crate) fn pass(&mut self, writer: &Writer) {
        let last = self.marks.back().map_or(0, Writer::offset);
        let far = writer.offset() > last && writer.offset() - last >= self.apart;
        if !far && writer.offset() != self.size {
            return;
        }
        self.marks.push_back(writer.clone());
        if self.marks.len() > MAX {
            let mut keep = false;
            // The first is where the stream goes on from if it breaks now.
            self.marks.retain(|_| {
                keep = !keep;
                keep
            });
            self.apart = (writer.offset() / MAX as u64).max(self.apart * 2);
        }
    }

    /// The host has all before `offset`: the last place up to it, which is now the first.
    pub(crate) fn acknowledge(&mut self, offset: u64) -> Writer {
        while self
            .marks
            .get(1)
            .is_some_and(|next| next.offset() <= offset)
        {
            self.marks.pop_front();
        }
        self.first().clone()
    }

    /// Where a broken stream goes on; what lies behind is forgotten.
    pub(crate) fn resume(&mut self) -> Writer {
        let first = self.first().clone();
        self.marks.truncate(1);
        first
    }

    fn first(&self) -> &Writer {
        // `new` puts one in, and none of the others takes the last one out.
        &self.marks[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qemu_fleece_protocol::backup::Mode;
    use qemu_fleece_protocol::record::Begin;

    fn start() -> Writer {
        Writer::new(&Begin {
            format: 1,
            disk: "d".into(),
            size: 1 << 30,
            mode: Mode::Full,
            reason: None,
            base: None,
            checkpoint: None,
            granularity: 65536,
            offset: 0,
        })
    }

    #[test]
    fn a_million_records_keep_a_bounded_number_of_places() {
        let mut writer = start();
        let mut marks = Marks::new(writer.clone(), 1 << 30);
        for _ in 0..1_000_000 {
            writer.zero(512, false);
            marks.pass(&writer);
            assert!(marks.marks.len() <= MAX);
        }
        let resume = marks.acknowledge(300_000_000).offset();
        assert!(resume <= 300_000_000 && resume > 290_000_000, "{resume}");
        assert_eq!(marks.resume().offset(), resume);
        assert_eq!(marks.acknowledge(u64::MAX).offset(), resume);
    }

    #[test]
    fn going_on_gives_the_same_digest() {
        let mut whole = start();
        let mut marks = Marks::new(whole.clone(), 1 << 30);
        whole.data(b"abc");
        marks.pass(&whole);
        whole.zero(5, false);
        marks.pass(&whole);
        assert_eq!(marks.acknowledge(7).offset(), 3);
        let mut again = marks.resume();
        again.zero(5, false);
        assert_eq!(again.end(), whole.end());
    }
}
