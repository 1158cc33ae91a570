//! What a server may get wrong before transmission, one test each.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::future::Future;
use std::time::Duration;

use qemu_fleece_engine::Kind;

use crate::nbd_server::*;

/// The handshake fails, with the kind and the reason.
async fn refused<F>(style: Style, script: impl FnOnce(Peer) -> F, kind: Kind, says: &str)
where
    F: Future<Output = Peer>,
{
    let error = shake(style, PATIENT, script).await.map(drop).unwrap_err();
    assert_says(&error, kind, says);
}

/// The same, where it is GO that says something odd.
async fn refused_go(hello: Hello, says: &str) {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.go(&hello).await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_greeting_with_a_wrong_magic() {
    let script = |mut peer: Peer| async move {
        peer.send(b"NBDMAGICIHAVENOT\0\x03").await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, "wrong magic").await;
}

#[tokio::test]
async fn an_oldstyle_greeting() {
    let script = |mut peer: Peer| async move {
        peer.send(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0").await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, "no newstyle").await;
}

#[tokio::test]
async fn newstyle_that_is_not_fixed() {
    let script = |mut peer: Peer| async move {
        peer.send(b"NBDMAGICIHAVEOPT\0\x02").await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, "fixed newstyle").await;
}

#[tokio::test]
async fn a_greeting_that_ends_early() {
    let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut theirs, b"NBDMAGIC")
        .await
        .unwrap();
    drop(theirs);
    let client = qemu_fleece_engine::nbd::Client::over(ours, "disk", None, PATIENT);
    assert_eq!(client.await.map(drop).unwrap_err().kind(), Kind::NbdClosed);
}

#[tokio::test]
async fn no_greeting_at_all() {
    let script = |peer: Peer| async move { peer };
    let error = shake(Style::Simple, Duration::from_millis(50), script).await;
    assert_says(
        &error.map(drop).unwrap_err(),
        Kind::NbdTimeout,
        "no end of the handshake within 50ms",
    );
}

#[tokio::test]
async fn an_option_reply_with_a_wrong_magic() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.option().await;
        peer.send(&[0; 20]).await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, "wrong magic").await;
}

#[tokio::test]
async fn an_option_reply_of_absurd_length() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.option().await;
        peer.option_reply_claiming(EXTENDED_HEADERS, ERR_UNSUP, u32::MAX)
            .await;
        peer
    };
    let says = "4294967295 bytes long";
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_reply_to_another_option() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.option().await;
        peer.option_reply(GO, ACK, b"").await;
        peer
    };
    let says = "a reply to option 7 where 11 was sent";
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn an_information_in_answer_to_a_yes_or_no() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.option().await;
        peer.option_reply(EXTENDED_HEADERS, INFO, b"\0\0").await;
        peer
    };
    let says = "a reply of type 3 to option 11";
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

/// Up to the answer to SET_META_CONTEXT, which `contexts` are.
async fn refused_context(contexts: &[(u32, &str)], end: u32, kind: Kind, says: &str) {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        assert_eq!(peer.option().await.0, SET_META_CONTEXT);
        for (id, name) in contexts {
            let context = [&id.to_be_bytes(), name.as_bytes()].concat();
            peer.option_reply(SET_META_CONTEXT, META_CONTEXT, &context)
                .await;
        }
        peer.option_reply(SET_META_CONTEXT, end, b"").await;
        peer
    };
    refused(Style::Structured, script, kind, says).await;
}

#[tokio::test]
async fn a_context_that_is_missing() {
    refused_context(&[], ACK, Kind::NbdUnreachable, "it has no base:allocation").await;
}

#[tokio::test]
async fn a_context_that_is_refused() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.option().await;
        peer.option_reply(SET_META_CONTEXT, ERR_UNKNOWN, b"what?")
            .await;
        peer
    };
    let error = shake(Style::Structured, PATIENT, script).await;
    let error = error.map(drop).unwrap_err();
    assert_says(&error, Kind::NbdUnreachable, "what?");
    assert!(error.to_string().contains(CONTEXT), "{error}");
}

#[tokio::test]
async fn a_context_with_simple_replies() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree_to(Style::Simple).await;
        peer
    };
    let says = "it has no base:allocation";
    refused(Style::Structured, script, Kind::NbdUnreachable, says).await;
}

