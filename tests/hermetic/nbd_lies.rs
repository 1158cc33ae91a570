//! What a server may get wrong in a reply, one test each. Every lie ends the
//! connection: the request and all later ones fail with the lie in the source, and
//! the socket is closed although the client is still held.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use qemu_fleece_engine::Kind;

use crate::nbd_server::*;

/// Where reads and status requests start, and how long they are.
const AT: u64 = 4096;
const LENGTH: usize = 8192;

/// A READ, answered with a lie.
async fn read_lie(style: Style, answer: impl FnOnce(&Asked) -> Vec<u8>, says: &str) {
    let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
    let ticket = client.submit_read(AT, buffer(LENGTH).await).await.unwrap();
    let asked = peer.request().await;
    assert_eq!((asked.command, asked.offset, asked.length), (0, AT, 8192));
    peer.send(&answer(&asked)).await;
    assert_says(&ticket.await.unwrap_err(), Kind::NbdProtocol, says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, says).await;
}

/// A BLOCK_STATUS, answered with a lie.
async fn status_lie(style: Style, answer: impl FnOnce(&Asked) -> Vec<u8>, says: &str) {
    let (client, mut peer) = connect(&Hello::new(style), PATIENT).await;
    let ticket = client.submit_block_status(AT, 8192).await.unwrap();
    let asked = peer.request().await;
    assert_eq!((asked.command, asked.offset, asked.length), (7, AT, 8192));
    peer.send(&answer(&asked)).await;
    assert_says(&ticket.await.unwrap_err(), Kind::NbdProtocol, says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_reply_with_a_wrong_magic() {
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        // Four bytes tell; no more may ever come.
        read_lie(style, |_| vec![0xab; 4], "magic 0xabababab").await;
    }
}

#[tokio::test]
async fn a_cookie_that_nobody_knows() {
    for style in CHUNKED {
        let answer = |asked: &Asked| {
            Asked {
                cookie: 99,
                ..asked.clone()
            }
            .all(0)
        };
        read_lie(style, answer, "cookie 99, which no request waits for").await;
    }
    let answer = |_: &Asked| simple(98, 0);
    read_lie(Style::Simple, answer, "cookie 98").await;
}

#[tokio::test]
async fn a_cookie_answered_twice() {
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let first = client.submit_read(AT, buffer(LENGTH).await).await.unwrap();
    let second = client.submit_read(0, buffer(LENGTH).await).await.unwrap();
    let asked = peer.request().await;
    peer.send(&asked.all(1)).await;
    assert_eq!(first.await.unwrap()[0], 1);
    peer.send(&asked.all(2)).await;
    let says = format!("cookie {}, which no request", asked.cookie);
    assert_says(&second.await.unwrap_err(), Kind::NbdProtocol, &says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, &says).await;
}

#[tokio::test]
async fn a_data_chunk_outside_the_request() {
    for style in CHUNKED {
        for offset in [AT - 1, AT + 8192 - 3, AT + 8192, 0, u64::MAX, u64::MAX - 3] {
            let answer = |asked: &Asked| asked.chunk(DONE, DATA, &data(offset, &[1; 4]));
            read_lie(
                style,
                answer,
                &format!("4 bytes at {offset}, outside the request"),
            )
            .await;
        }
    }
}

#[tokio::test]
async fn a_hole_outside_the_request() {
    for style in CHUNKED {
        for (offset, length) in [(AT - 1, 1), (AT, 8193), (AT, u32::MAX), (u64::MAX, 2)] {
            let answer = |asked: &Asked| asked.chunk(DONE, HOLE, &hole(offset, length));
            read_lie(style, answer, "outside the request").await;
        }
    }
}

#[tokio::test]
async fn a_hole_of_no_length() {
    let answer = |asked: &Asked| asked.chunk(DONE, HOLE, &hole(AT, 0));
    read_lie(Style::Structured, answer, "a chunk of 0 bytes").await;
}

#[tokio::test]
async fn overlapping_chunks() {
    for style in CHUNKED {
        for second in [AT, AT + 50, AT + 99] {
            let answer = |asked: &Asked| {
                [
                    asked.chunk(0, DATA, &data(AT, &[1; 100])),
                    asked.chunk(DONE, DATA, &data(second, &[2; 100])),
                ]
                .concat()
            };
            read_lie(style, answer, &format!("a chunk at {second} over another")).await;
        }
    }
}

#[tokio::test]
async fn a_hole_over_data() {
    let answer = |asked: &Asked| {
        let bytes = asked.chunk(0, DATA, &data(AT + 500, &[1; 100]));
        [bytes, asked.chunk(DONE, HOLE, &hole(AT, 8192))].concat()
    };
    read_lie(Style::Extended, answer, "over another").await;
}

#[tokio::test]
async fn bytes_missing_at_the_start() {
    let answer = |asked: &Asked| asked.chunk(DONE, DATA, &data(AT + 1, &[1; 8191]));
    read_lie(
        Style::Structured,
        answer,
        "lacks the bytes from 4096 to 4097",
    )
    .await;
}

#[tokio::test]
async fn bytes_missing_in_the_middle() {
    let answer = |asked: &Asked| {
        let last = asked.chunk(0, DATA, &data(AT + 5000, &[1; 3192]));
        let first = asked.chunk(DONE, DATA, &data(AT, &[1; 4999]));
        [last, first].concat()
    };
    read_lie(Style::Extended, answer, "lacks the bytes from 9095 to 9096").await;
}

#[tokio::test]
async fn bytes_missing_at_the_end() {
    let answer = |asked: &Asked| {
        let first = asked.chunk(0, DATA, &data(AT, &[1; 8191]));
        [first, asked.chunk(DONE, NONE, b"")].concat()
    };
    read_lie(
        Style::Structured,
        answer,
        "lacks the bytes from 12287 to 12288",
    )
    .await;
}

#[tokio::test]
async fn no_bytes_at_all() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.chunk(DONE, NONE, b"");
        read_lie(style, answer, "lacks the bytes from 4096 to 12288").await;
    }
}

