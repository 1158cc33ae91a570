//! Clients that ask much and take nothing, and what the server sees of them.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;

use super::*;
use crate::nbd::by_hand::{chunk as part, request, simple};
use crate::nbd::wire::chunk;

const MIB: u32 = 1 << 20;

/// A courier between the two ends that come back.
fn between(room: usize) -> (DuplexStream, DuplexStream, JoinHandle<Result<()>>) {
    let (client, from_client) = tokio::io::duplex(room);
    let (server, to_server) = tokio::io::duplex(room);
    (client, server, tokio::spawn(carry(from_client, to_server)))
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, what).await.unwrap()
}

/// The server's next request.
async fn hear(server: &mut DuplexStream) -> Request {
    let mut header = [0; Request::BYTES];
    within(server.read_exact(&mut header)).await.unwrap();
    Request::decode(&header).unwrap()
}

/// Nothing comes, however often all others get their turn.
async fn hears_nothing(server: &mut DuplexStream) {
    let mut byte = [0];
    for _ in 0..1000 {
        tokio::select! {
            biased;
            heard = server.read(&mut byte) => panic!("{heard:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
}

fn data(cookie: u64, length: u32) -> Vec<u8> {
    let bytes = vec![0x61; 8 + usize::try_from(length).unwrap()];
    part(chunk::FLAG_DONE, chunk::OFFSET_DATA, cookie, &bytes)
}

#[tokio::test]
async fn requests_and_replies_as_they_are() {
    let (mut client, mut server, task) = between(16);
    let asks = [
        request(command::READ, 1, 0, 3),
        request(command::BLOCK_STATUS, 2, 0, 4096),
        request(command::WRITE_ZEROES, 3, 0, 512),
        request(99, 4, 5, 6),
    ];
    let answers = [
        simple(22, 4),
        data(2, 4),
        simple(0, 1),
        b"abc".to_vec(),
        simple(1, 3),
    ];
    let serve = async {
        for ask in &asks {
            let mut heard = [0; Request::BYTES];
            server.read_exact(&mut heard).await.unwrap();
            assert_eq!(heard[..], ask[..]);
        }
        server.write_all(&answers.concat()).await.unwrap();
        assert_eq!(hear(&mut server).await.command, command::DISC);
        drop(server);
    };
    let talk = async {
        client.write_all(&asks.concat()).await.unwrap();
        let mut heard = vec![0; answers.concat().len()];
        client.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, answers.concat());
        let goodbye = request(command::DISC, 0, 0, 0);
        client.write_all(&goodbye).await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    };
    within(async { tokio::join!(serve, talk) }).await;
    within(task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_takes_nothing_does_not_hold_up_the_server() {
    let (mut client, mut server, _task) = between(64 * 1024);
    let asks = (0..40).map(|cookie| request(command::READ, cookie, 0, MIB));
    client
        .write_all(&asks.flatten().collect::<Vec<u8>>())
        .await
        .unwrap();
    // As many as there is room for come through, and each can be answered.
    let most = ROOM
        / most(
            &Request::decode(&request(command::READ, 0, 0, MIB)[..].try_into().unwrap()).unwrap(),
        );
    for cookie in 0..most {
        assert_eq!(hear(&mut server).await.cookie, cookie);
    }
    hears_nothing(&mut server).await;
    for cookie in (0..most).rev() {
        within(server.write_all(&data(cookie, MIB))).await.unwrap();
    }
    hears_nothing(&mut server).await;
    // The next goes on when the client has the whole of a reply.
    let reply = data(0, MIB).len();
    let mut heard = vec![0; reply - 1];
    within(client.read_exact(&mut heard)).await.unwrap();
    assert!(heard == data(most - 1, MIB)[..reply - 1]);
    within(client.read_exact(&mut [0])).await.unwrap();
    assert_eq!(hear(&mut server).await.cookie, most);
}

#[tokio::test]
async fn the_longest_read_has_room() {
    let (mut client, mut server, _task) = between(64 * 1024);
    for length in [32 * MIB, u32::MAX] {
        let ask = request(command::READ, 1, 0, length);
        client.write_all(&ask).await.unwrap();
        assert_eq!(hear(&mut server).await.length, u64::from(length));
        if length == u32::MAX {
            server.write_all(&simple(22, 1)).await.unwrap();
            break;
        }
        within(server.write_all(&data(1, length))).await.unwrap();
        let mut heard = vec![0; data(1, length).len()];
        within(client.read_exact(&mut heard)).await.unwrap();
        assert!(heard == data(1, length));
    }
    let mut heard = [0; 16];
    within(client.read_exact(&mut heard)).await.unwrap();
    assert_eq!(heard[..], simple(22, 1));
}

#[tokio::test]
async fn requests_of_one_cookie_go_one_after_the_other() {
    let (mut client, mut server, _task) = between(1024);
    let asks = request(command::READ, 7, 0, 4).repeat(2);
    client.write_all(&asks).await.unwrap();
    hear(&mut server).await;
    hears_nothing(&mut server).await;
    server.write_all(&data(7, 4)).await.unwrap();
    hear(&mut server).await;
}

#[tokio::test]
async fn a_write_comes_to_nothing() {
    let (mut client, mut server, _task) = between(16);
    let length = 3 * MIB;
    let say = async {
        let mut says = request(command::WRITE, 7, 4096, length);
        says.extend(vec![0x77; usize::try_from(length).unwrap()]);
        says.extend(request(command::FLUSH, 8, 0, 0));
        client.write_all(&says).await.unwrap();
    };
    let serve = async {
        let heard = hear(&mut server).await;
        assert_eq!((heard.command, heard.cookie), (command::TRIM, 7));
        assert_eq!((heard.flags, heard.offset, heard.length), (0, 0, 0));
        assert_eq!(hear(&mut server).await.command, command::FLUSH);
    };
    within(async { tokio::join!(say, serve) }).await;
}

#[tokio::test]
async fn clients_that_break_the_protocol() {
    let whole = request(command::WRITE, 1, 0, 10);
    for (says, kind) in [
        (vec![0; 28], Kind::NbdProtocol),
        (whole[..27].to_vec(), Kind::NbdClosed),
        (whole[..1].to_vec(), Kind::NbdClosed),
        ([&whole[..], b"9 bytes.."].concat(), Kind::NbdClosed),
    ] {
        let (mut client, mut server, task) = between(64);
        client.write_all(&says).await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(within(task).await.unwrap().unwrap_err().kind(), kind);
        assert_eq!(within(server.read(&mut [0])).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_server_that_lies_or_ends() {
    for (says, kind) in [
        (simple(0, 8), Some(Kind::NbdProtocol)),
        (vec![0; 16], Some(Kind::NbdProtocol)),
        (data(7, 4), None),
        (data(7, 4)[..30].to_vec(), None),
    ] {
        let (mut client, mut server, task) = between(64);
        let ask = request(command::READ, 7, 0, 4);
        client.write_all(&ask).await.unwrap();
        hear(&mut server).await;
        server.write_all(&says).await.unwrap();
        drop(server);
        let mut heard = Vec::new();
        within(client.read_to_end(&mut heard)).await.unwrap();
        let ended = within(task).await.unwrap();
        assert_eq!(ended.err().map(|error| error.kind()), kind);
        if kind.is_none() {
            assert_eq!(heard, says);
        }
    }
}

#[tokio::test]
async fn a_client_that_has_asked_all_has_all_its_replies() {
    let (mut client, mut server, task) = between(64);
    let ask = request(command::READ, 7, 0, MIB);
    client.write_all(&ask).await.unwrap();
    client.shutdown().await.unwrap();
    hear(&mut server).await;
    let serve = async {
        server.write_all(&data(7, MIB)).await.unwrap();
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        drop(server);
    };
    let mut heard = Vec::new();
    within(async { tokio::join!(serve, client.read_to_end(&mut heard)) })
        .await
        .1
        .unwrap();
    assert!(heard == data(7, MIB));
    within(task).await.unwrap().unwrap();
}

proptest! {
    /// Whatever a client says, the server hears whole requests, and no write.
    #[test]
    fn no_bytes_do_harm(
        kinds in proptest::collection::vec((0u16..9, 0u32..200), 0..8),
        junk in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let heard = runtime.block_on(async {
            let (mut client, mut server, task) = between(100_000);
            for (cookie, (kind, length)) in kinds.iter().enumerate() {
                client.write_all(&request(*kind, cookie as u64, 0, *length)).await.unwrap();
            }
            client.write_all(&junk).await.unwrap();
            client.shutdown().await.unwrap();
            let mut heard = Vec::new();
            within(server.read_to_end(&mut heard)).await.unwrap();
            drop(server);
            let _ended = within(task).await.unwrap();
            heard
        });
        prop_assert_eq!(heard.len() % Request::BYTES, 0);
        for header in heard.chunks_exact(Request::BYTES) {
            let request = Request::decode(header.try_into().unwrap()).unwrap();
            prop_assert!(request.command != command::WRITE);
        }
    }
}
