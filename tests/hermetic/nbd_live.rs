//! A server that tells the truth: refusals, odd but legal replies, deadlines, ends,
//! and callers that do not wait for their answers.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::time::Duration;

use qemu_fleece_engine::Kind;
use qemu_fleece_engine::buffer::Pool;

use crate::nbd_server::*;

/// Short enough to wait for, long enough for a busy machine.
const SHORT: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_refused_read_leaves_the_connection_alive() {
    for style in CHUNKED {
        let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
        let ticket = client.submit_read(4096, buffer(512).await).await.unwrap();
        let asked = peer.request().await;
        let refusal = error(5, "bad sector", &4100u64.to_be_bytes());
        peer.send(&asked.chunk(DONE, ERROR_OFFSET, &refusal)).await;
        let error = ticket.await.unwrap_err();
        assert_says(&error, Kind::NbdRefused, "EIO bad sector");
        assert_eq!(error.offset(), Some(4100));
        assert_lives(&client, &mut peer).await;
    }
}

#[tokio::test]
async fn a_refused_simple_read_has_no_payload() {
    let (client, mut peer) = connect(&Hello::new(Style::Simple), PATIENT).await;
    let ticket = client.submit_read(4096, buffer(512).await).await.unwrap();
    let cookie = peer_cookie(&mut peer).await;
    peer.send(&simple(cookie, 28)).await;
    let error = ticket.await.unwrap_err();
    assert_says(&error, Kind::NbdRefused, "ENOSPC");
    assert_eq!(error.offset(), Some(4096));
    assert_lives(&client, &mut peer).await;
}

async fn peer_cookie(peer: &mut Peer) -> u64 {
    peer.request().await.cookie
}

#[tokio::test]
async fn an_error_behind_data_fails_the_request_only() {
    for style in CHUNKED {
        let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
        let ticket = client.submit_read(4096, buffer(1024).await).await.unwrap();
        let asked = peer.request().await;
        // Even when all bytes are there.
        peer.send(&asked.chunk(0, DATA, &data(4096, &[1; 1024])))
            .await;
        peer.send(&asked.chunk(0, ERROR, &error(22, "taken back", b"")))
            .await;
        peer.send(&asked.chunk(DONE, NONE, b"")).await;
        assert_says(
            &ticket.await.unwrap_err(),
            Kind::NbdRefused,
            "EINVAL taken back",
        );
        assert_lives(&client, &mut peer).await;
    }
}

#[tokio::test]
async fn an_error_with_the_longest_message_is_taken() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let ticket = client.submit_read(0, buffer(512).await).await.unwrap();
    let asked = peer.request().await;
    let message = "x".repeat(4096);
    let refusal = error(75, &message, &0u64.to_be_bytes());
    peer.send(&asked.chunk(DONE, ERROR_OFFSET, &refusal)).await;
    assert_says(&ticket.await.unwrap_err(), Kind::NbdRefused, &message);
    assert_lives(&client, &mut peer).await;
}

#[tokio::test]
async fn an_error_of_a_type_to_come_is_an_error() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let ticket = client.submit_block_status(0, 512).await.unwrap();
    let asked = peer.request().await;
    peer.send(&asked.chunk(DONE, 0x8777, &error(1234, "new", b"more")))
        .await;
    let error = ticket.await.unwrap_err();
    assert_says(&error, Kind::NbdRefused, "error 1234 new");
    assert_lives(&client, &mut peer).await;
}

