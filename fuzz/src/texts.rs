//! Small texts that others may have written: notes that QEMU keeps, names of bitmaps and of
//! files, places in a stream, addresses.

use qemu_fleece_engine::checkpoint::{Checkpoint, Id, Name};
use qemu_fleece_engine::qemu::query::plain_file;
use qemu_fleece_engine::qemu::{Address, step};
use qemu_fleece_engine::saved;
use qemu_fleece_protocol::stream::Writer;

/// What is taken for one of ours is written as it was read.
pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Some(deed) = saved::deed(text) {
        let again = saved::to_text(&deed).expect("it was JSON");
        assert_eq!(saved::deed(&again), Some(deed));
    }
    if let Some(progress) = saved::progress(text) {
        let again = saved::to_text(&progress).expect("it was JSON");
        assert_eq!(saved::progress(&again), Some(progress));
    }
    if let Some(mut writer) = Writer::load(text) {
        assert_eq!(writer.save(), text);
        assert!(writer.data_bytes() <= writer.offset());
        // It can go on to the end of any disk.
        writer.zero((1 << 63) - writer.offset(), false);
        assert_eq!(writer.end().digest.len(), 64);
    }
    if let Some(checkpoint) = Checkpoint::from_bitmap(text) {
        assert_eq!(checkpoint.bitmap(), text);
    }
    if let Ok(name) = Name::parse(text) {
        assert_eq!(name.as_str(), text);
        assert!(!text.contains(['/', '\0']) && !text.starts_with('.'));
    }
    if let Ok(id) = Id::parse(text) {
        assert_eq!(id.as_str(), text);
    }
    if let Ok(address) = Address::parse(text) {
        assert_eq!(Address::parse(&address.to_string()).ok(), Some(address));
    }
    if step::session_of(text).is_some() {
        assert!(text.starts_with(step::PREFIX));
    }
    let file = plain_file(text);
    assert!(text.starts_with("json:") || file == text);
}
