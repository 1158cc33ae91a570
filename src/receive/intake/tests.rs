//! A client that writes more than is wanted: each write is answered, and memory is bounded.

use std::time::Duration;

use super::*;
use crate::nbd::Client;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 1 << 40;

/// Long enough for any answer that comes at all.
const PATIENCE: Duration = Duration::from_secs(60);

struct Pushed {
    client: Client,
    pieces: mpsc::UnboundedReceiver<Piece>,
    flow: Arc<Flow>,
    intake: tokio::task::JoinHandle<Result<()>>,
}

impl Pushed {
    async fn start() -> Self {
        let (theirs, ours) = tokio::io::duplex(64 * 1024);
        let (sink, pieces) = mpsc::unbounded_channel();
        let flow = Flow::new();
        let held = Arc::clone(&flow);
        let intake = tokio::spawn(async move { serve(ours, SIZE, &sink, &held).await });
        Self {
            client: Client::over(theirs, "", None, PATIENCE).await.unwrap(),
            pieces,
            flow,
            intake,
        }
    }

    /// Whether a write of a MiB full of this byte is taken in, once it is answered.
    async fn write(&self, offset: u64, byte: u8) -> bool {
        let mut buffer = Pool::new(1).take(usize::try_from(MIB).unwrap()).await;
        buffer.fill(byte);
        taken(
            self.client
                .submit_write(offset, buffer)
                .await
                .unwrap()
                .await,
        )
    }

    async fn zero(&self, offset: u64) -> bool {
        let zeroed = self.client.submit_write_zeroes(offset, MIB, false).await;
        taken(zeroed.unwrap().await)
    }
}

fn taken(answer: Result<()>) -> bool {
    if let Err(error) = &answer {
        assert_eq!(error.kind(), Kind::NbdRefused);
        assert!(error.chain().contains("ENOSPC"), "{}", error.chain());
    }
    answer.is_ok()
}

#[tokio::test]
async fn what_nobody_takes_is_refused_in_the_end() {
    let mut pushed = Pushed::start().await;
    let mut count = 0;
    while pushed.write(count * MIB, 1).await {
        count += 1;
        assert!(pushed.flow.held() == count * MIB && count < 1000);
    }
    assert!(pushed.flow.is_high());
    for number in 0..10 {
        assert!(!pushed.write((1000 + number) * MIB, 2).await);
        assert!(!pushed.zero(2000 * MIB).await);
    }
    assert_eq!(pushed.flow.held(), count * MIB);
    // What is waited for is taken in, and only that.
    pushed.flow.wait_for(Some(count * MIB));
    assert!(!pushed.write(2000 * MIB, 2).await);
    assert!(pushed.write(count * MIB, 1).await);
    assert!(!pushed.write(count * MIB, 2).await);
    // What was refused has left nothing behind, and may come once there is room.
    for number in 0..=count {
        let Some(Piece::Data(range, buffer)) = pushed.pieces.recv().await else {
            panic!("no data");
        };
        assert_eq!(range, number * MIB..(number + 1) * MIB);
        assert!(buffer.iter().all(|byte| *byte == 1));
    }
    assert_eq!(pushed.flow.held(), 0);
    assert!(pushed.write(2000 * MIB, 3).await);
    assert_eq!(
        pushed.pieces.recv().await.unwrap().range().start,
        2000 * MIB
    );
    pushed.client.close().await;
    pushed.intake.await.unwrap().unwrap();
}

/// Zeros have no bytes, and take memory all the same.
#[tokio::test]
async fn zeros_that_nobody_takes_are_refused_in_the_end() {
    let pushed = Pushed::start().await;
    let mut count = 0;
    while pushed.zero(count * MIB).await {
        count += 1;
        assert!(count < 100_000);
    }
    assert!(count > 4096);
    assert!(!pushed.write(count * MIB, 1).await);
}

#[tokio::test]
async fn it_ends_when_nobody_takes_the_pieces_any_more() {
    let mut pushed = Pushed::start().await;
    pushed.pieces.close();
    let answer = pushed.client.submit_write_zeroes(0, MIB, false).await;
    assert_eq!(answer.unwrap().await.unwrap_err().kind(), Kind::NbdClosed);
    pushed.intake.await.unwrap().unwrap();
}

#[tokio::test]
async fn it_ends_when_it_is_cut_off_wherever_it_is() {
    for has_client in [false, true] {
        let (theirs, ours) = tokio::net::UnixStream::pair().unwrap();
        let (to, receiver) = oneshot::channel();
        let cut = tokio_util::sync::CancellationToken::new();
        let door = crate::offer::Door::Connected(ours);
        let receiving = Receiver {
            door,
            cut: cut.clone(),
        };
        to.send(receiving).unwrap();
        let (sink, _pieces) = mpsc::unbounded_channel();
        let intake = tokio::spawn(async move { receive(receiver, SIZE, sink, &Flow::new()).await });
        let client = if has_client {
            Some(Client::over(theirs, "", None, PATIENCE).await.unwrap())
        } else {
            None
        };
        cut.cancel();
        let ended = tokio::time::timeout(PATIENCE, intake).await;
        ended.unwrap().unwrap().unwrap();
        drop(client);
    }
}

#[tokio::test]
async fn a_push_that_opens_no_target_has_nothing_to_take_in() {
    let (to, receiver) = oneshot::channel();
    drop(to);
    let (sink, mut pieces) = mpsc::unbounded_channel();
    receive(receiver, SIZE, sink, &Flow::new()).await.unwrap();
    assert!(pieces.recv().await.is_none());
}