#[tokio::test]
async fn chunks_in_any_order_between_those_of_others() {
    for style in CHUNKED {
        let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
        let one = client.submit_read(0, buffer(3000).await).await.unwrap();
        let two = client.submit_read(5000, buffer(3000).await).await.unwrap();
        let (first, second) = (peer.request().await, peer.request().await);
        peer.send(&second.chunk(0, DATA, &data(7000, &[3; 1000])))
            .await;
        peer.send(&first.chunk(0, HOLE, &hole(1000, 1000))).await;
        peer.send(&second.chunk(0, DATA, &data(5000, &[1; 1000])))
            .await;
        peer.send(&first.chunk(0, DATA, &data(2000, &[9; 1000])))
            .await;
        peer.send(&second.chunk(DONE, DATA, &data(6000, &[2; 1000])))
            .await;
        peer.send(&first.chunk(0, DATA, &data(0, &[8; 1000]))).await;
        peer.send(&first.chunk(DONE, NONE, b"")).await;
        let parts = |a, b, c| [[a; 1000], [b; 1000], [c; 1000]].concat();
        assert_eq!(one.await.unwrap()[..], parts(8, 0, 9));
        assert_eq!(two.await.unwrap()[..], parts(1, 2, 3));
    }
}

#[tokio::test]
async fn status_is_cut_at_the_request_and_may_end_before_it() {
    for style in CHUNKED {
        let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
        for (answer, expected) in [
            (vec![(100, 3), (u32::MAX, 0)], vec![(100, 3), (924, 0)]),
            (vec![(100, 3), (24, 3), (1, 0)], vec![(124, 3), (1, 0)]),
            (vec![(1024, 2)], vec![(1024, 2)]),
        ] {
            let ticket = client.submit_block_status(512, 1024).await.unwrap();
            let asked = peer.request().await;
            peer.send(&asked.status(ID, &answer)).await;
            assert_eq!(ticket.await.unwrap(), expected);
        }
    }
}

#[tokio::test]
async fn simple_replies_to_what_has_no_payload() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let flush = client.submit_flush().await.unwrap();
    let cookie = peer_cookie(&mut peer).await;
    peer.send(&simple(cookie, 0)).await;
    flush.await.unwrap();
    let trim = client.submit_trim(0, 4096).await.unwrap();
    let cookie = peer_cookie(&mut peer).await;
    peer.send(&simple(cookie, 1)).await;
    assert_says(&trim.await.unwrap_err(), Kind::NbdRefused, "EPERM");
    assert_lives(&client, &mut peer).await;
}

#[tokio::test]
async fn requests_look_as_specified() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
        // PAYLOAD_LEN, with extended headers only.
        let payload = if style == Style::Extended { 1 << 5 } else { 0 };
        let _write = client.submit_write(512, buffer(1024).await).await.unwrap();
        let asked = peer.request().await;
        assert_eq!((asked.command, asked.flags), (1, payload));
        assert_eq!((asked.offset, asked.length), (512, 1024));
        assert_eq!(peer.payload(1024).await, [0xee; 1024]);
        let _trim = client.submit_trim(0, 1 << 20).await.unwrap();
        let asked = peer.request().await;
        assert_eq!((asked.command, asked.flags, asked.length), (4, 0, 1 << 20));
        let _zero = client.submit_write_zeroes(0, 512, true).await.unwrap();
        let asked = peer.request().await;
        assert_eq!((asked.command, asked.flags), (6, 1 << 1));
        let _zero = client.submit_write_zeroes(0, 512, false).await.unwrap();
        assert_eq!(peer.request().await.flags, 0);
        let _flush = client.submit_flush().await.unwrap();
        let asked = peer.request().await;
        assert_eq!((asked.command, asked.offset, asked.length), (3, 0, 0));
        let closing = tokio::spawn(client.close());
        assert_eq!(peer.request().await.command, 2);
        drop(peer);
        closing.await.unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_asked_is_not_sent() {
    let mut hello = Hello::new(Style::Structured);
    hello.blocks = Some((512, 4096, 64 << 10));
    hello.size = (1 << 20) + 100;
    // Without TRIM, WRITE_ZEROES and FLUSH.
    hello.flags = 1;
    let (client, mut peer) = connect(&hello, PATIENT).await;
    for (offset, length) in [
        (0, 0),
        (0, 65 << 10),
        (1, 512),
        (0, 100),
        (1 << 20, 512),
        (u64::MAX, 512),
        (2 << 20, 512),
    ] {
        let refused = client.submit_read(offset, buffer(length).await).await;
        assert_eq!(refused.unwrap_err().kind(), Kind::InvalidRequest);
    }
    let refused = client.submit_block_status(0, 1 << 40).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::InvalidRequest);
    for refused in [
        client.submit_trim(0, 512).await,
        client.submit_write_zeroes(0, 512, false).await,
        client.submit_flush().await,
    ] {
        assert_eq!(refused.unwrap_err().kind(), Kind::QemuUnsupported);
    }
    // The tail of the disk is shorter than a block.
    let tail = client
        .submit_read(1 << 20, buffer(100).await)
        .await
        .unwrap();
    let asked = peer.request().await;
    peer.send(&asked.all(4)).await;
    assert_eq!(tail.await.unwrap()[..], [4; 100]);
}