#[tokio::test]
async fn a_payload_of_absurd_length() {
    for style in CHUNKED {
        for length in [8 + 8193, 1 << 31, u64::from(u32::MAX)] {
            let answer = |asked: &Asked| asked.claiming(DONE, DATA, length, b"");
            read_lie(style, answer, &format!("a data chunk of {length} bytes")).await;
        }
    }
    let answer = |asked: &Asked| asked.claiming(DONE, DATA, u64::MAX, b"");
    read_lie(
        Style::Extended,
        answer,
        "a data chunk of 18446744073709551615 bytes",
    )
    .await;
}

#[tokio::test]
async fn a_payload_too_short_for_its_offset() {
    for length in [0, 7, 8] {
        let answer = |asked: &Asked| asked.claiming(DONE, DATA, length, b"");
        read_lie(
            Style::Structured,
            answer,
            &format!("a data chunk of {length} bytes"),
        )
        .await;
    }
}

#[tokio::test]
async fn a_hole_of_a_wrong_layout() {
    for length in [0, 11, 13, 1 << 31] {
        let answer = |asked: &Asked| asked.claiming(DONE, HOLE, length, b"");
        let says = format!("a chunk of kind 2 with {length} bytes");
        read_lie(Style::Structured, answer, &says).await;
    }
}

#[tokio::test]
async fn an_empty_chunk_that_is_not_empty() {
    let answer = |asked: &Asked| asked.claiming(DONE, NONE, 1, b"");
    read_lie(Style::Structured, answer, "an empty chunk with 1 bytes").await;
}

#[tokio::test]
async fn an_empty_chunk_that_ends_nothing() {
    let answer = |asked: &Asked| asked.chunk(0, NONE, b"");
    read_lie(Style::Extended, answer, "an empty chunk that ends nothing").await;
}

#[tokio::test]
async fn a_chunk_of_a_kind_that_nobody_knows() {
    let answer = |asked: &Asked| asked.chunk(DONE, 77, b"");
    read_lie(Style::Structured, answer, "a chunk of kind 77").await;
}

