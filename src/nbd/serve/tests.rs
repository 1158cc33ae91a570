//! A client's words, byte by byte, and what becomes of them.

use super::*;
use crate::error::{Error, Kind};
use crate::nbd::by_hand::{self, FLAGS as BITS, option, option_reply as reply, simple};
use crate::nbd::options::MAX_OPTIONS;
use crate::nbd::wire::{MAX_OPTION_REPLY, REQUEST_MAGIC};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const FLAGS: u32 = BITS as u32;

fn request(kind: u16, start: u64, length: u32) -> Vec<u8> {
    by_hand::request(kind, 7, start, length)
}

/// What a client says that is let in, and then what else.
fn let_in(then: &[u8]) -> Vec<u8> {
    let go = option(option::GO, &[0, 0, 0, 0, 0, 0]);
    [&FLAGS.to_be_bytes()[..], &go, then].concat()
}

/// Serves a client that says all this and hangs up: what it asked for, why it ended, and
/// what it heard.
async fn serve(offered: Offered, says: &[u8]) -> (Vec<Asked>, Error, Vec<u8>) {
    // Byte by byte: nothing may depend on what comes together.
    let (mut client, ours) = tokio::io::duplex(1);
    let mut asked = Vec::new();
    let served = async {
        let mut served = Served::welcome(ours, offered).await?;
        loop {
            let (cookie, next) = served.asked().await?;
            match &next {
                Asked::Write(range) => {
                    let length = usize::try_from(range.end - range.start).unwrap();
                    served.payload(&mut vec![0; length]).await?;
                    served.done(cookie).await?;
                }
                Asked::Zero(_) | Asked::Flush => served.done(cookie).await?,
                Asked::Other | Asked::Goodbye => {}
            }
            asked.push(next);
        }
    };
    let mut heard = Vec::new();
    let talk = async {
        let (mut reader, mut writer) = tokio::io::split(&mut client);
        let say = async {
            let _ended = writer.write_all(says).await;
            let _ended = writer.shutdown().await;
        };
        tokio::join!(say, reader.read_to_end(&mut heard)).1.unwrap();
    };
    let (error, ()): (Result<()>, ()) = tokio::join!(served, talk);
    let error = error.unwrap_err();
    (asked, error, heard)
}

async fn refused(says: &[u8], why: &str) {
    let (asked, error, _) = serve(Offered::to_write(SIZE), says).await;
    assert_eq!((asked, error.kind()), (vec![], Kind::NbdProtocol));
    assert!(error.chain().contains(why), "{}", error.chain());
}

/// What the server says to an option before it goes on.
async fn replies(offered: Offered, says: &[u8]) -> Vec<u8> {
    let says = [&FLAGS.to_be_bytes()[..], says].concat();
    serve(offered, &says).await.2.split_off(18)
}

#[tokio::test]
async fn all_that_a_push_asks_for() {
    let says = [
        request(command::WRITE, 5, 3),
        b"abc".to_vec(),
        request(command::WRITE_ZEROES, 0, u32::try_from(SIZE).unwrap()),
        request(command::FLUSH, 0, 0),
        request(command::DISC, 0, 0),
    ];
    let (asked, error, heard) = serve(Offered::to_write(SIZE), &let_in(&says.concat())).await;
    let expected = [
        Asked::Write(5..8),
        Asked::Zero(0..SIZE),
        Asked::Flush,
        Asked::Goodbye,
    ];
    assert_eq!((&asked[..], error.kind()), (&expected[..], Kind::NbdClosed));
    assert!(heard.ends_with(&simple(0, 7).repeat(3)));
}

#[tokio::test]
async fn what_is_offered_of_another_server() {
    let export = Export {
        size: 12345,
        flags: 0x2d,
        min_block: 512,
        preferred_block: 4096,
        max_payload: 65536,
        replies: crate::nbd::wire::Replies::Simple,
        context: None,
    };
    let says = [
        option(option::STRUCTURED_REPLY, &[]),
        option(option::GO, &[]),
    ]
    .concat();
    let heard = replies(Offered::of(&export), &says).await;
    let mut expected = reply(option::STRUCTURED_REPLY, option_reply::ERR_UNSUP, &[]);
    let size = [&[0, 0][..], &12345u64.to_be_bytes(), &[0, 0x2d]].concat();
    expected.extend(reply(option::GO, option_reply::INFO, &size));
    let blocks = [[0, 3, 0, 0], [2, 0, 0, 0], [16, 0, 0, 1], [0, 0, 0, 0]].concat();
    expected.extend(reply(option::GO, option_reply::INFO, &blocks[..14]));
    expected.extend(reply(option::GO, option_reply::ACK, &[]));
    assert_eq!(heard, expected);
}