#[tokio::test]
async fn block_status_needs_a_context() {
    let (client, mut peer) = connect(&Hello::new(Style::Simple), PATIENT).await;
    let refused = client.submit_block_status(0, 512).await.unwrap_err();
    assert_says(&refused, Kind::InvalidRequest, "no meta context");
    assert_lives(&client, &mut peer).await;
}

#[tokio::test]
async fn an_end_between_replies() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let one = client.submit_read(0, buffer(512).await).await.unwrap();
    let two = client.submit_flush().await.unwrap();
    peer.request().await;
    peer.request().await;
    peer.shut().await;
    assert_says(&one.await.unwrap_err(), Kind::NbdClosed, "end of file");
    assert_says(&two.await.unwrap_err(), Kind::NbdClosed, "end of file");
    assert_dead(&client, &mut peer, Kind::NbdClosed, "end of file").await;
}

#[tokio::test]
async fn an_end_in_the_middle_of_a_payload() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        for missing in [1, 400, 70_000, 99_999, 100_001] {
            let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
            let ticket = client.submit_read(0, buffer(100_000).await).await.unwrap();
            let reply = peer.request().await.all(1);
            peer.send(&reply[..reply.len() - missing]).await;
            peer.shut().await;
            assert_says(&ticket.await.unwrap_err(), Kind::NbdClosed, "end of file");
            assert_dead(&client, &mut peer, Kind::NbdClosed, "end of file").await;
        }
    }
}

#[tokio::test]
async fn silence_ends_the_connection_at_the_deadline() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), SHORT).await;
    let one = client.submit_read(0, buffer(512).await).await.unwrap();
    let two = client.submit_flush().await.unwrap();
    let says = "no complete reply within 2s";
    assert_says(&one.await.unwrap_err(), Kind::NbdTimeout, says);
    assert_says(&two.await.unwrap_err(), Kind::NbdTimeout, says);
    assert_dead(&client, &mut peer, Kind::NbdTimeout, says).await;
}

#[tokio::test]
async fn silence_in_the_middle_of_a_payload() {
    let (client, mut peer) = connect(&Hello::new(Style::Extended), SHORT).await;
    let ticket = client.submit_read(0, buffer(4096).await).await.unwrap();
    let reply = peer.request().await.all(1);
    peer.send(&reply[..2000]).await;
    let says = "no complete reply within";
    assert_says(&ticket.await.unwrap_err(), Kind::NbdTimeout, says);
    assert_dead(&client, &mut peer, Kind::NbdTimeout, says).await;
}

#[tokio::test]
async fn answers_to_others_do_not_excuse_a_late_one() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), SHORT).await;
    let late = client.submit_flush().await.unwrap();
    peer.request().await;
    let busy = async {
        // A server that always has something to say, but not this.
        while let Ok(ticket) = client.submit_read(0, buffer(512).await).await {
            // The deadline may fall between asking and sending.
            if let Some(asked) = peer.request_or_end().await {
                peer.send_what_is_taken(&asked.all(1)).await;
            }
            let _bytes = ticket.await;
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, busy).await.unwrap();
    let says = "no complete reply within";
    assert_says(&late.await.unwrap_err(), Kind::NbdTimeout, says);
}