#[tokio::test]
async fn a_status_chunk_to_a_read() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.status(ID, &[(8192, 0)]);
        read_lie(style, answer, "to command READ").await;
    }
}

#[tokio::test]
async fn a_data_chunk_to_a_block_status() {
    for style in CHUNKED {
        status_lie(style, |asked| asked.all(1), "to command BLOCK_STATUS").await;
    }
}

#[tokio::test]
async fn a_data_chunk_to_a_flush() {
    let (client, mut peer) = connect(&Hello::new(Style::Extended), PATIENT).await;
    let ticket = client.submit_flush().await.unwrap();
    let asked = peer.request().await;
    peer.send(&asked.chunk(DONE, DATA, &data(0, &[1]))).await;
    let says = "to command FLUSH";
    assert_says(&ticket.await.unwrap_err(), Kind::NbdProtocol, says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_simple_reply_where_a_structured_one_is_due() {
    for style in CHUNKED {
        let says = "a simple reply where a structured one is due";
        read_lie(style, |asked| simple(asked.cookie, 0), says).await;
        read_lie(style, |asked| simple(asked.cookie, 5), says).await;
        status_lie(style, |asked| simple(asked.cookie, 0), says).await;
    }
}

#[tokio::test]
async fn a_simple_reply_to_a_flush_with_extended_headers() {
    let (client, mut peer) = connect(&Hello::new(Style::Extended), PATIENT).await;
    let ticket = client.submit_flush().await.unwrap();
    let asked = peer.request().await;
    peer.send(&simple(asked.cookie, 0)).await;
    let says = "a simple reply where";
    assert_says(&ticket.await.unwrap_err(), Kind::NbdProtocol, says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn chunks_that_were_not_negotiated() {
    let says = "of a kind that was not negotiated";
    for (negotiated, used) in [
        (Style::Simple, Style::Structured),
        (Style::Simple, Style::Extended),
        (Style::Structured, Style::Extended),
        (Style::Extended, Style::Structured),
    ] {
        let answer = |asked: &Asked| {
            Asked {
                style: used,
                ..asked.clone()
            }
            .all(1)
        };
        read_lie(negotiated, answer, says).await;
    }
}

#[tokio::test]
async fn an_extended_reply_for_another_offset() {
    let answer = |asked: &Asked| {
        Asked {
            offset: 0,
            ..asked.clone()
        }
        .chunk(DONE, NONE, b"")
    };
    read_lie(Style::Extended, answer, "to a request at 4096").await;
}

#[tokio::test]
async fn an_error_with_an_oversized_message() {
    for style in CHUNKED {
        // The chunk is longer than any error may be.
        let answer = |asked: &Asked| asked.claiming(DONE, ERROR, 6 + 4096 + 9, b"");
        read_lie(style, answer, "an error chunk of 4111 bytes").await;
        // The message is longer than its chunk.
        let answer = |asked: &Asked| asked.chunk(DONE, ERROR, b"\0\0\0\x05\x10\0short");
        read_lie(
            style,
            answer,
            "an error message of 4096 bytes in a chunk of 11",
        )
        .await;
    }
}

#[tokio::test]
async fn an_error_chunk_without_room_for_its_fields() {
    let answer = |asked: &Asked| asked.claiming(DONE, ERROR, 5, b"");
    read_lie(Style::Structured, answer, "an error chunk of 5 bytes").await;
}

#[tokio::test]
async fn an_error_chunk_without_an_error() {
    let answer = |asked: &Asked| asked.chunk(DONE, ERROR, &error(0, "fine", b""));
    read_lie(Style::Structured, answer, "without an error").await;
}

#[tokio::test]
async fn an_error_at_an_offset_outside_the_request() {
    let tail = (AT + 8192).to_be_bytes();
    let answer = |asked: &Asked| asked.chunk(DONE, ERROR_OFFSET, &error(5, "", &tail));
    read_lie(Style::Extended, answer, "an error at offset 12288").await;
}

#[tokio::test]
async fn an_error_at_an_offset_that_is_missing() {
    let answer = |asked: &Asked| asked.chunk(DONE, ERROR_OFFSET, &error(5, "", &[0; 4]));
    read_lie(Style::Extended, answer, "without its offset").await;
}

#[tokio::test]
async fn a_reply_of_chunks_without_end() {
    let answer = |asked: &Asked| {
        let one = asked.chunk(0, ERROR, &error(5, "", b""));
        one.repeat(64 * 1024 + 2)
    };
    // The server's bytes need not all fit before the client hangs up.
    let (client, mut peer) = connect(&Hello::new(Style::Structured), PATIENT).await;
    let ticket = client.submit_read(AT, buffer(LENGTH).await).await.unwrap();
    let bytes = answer(&peer.request().await);
    peer.send_what_is_taken(&bytes).await;
    let says = "a reply of more than 65537 chunks";
    assert_says(&ticket.await.unwrap_err(), Kind::NbdProtocol, says);
    assert_dead(&client, &mut peer, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn an_extent_of_no_length() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.status(ID, &[(4096, 0), (0, 1)]);
        status_lie(style, answer, "an extent of length 0").await;
    }
}

#[tokio::test]
async fn an_extent_behind_the_request() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.status(ID, &[(8192, 0), (1, 1)]);
        status_lie(style, answer, "behind the end of the request").await;
    }
}

#[tokio::test]
async fn status_of_another_context() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.status(ID + 1, &[(8192, 0)]);
        status_lie(style, answer, "context 8, which was not asked for").await;
    }
}

