//! Writes as QEMU may send them, of a full: what comes out of them.

use super::*;
use crate::buffer::Pool;
use crate::extent::{Range, length};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

fn zero(flow: &Arc<Flow>, range: Range) -> Piece {
    let held = flow.take(range.start, 0).unwrap();
    Piece::Zero(range, held)
}

fn data(flow: &Arc<Flow>, range: Range) -> Piece {
    let bytes = length(&range);
    let held = flow.take(range.start, bytes).unwrap();
    let mut buffer = Pool::new(1).counted(usize::try_from(bytes).unwrap(), held);
    buffer.fill(mark(range.start));
    Piece::Data(range, buffer)
}

/// The byte of all data in the MiB of this offset.
fn mark(offset: u64) -> u8 {
    u8::try_from(offset / MIB + 1).unwrap()
}

/// An assembly, and where its pieces come in.
fn assembly() -> (mpsc::UnboundedSender<Piece>, Assembly, Arc<Flow>) {
    let flow = Flow::new();
    let (sink, pieces) = mpsc::unbounded_channel();
    let assembly = Assembly::new(Plan::full(SIZE), pieces, Arc::clone(&flow));
    (sink, assembly, flow)
}

/// What comes of writes to these ranges; of zeros, where it is said.
async fn assemble(writes: &[(Range, Content)]) -> (Vec<Extent>, Result<Next>) {
    let (sink, mut assembly, flow) = assembly();
    for (range, content) in writes {
        let piece = match content {
            Content::Data => data(&flow, range.clone()),
            _ => zero(&flow, range.clone()),
        };
        sink.send(piece).unwrap();
    }
    drop(sink);
    let mut extents = Vec::new();
    loop {
        match assembly.next().await {
            Ok(Next::Chunk(Chunk { extent, bytes })) => {
                let expected = mark(extent.range.start);
                let mut bytes = bytes.iter().flat_map(|bytes| bytes.iter());
                assert!(
                    bytes.all(|byte| *byte == expected),
                    "{extent:?} has other bytes"
                );
                extents.push(extent);
            }
            end => return (extents, end),
        }
    }
}

const DATA: Content = Content::Data;
const ZERO: Content = Content::Zero { hole: false };

async fn broken(writes: &[(Range, Content)], why: &str) {
    let (_, end) = assemble(writes).await;
    let error = end.unwrap_err();
    assert_eq!(error.kind(), Kind::NbdProtocol);
    assert!(error.chain().contains(why), "{}", error.chain());
}

#[tokio::test]
async fn any_order() {
    let writes = [
        (3 * MIB..SIZE, DATA),
        (0..MIB, DATA),
        (MIB..2 * MIB, ZERO),
        (2 * MIB..3 * MIB, DATA),
    ];
    let (found, end) = assemble(&writes).await;
    assert!(matches!(end, Ok(Next::End)), "{end:?}");
    let mut expected = writes.to_vec();
    expected.sort_by_key(|(range, _)| range.start);
    let expected = expected
        .into_iter()
        .map(|(range, content)| Extent { range, content });
    assert_eq!(found, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn a_range_that_is_written_twice() {
    for again in [0..MIB, MIB - 4096..MIB, 0..2 * MIB] {
        broken(&[(0..MIB, DATA), (again, ZERO)], "written twice").await;
    }
    // Ahead of its turn.
    let writes = [(MIB..3 * MIB, ZERO), (2 * MIB..SIZE, ZERO)];
    broken(&writes, "written twice").await;
    // Behind it.
    let writes = [(0..SIZE, ZERO), (MIB..2 * MIB, ZERO)];
    broken(&writes, "what did not change").await;
}

#[tokio::test]
async fn a_write_that_is_missing() {
    let (found, end) = assemble(&[(0..MIB, DATA), (2 * MIB..SIZE, ZERO)]).await;
    assert!(matches!(end, Ok(Next::Early)), "{end:?}");
    assert!(found.iter().all(|extent| extent.range.end <= MIB));
}

/// Many zeros may come ahead of one slow read; a job that is paused then goes on for it.
#[tokio::test]
async fn a_write_that_all_others_wait_for() {
    let (sink, mut assembly, flow) = assembly();
    let mut at = MIB;
    while !flow.is_high() {
        sink.send(zero(&flow, at..at + 128)).unwrap();
        at += 128;
    }
    sink.send(zero(&flow, at..SIZE)).unwrap();
    assert!(!flow.is_starving());
    let next = tokio::spawn(async move {
        let first = assembly.next().await;
        (first, assembly)
    });
    while !flow.is_starving() {
        tokio::task::yield_now().await;
    }
    sink.send(data(&flow, 0..MIB)).unwrap();
    drop(sink);
    let (first, mut assembly) = next.await.unwrap();
    let Ok(Next::Chunk(first)) = first else {
        panic!("{first:?}");
    };
    assert_eq!(first.extent.range, 0..MIB);
    assert!(!flow.is_starving());
    let Ok(Next::Chunk(rest)) = assembly.next().await else {
        panic!("zeros are missing");
    };
    assert_eq!(rest.extent.range, MIB..SIZE);
    assert!(matches!(assembly.next().await, Ok(Next::End)));
}

/// What is held counts until the consumer has dropped it, and then no more.
#[tokio::test]
async fn chunks_are_counted_until_they_are_gone() {
    let (sink, mut assembly, flow) = assembly();
    for (number, start) in (0..SIZE).step_by(64 * 1024).enumerate() {
        let range = start..start + 64 * 1024;
        let piece = match number % 2 {
            0 => zero(&flow, range),
            _ => data(&flow, range),
        };
        sink.send(piece).unwrap();
    }
    drop(sink);
    let mut chunks = Vec::new();
    while let Ok(Next::Chunk(chunk)) = assembly.next().await {
        chunks.push(chunk);
    }
    assert_eq!(flow.held(), SIZE / 2);
    chunks.truncate(chunks.len() / 2);
    assert_eq!(flow.held(), SIZE / 4);
    chunks.clear();
    assert_eq!(flow.held(), 0);
}