#[tokio::test]
async fn an_idle_connection_has_no_deadline() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), SHORT).await;
    tokio::time::sleep(SHORT * 3).await;
    assert_lives(&client, &mut peer).await;
}

#[tokio::test]
async fn dropped_tickets_are_drained_and_give_their_buffers_back() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let pool = Pool::new(4);
    // Far more bytes than any socket holds.
    for _ in 0..20 {
        for _ in 0..4 {
            let ticket = client.submit_read(0, pool.take(256 << 10).await).await;
            drop(ticket.unwrap());
        }
        for _ in 0..4 {
            let asked = peer.request().await;
            peer.send(&asked.all(1)).await;
        }
    }
    assert_lives(&client, &mut peer).await;
    assert!(pool.try_take(1).is_some());
}

#[tokio::test]
async fn replies_are_drained_while_nobody_waits_for_them() {
    let (client, mut peer) = connect(&Hello::new(Style::Extended), PATIENT).await;
    let mut tickets = Vec::new();
    for _ in 0..16 {
        tickets.push(client.submit_read(0, buffer(1 << 20).await).await.unwrap());
    }
    // Nobody looks at a ticket; the server still gets rid of 16 MiB.
    for byte in 0..16 {
        let asked = peer.request().await;
        let sent = asked.all(byte);
        tokio::time::timeout(LIMIT, peer.send(&sent)).await.unwrap();
    }
    for (byte, ticket) in (0..).zip(tickets) {
        let bytes = ticket.await.unwrap();
        assert!(bytes.iter().all(|found| *found == byte));
    }
}

#[tokio::test]
async fn a_seventeenth_request_waits_and_a_dropped_one_harms_nothing() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let mut tickets = Vec::new();
    for _ in 0..16 {
        tickets.push(client.submit_flush().await.unwrap());
    }
    let more = tokio::time::timeout(Duration::from_millis(20), client.submit_flush());
    assert!(more.await.is_err());
    let first = peer.request().await;
    peer.send(&first.chunk(DONE, NONE, b"")).await;
    // Only room for it was waited for.
    let last = client.submit_flush().await.unwrap();
    for _ in 0..16 {
        let asked = peer.request().await;
        peer.send(&asked.chunk(DONE, NONE, b"")).await;
    }
    for ticket in tickets {
        ticket.await.unwrap();
    }
    last.await.unwrap();
}

#[tokio::test]
async fn big_writes_do_not_wait_for_big_replies() {
    // The server answers reads before it takes writes, both larger than a socket holds.
    let (client, mut peer) = connect(&Hello::new(Style::Extended), PATIENT).await;
    let mut reads = Vec::new();
    let mut writes = Vec::new();
    for _ in 0..8 {
        reads.push(client.submit_read(0, buffer(1 << 20).await).await.unwrap());
    }
    for _ in 0..8 {
        writes.push(client.submit_write(0, buffer(1 << 20).await).await.unwrap());
    }
    let server = async {
        for _ in 0..8 {
            let asked = peer.request().await;
            peer.send(&asked.all(1)).await;
        }
        for _ in 0..8 {
            let asked = peer.request().await;
            assert_eq!(peer.payload(asked.length).await.len(), 1 << 20);
            peer.send(&asked.chunk(DONE, NONE, b"")).await;
        }
    };
    tokio::time::timeout(LIMIT, server).await.unwrap();
    for ticket in reads {
        ticket.await.unwrap();
    }
    for ticket in writes {
        ticket.await.unwrap();
    }
}

#[tokio::test]
async fn dropping_the_client_hangs_up() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let ticket = client.submit_flush().await.unwrap();
    drop(client);
    tokio::time::timeout(LIMIT, peer.hung_up()).await.unwrap();
    assert_eq!(ticket.await.unwrap_err().kind(), Kind::NbdClosed);
}
