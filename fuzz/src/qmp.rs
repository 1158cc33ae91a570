//! What a monitor sends: lines, each a message.

use qemu_fleece_engine::qemu::line::Lines;

use super::input::Cuts;

/// However the bytes are cut, the same messages are found, and the same end.
pub fn run(input: &[u8]) {
    let whole = read(input, Cuts::Whole);
    assert_eq!(read(input, Cuts::Small), whole);
}

fn read(input: &[u8], cuts: Cuts) -> Vec<String> {
    let (mut lines, mut seen) = (Lines::default(), Vec::new());
    for bytes in cuts.of(input) {
        lines.space().extend_from_slice(bytes);
        loop {
            match lines.next_message() {
                Ok(Some(message)) => seen.push(format!("{message:?}")),
                Ok(None) => break,
                Err(error) => {
                    seen.push(error.chain());
                    return seen;
                }
            }
        }
    }
    seen
}
