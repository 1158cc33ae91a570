//! The ways to negotiate that only targets of pushes know; `tests/hermetic` has the others.

use super::*;
use crate::nbd::by_hand::{greeting, option_reply as reply};

/// A server that says all this and hangs up: what the client makes of it, and what it said.
async fn tls(says: &[&[u8]]) -> (Result<()>, Vec<u8>) {
    let (mut ours, mut server) = tokio::io::duplex(4096);
    server.write_all(&says.concat()).await.unwrap();
    server.shutdown().await.unwrap();
    let agreed = start_tls(&mut ours).await;
    drop(ours);
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).await.unwrap();
    (agreed, heard)
}

#[tokio::test]
async fn tls_is_agreed() {
    let ack = reply(option::START_TLS, option_reply::ACK, &[]);
    let (agreed, heard) = tls(&[&greeting(FLAG_FIXED_NEWSTYLE), &ack]).await;
    agreed.unwrap();
    let expected = [&[0, 0, 0, 1][..], b"IHAVEOPT", &[0, 0, 0, 5], &[0; 4]];
    assert_eq!(heard, expected.concat());
}

#[tokio::test]
async fn tls_is_not_agreed() {
    let refusal = reply(option::START_TLS, option_reply::ERR_UNSUP, b"never");
    let another = reply(option::START_TLS, option_reply::INFO, &[]);
    let plain = reply(option::GO, option_reply::ACK, &[]);
    for (says, kind) in [
        (refusal, Kind::NbdUnreachable),
        (another, Kind::NbdProtocol),
        (plain, Kind::NbdProtocol),
        (vec![], Kind::NbdClosed),
    ] {
        assert_eq!(
            tls(&[&greeting(FLAG_FIXED_NEWSTYLE), &says])
                .await
                .0
                .unwrap_err()
                .kind(),
            kind
        );
    }
    assert_eq!(
        tls(&[&[0; 18]]).await.0.unwrap_err().kind(),
        Kind::NbdProtocol
    );
}

#[tokio::test]
async fn a_simple_client_asks_for_nothing_but_the_export() {
    let (mut ours, mut server) = tokio::io::duplex(4096);
    let size = [&[0, 0][..], &4096u64.to_be_bytes(), &[0, 1]].concat();
    let says = [
        greeting(FLAG_FIXED_NEWSTYLE),
        reply(option::GO, option_reply::INFO, &size),
        reply(option::GO, option_reply::ACK, &[]),
    ];
    server.write_all(&says.concat()).await.unwrap();
    let export = negotiate_simple(&mut ours, "a").await.unwrap();
    assert_eq!((export.size, export.replies), (4096, Replies::Simple));
    drop(ours);
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).await.unwrap();
    let expected = [&[0, 0, 0, 1][..], b"IHAVEOPT", &[0, 0, 0, 7, 0, 0, 0, 9]];
    assert!(heard.starts_with(&expected.concat()));
}

/// What is found is offered on, and found again as it is.
#[tokio::test]
async fn a_server_that_likes_more_than_we_take() {
    use crate::nbd::serve::{Offered, Served};
    let (mut ours, mut server) = tokio::io::duplex(4096);
    let size = [&[0, 0][..], &(1u64 << 40).to_be_bytes(), &[0, 1]].concat();
    let blocks = [&[0, 3][..], &[0, 0, 0, 1], &[4, 0, 0, 0], &[4, 0, 0, 0]].concat();
    let says = [
        greeting(FLAG_FIXED_NEWSTYLE),
        reply(option::GO, option_reply::INFO, &size),
        reply(option::GO, option_reply::INFO, &blocks),
        reply(option::GO, option_reply::ACK, &[]),
    ];
    server.write_all(&says.concat()).await.unwrap();
    let export = negotiate_simple(&mut ours, "a").await.unwrap();
    let most = DEFAULT_MAX_PAYLOAD;
    assert_eq!((export.preferred_block, export.max_payload), (most, most));
    let (mut client, server) = tokio::io::duplex(4096);
    let served = Served::welcome(server, Offered::of(&export));
    let (served, found) = tokio::join!(served, negotiate_simple(&mut client, "a"));
    served.unwrap();
    assert_eq!(found.unwrap(), export);
}

#[tokio::test]
async fn a_name_that_is_too_long() {
    let (mut ours, _server) = tokio::io::duplex(4096);
    let name = "a".repeat(MAX_STRING + 1);
    let error = negotiate_simple(&mut ours, &name).await.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidRequest);
}
