//! Writes as QEMU may send them, of a full: what comes out of them.

use super::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

/// A push of `pieces` whose job ends like this.
async fn push(
    pieces: impl IntoIterator<Item = Piece>,
    outcome: Result<u64>,
) -> (Vec<Extent>, Result<()>) {
    let flow = Arc::new(Flow::default());
    let (sink, received) = mpsc::channel(PIECES);
    for piece in pieces {
        if let Piece::Data(range, _) = &piece {
            flow.take(length(range)).await;
        }
        sink.send(Ok(piece)).await.unwrap();
    }
    drop(sink);
    let cancel = CancellationToken::new();
    let mut receive = Receive {
        size: SIZE,
        pieces: received,
        ahead: BTreeMap::new(),
        plan: Plan {
            size: SIZE,
            at: 0,
            changes: None,
        },
        chunks: Chunks::new(READ_MAX),
        at: 0,
        expected: 0,
        handed: 0,
        flow,
        progress: watch::channel(Progress::default()).1,
        _end: cancel.clone().drop_guard(),
        cancel,
        job: Some(tokio::spawn(async { outcome })),
    };
    let mut extents = Vec::new();
    loop {
        match receive.next().await {
            Ok(Some(chunk)) => {
                let same = chunk.bytes.as_ref().is_none_or(|bytes| {
                    bytes
                        .iter()
                        .all(|byte| u64::from(*byte) == mark(chunk.extent.range.start))
                });
                assert!(same, "{:?} has other bytes", chunk.extent);
                extents.push(chunk.extent.clone());
            }
            Ok(None) => return (extents, Ok(())),
            Err(error) => return (extents, Err(error)),
        }
    }
}

/// The byte of all data in the MiB of this offset.
fn mark(offset: u64) -> u64 {
    offset / MIB + 1
}

async fn data(range: Range) -> Piece {
    let mut buffer = Pool::new(1)
        .take(usize::try_from(length(&range)).unwrap())
        .await;
    buffer.fill(u8::try_from(mark(range.start)).unwrap());
    Piece::Data(range, buffer)
}

async fn broken(pieces: Vec<Piece>, why: &str) {
    let (_, pushed) = push(pieces, Ok(0)).await;
    let error = pushed.unwrap_err();
    assert_eq!(error.kind(), Kind::NbdProtocol);
    assert!(error.chain().contains(why), "{}", error.chain());
}

fn extents(of: &[(Range, Content)]) -> Vec<Extent> {
    let extent = |(range, content): &(Range, Content)| Extent {
        range: range.clone(),
        content: *content,
    };
    of.iter().map(extent).collect()
}

#[tokio::test]
async fn any_order() {
    let pieces = vec![
        data(3 * MIB..SIZE).await,
        data(0..MIB).await,
        Piece::Zero(MIB..2 * MIB),
        data(2 * MIB..3 * MIB).await,
    ];
    let (found, pushed) = push(pieces, Ok(SIZE)).await;
    pushed.unwrap();
    let zero = Content::Zero { hole: false };
    let expected = extents(&[
        (0..MIB, Content::Data),
        (MIB..2 * MIB, zero),
        (2 * MIB..3 * MIB, Content::Data),
        (3 * MIB..SIZE, Content::Data),
    ]);
    assert_eq!(found, expected);
}

#[tokio::test]
async fn a_range_that_is_written_twice() {
    let again = [0..MIB, MIB - 4096..MIB, 0..2 * MIB];
    for again in again {
        let pieces = vec![data(0..MIB).await, Piece::Zero(again)];
        broken(pieces, "written twice").await;
    }
    // Ahead of its turn.
    let pieces = vec![Piece::Zero(MIB..3 * MIB), Piece::Zero(2 * MIB..SIZE)];
    broken(pieces, "written twice").await;
}

#[tokio::test]
async fn a_write_that_is_missing() {
    let pieces = vec![data(0..MIB).await, Piece::Zero(2 * MIB..SIZE)];
    let (found, pushed) = push(pieces, Ok(SIZE)).await;
    assert_eq!(pushed.unwrap_err().kind(), Kind::NbdClosed);
    assert!(found.iter().all(|extent| extent.range.end <= MIB));
}

#[tokio::test]
async fn a_job_that_fails_tells_why() {
    let failed = || Err(Error::new(Kind::TargetFailed, "pushing a disk"));
    let pieces = vec![data(0..MIB).await];
    let (_, pushed) = push(pieces, failed()).await;
    assert_eq!(pushed.unwrap_err().kind(), Kind::TargetFailed);
    // Also where all was written: it says whether that is durable.
    let (_, pushed) = push([Piece::Zero(0..SIZE)], failed()).await;
    assert_eq!(pushed.unwrap_err().kind(), Kind::TargetFailed);
}