#[tokio::test]
async fn a_context_that_was_not_asked_for() {
    let says = "\"qemu:dirty-bitmap:b\", which was not asked for";
    refused_context(&[(1, "qemu:dirty-bitmap:b")], ACK, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_context_given_twice() {
    let twice = [(1, CONTEXT), (2, CONTEXT)];
    refused_context(&twice, ACK, Kind::NbdProtocol, "not asked for").await;
}

#[tokio::test]
async fn an_export_that_is_not_there() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.option().await;
        peer.option_reply(GO, ERR_UNKNOWN, b"never heard of it")
            .await;
        peer
    };
    let says = "never heard of it";
    refused(Style::Simple, script, Kind::NbdUnreachable, says).await;
}

#[tokio::test]
async fn go_without_a_size() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.option().await;
        peer.option_reply(GO, ACK, b"").await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdProtocol, "no size").await;
}

#[tokio::test]
async fn information_of_a_wrong_length() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.option().await;
        peer.option_reply(GO, INFO, b"\0\0\0\0\0\0").await;
        peer
    };
    let says = "information 0 with 6 bytes";
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn informations_without_end() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        peer.option().await;
        for _ in 0..256 {
            peer.option_reply(GO, INFO, &info_export(1 << 20, 1)).await;
        }
        peer
    };
    let says = "no end of replies to GO";
    refused(Style::Simple, script, Kind::NbdProtocol, says).await;
}

#[tokio::test]
async fn a_size_that_no_offset_reaches() {
    let mut hello = Hello::new(Style::Simple);
    hello.size = 1 << 63;
    refused_go(hello, "size is 9223372036854775808").await;
}

#[tokio::test]
async fn transmission_flags_without_has_flags() {
    let mut hello = Hello::new(Style::Simple);
    hello.flags = 0;
    refused_go(hello, "HAS_FLAGS").await;
}

#[tokio::test]
async fn block_sizes_that_cannot_be() {
    let wrong = [
        (0, 4096, 1 << 20),
        (3, 4096, 1 << 20),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 3000, 1 << 20),
        (4096, 512, 1 << 20),
        (512, 4096, 0),
        (512, 4096, 1000),
        (512, 4096, 512 * 9 + 1),
    ];
    for blocks in wrong {
        let mut hello = Hello::new(Style::Simple);
        hello.blocks = Some(blocks);
        let (min, preferred, max) = blocks;
        refused_go(hello, &format!("{min}, {preferred}, {max}")).await;
    }
}

#[tokio::test]
async fn block_sizes_that_can_be() {
    // A maximum below what is preferred is right for an export that is smaller still.
    for (size, blocks, max) in [
        (1 << 20, Some((1, 512, u32::MAX)), 32 << 20),
        (1 << 20, Some((512, 4096, 1 << 20)), 1 << 20),
        (1024, Some((512, 4096, 1024)), 1024),
        (1 << 20, None, 32 << 20),
    ] {
        let mut hello = Hello::new(Style::Extended);
        (hello.size, hello.blocks) = (size, blocks);
        let (client, _peer) = connect(&hello, PATIENT).await;
        assert_eq!(client.export().max_payload, max);
        assert_eq!(client.export().min_block, blocks.map_or(1, |it| it.0));
    }
}

#[tokio::test]
async fn a_server_without_go_hangs_up_over_the_name() {
    let script = |mut peer: Peer| async move {
        peer.greet(3).await;
        peer.agree().await;
        assert_eq!(peer.option().await.0, GO);
        peer.option_reply(GO, ERR_UNSUP, b"").await;
        assert_eq!(peer.option().await, (EXPORT_NAME, b"disk".to_vec()));
        peer.shut().await;
        peer
    };
    refused(Style::Simple, script, Kind::NbdUnreachable, "").await;
}

#[tokio::test]
async fn a_server_without_go_and_with_zeros_behind_the_name() {
    let script = |mut peer: Peer| async move {
        peer.greet(1).await;
        peer.agree().await;
        peer.option().await;
        peer.option_reply(GO, ERR_UNSUP, b"").await;
        peer.option().await;
        peer.send(&info_export(4096, 1)[2..]).await;
        peer.send(&[0; 124]).await;
        peer
    };
    let client = shake(Style::Simple, PATIENT, script).await.unwrap();
    assert_eq!(client.export().size, 4096);
}

#[tokio::test]
async fn nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let address = qemu_fleece_engine::nbd::Address::Unix(dir.path().join("none"));
    let client = qemu_fleece_engine::nbd::Client::connect(&address, "disk", None, PATIENT);
    let error = client.await.map(drop).unwrap_err();
    assert_says(&error, Kind::NbdUnreachable, "No such file");
}