#[tokio::test]
async fn status_given_twice() {
    for style in CHUNKED {
        let answer = |asked: &Asked| {
            let mut first = asked.status(ID, &[(4096, 0)]);
            // Without DONE.
            first[5] = 0;
            [first, asked.status(ID, &[(4096, 0)])].concat()
        };
        status_lie(style, answer, "a second block status chunk").await;
    }
}

#[tokio::test]
async fn no_status_at_all() {
    for style in CHUNKED {
        let answer = |asked: &Asked| asked.chunk(DONE, NONE, b"");
        status_lie(style, answer, "has no block status").await;
    }
}

#[tokio::test]
async fn status_of_absurd_count() {
    let answer = |asked: &Asked| asked.claiming(DONE, STATUS, 4 + 8 * (1 << 27), b"");
    status_lie(
        Style::Structured,
        answer,
        "a block status chunk of 1073741828 bytes",
    )
    .await;
    let answer = |asked: &Asked| asked.claiming(DONE, STATUS_EXT, 8 + 16 * (1 << 40), b"");
    status_lie(
        Style::Extended,
        answer,
        "a block status chunk of 17592186044424 bytes",
    )
    .await;
}

#[tokio::test]
async fn status_with_half_an_extent() {
    for length in [0, 3, 4, 11, 13] {
        let answer = |asked: &Asked| asked.claiming(DONE, STATUS, length, b"");
        let says = format!("a block status chunk of {length} bytes");
        status_lie(Style::Structured, answer, &says).await;
    }
    for length in [0, 7, 8, 23, 25] {
        let answer = |asked: &Asked| asked.claiming(DONE, STATUS_EXT, length, b"");
        let says = format!("a block status chunk of {length} bytes");
        status_lie(Style::Extended, answer, &says).await;
    }
}

#[tokio::test]
async fn status_whose_count_is_another() {
    let answer = |asked: &Asked| asked.chunk(DONE, STATUS_EXT, &status_ext(ID, 2, &[(8192, 0)]));
    status_lie(Style::Extended, answer, "2 extents in 16 bytes").await;
}

#[tokio::test]
async fn status_chunks_of_the_other_width() {
    let answer = |asked: &Asked| asked.chunk(DONE, STATUS_EXT, &status_ext(ID, 1, &[(8192, 0)]));
    status_lie(Style::Structured, answer, "a chunk of kind 6").await;
    let answer = |asked: &Asked| asked.chunk(DONE, STATUS, &status(ID, &[(8192, 0)]));
    status_lie(Style::Extended, answer, "a chunk of kind 5").await;
}