#[tokio::test]
async fn options_that_it_does_not_know() {
    for kind in [
        3,
        option::START_TLS,
        option::SET_META_CONTEXT,
        option::EXTENDED_HEADERS,
        99,
    ] {
        let says = [option(kind, b"data"), option(option::STRUCTURED_REPLY, &[])].concat();
        let expected = [
            reply(kind, option_reply::ERR_UNSUP, &[]),
            reply(option::STRUCTURED_REPLY, option_reply::ACK, &[]),
        ];
        assert_eq!(
            replies(Offered::to_write(SIZE), &says).await,
            expected.concat()
        );
    }
}

#[tokio::test]
async fn a_structured_reply_with_data() {
    let says = option(option::STRUCTURED_REPLY, b"data");
    let expected = reply(option::STRUCTURED_REPLY, option_reply::ERR_UNSUP, &[]);
    assert_eq!(replies(Offered::to_write(SIZE), &says).await, expected);
}

#[tokio::test]
async fn a_client_that_is_not_fixed() {
    let says = [&2u32.to_be_bytes()[..], &option(option::GO, &[])].concat();
    refused(&says, "fixed newstyle").await;
}

#[tokio::test]
async fn options_that_it_does_not_take() {
    let after = |says: Vec<u8>| [&FLAGS.to_be_bytes()[..], &says].concat();
    refused(&after(option(option::ABORT, &[])), "gives up").await;
    refused(&after(option(option::EXPORT_NAME, b"a")), "old style").await;
    refused(&after(vec![0; 16]), "wrong magic").await;
    let mut long = option(99, &[]);
    long[12..].copy_from_slice(&(MAX_OPTION_REPLY + 1).to_be_bytes());
    refused(&after(long), "bytes long").await;
    refused(&after(option(99, &[]).repeat(MAX_OPTIONS)), "more than").await;
}

#[tokio::test]
async fn requests_that_it_does_not_take() {
    let last = SIZE - 1;
    for (says, why) in [
        (vec![0; 28], "wrong magic"),
        (request(command::READ, 0, 512), "reads"),
        (request(command::WRITE, 0, 0), "a write of 0..0"),
        (request(command::WRITE_ZEROES, 0, 0), "a write of 0..0"),
        (request(command::WRITE, last, 2), "a write of"),
        (request(command::WRITE_ZEROES, last, 2), "a write of"),
        (request(command::WRITE, u64::MAX, 2), "a write of"),
        (request(command::WRITE_ZEROES, 0, u32::MAX), "a write of"),
    ] {
        refused(&let_in(&says), why).await;
    }
    let (_, error, _) = serve(
        Offered::to_write(1 << 40),
        &let_in(&request(command::WRITE, 0, MAX_WRITE + 1)),
    )
    .await;
    assert!(error.chain().contains("a write of 1048577 bytes"));
}

#[tokio::test]
async fn requests_that_it_refuses() {
    for kind in [command::TRIM, 5, command::BLOCK_STATUS, 99] {
        let says = let_in(&request(kind, 0, 512));
        let (asked, _, heard) = serve(Offered::to_write(SIZE), &says).await;
        assert_eq!(asked, [Asked::Other]);
        assert!(heard.ends_with(&simple(22, 7)));
    }
}

#[tokio::test]
async fn an_end_anywhere() {
    let says = let_in(&[request(command::WRITE, 0, 4), b"abcd".to_vec()].concat());
    for length in 0..says.len() {
        let (asked, error, _) = serve(Offered::to_write(SIZE), &says[..length]).await;
        assert_eq!((asked, error.kind()), (vec![], Kind::NbdClosed), "{length}");
    }
}

async fn tls(says: Vec<u8>) -> (Result<()>, Vec<u8>) {
    let (mut client, ours) = tokio::io::duplex(4096);
    client.write_all(&FLAGS.to_be_bytes()).await.unwrap();
    client.write_all(&says).await.unwrap();
    let welcomed = welcome_tls(&mut { ours }).await;
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).await.unwrap();
    (welcomed, heard.split_off(18))
}

#[tokio::test]
async fn tls_and_nothing_before_it() {
    let (welcomed, heard) = tls(option(option::START_TLS, &[])).await;
    welcomed.unwrap();
    assert_eq!(heard, reply(option::START_TLS, option_reply::ACK, &[]));
    for other in [option(option::GO, &[]), option(option::START_TLS, b"data")] {
        let (welcomed, heard) = tls(other).await;
        assert_eq!(welcomed.unwrap_err().kind(), Kind::NbdProtocol);
        assert!(heard.is_empty());
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic: bool) {
        let says = if magic { let_in(&[&REQUEST_MAGIC.to_be_bytes(), &bytes[..]].concat()) } else { bytes };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (_, error, _) = runtime.block_on(serve(Offered::to_write(SIZE), &says));
        prop_assert!(matches!(error.kind(), Kind::NbdProtocol | Kind::NbdClosed));
    }
}
