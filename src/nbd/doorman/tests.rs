//! A client's options, byte by byte, and what of them the server hears.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::error::{Error, Kind};
use crate::nbd::by_hand::{FLAGS, greeting, option, option_reply as reply, string};
use crate::nbd::options::MAX_OPTIONS;
use crate::nbd::wire::{FLAG_FIXED_NEWSTYLE, MAX_OPTION_REPLY, u64_at};

const NAME: &str = "disk0";

type Heard = Vec<(u32, Vec<u8>)>;

/// Lets everybody in.
struct Open;

impl Porter for Open {
    async fn let_in<T: Send>(&self, step: impl Future<Output = Result<T>> + Send) -> Result<T> {
        step.await
    }
}

/// A server that has everything that it is asked for. `heard`: what that was.
async fn serve(mut stream: DuplexStream, heard: Arc<Mutex<Heard>>) -> std::io::Result<()> {
    stream.write_all(&greeting(FLAGS)).await?;
    stream.read_u32().await?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header).await?;
        let (kind, length) = (u32_at(&header, 8), u32_at(&header, 12));
        let mut data = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut data).await?;
        heard.lock().unwrap().push((kind, data));
        if kind == option::EXPORT_NAME {
            stream.write_all(&[0, 0, 0, 0, 0, 0, 16, 0, 0, 3]).await?;
        } else {
            let info = reply(kind, option_reply::INFO, b"info");
            stream.write_all(&info).await?;
            stream
                .write_all(&reply(kind, option_reply::ACK, &[]))
                .await?;
        }
    }
}

/// What becomes of a client.
#[derive(Debug)]
struct Came {
    /// Whether it is in.
    admitted: Result<bool>,
    /// What it heard.
    client: Vec<u8>,
    /// What the server heard.
    server: Heard,
}

/// A client with these flags that says all this and hangs up.
async fn come_with(flags: u16, says: &[u8]) -> Came {
    // Byte by byte: nothing may depend on what comes together.
    let (mut client, ours) = tokio::io::duplex(1);
    let (mut to_server, server) = tokio::io::duplex(64);
    let heard = Arc::new(Mutex::new(Heard::new()));
    let serving = tokio::spawn(serve(server, Arc::clone(&heard)));
    let says = [&u32::from(flags).to_be_bytes()[..], says].concat();
    let mut said = Vec::new();
    let admitted = {
        let talk = async {
            let (mut reader, mut writer) = tokio::io::split(&mut client);
            let say = async {
                let _ended = writer.write_all(&says).await;
                let _ended = writer.shutdown().await;
            };
            tokio::join!(say, reader.read_to_end(&mut said)).1.unwrap();
        };
        let admitted = async {
            let admitted = admit(ours, &mut to_server, NAME, &Open).await;
            admitted.map(|client| client.is_some())
        };
        tokio::join!(admitted, talk).0
    };
    drop(to_server);
    let _ended = serving.await.unwrap();
    let server = std::mem::take(&mut *heard.lock().unwrap());
    assert_eq!(said[..18], greeting(FLAGS));
    Came {
        admitted,
        client: said.split_off(18),
        server,
    }
}

async fn come(says: &[u8]) -> Came {
    come_with(FLAGS, says).await
}

/// The type of the one reply that an option gets; the server does not hear of it.
async fn refused(kind: u32, data: &[u8]) -> u32 {
    let came = come(&option(kind, data)).await;
    assert_eq!(came.server, [], "option {kind}");
    assert_eq!(came.admitted.unwrap_err().kind(), Kind::NbdClosed);
    let (header, text) = came.client.split_at(20);
    assert_eq!(u32_at(header, 8), kind);
    assert_eq!(u32_at(header, 16) as usize, text.len());
    u32_at(header, 12)
}

#[tokio::test]
async fn this_export_and_the_default_one_which_is_this() {
    let rest = [&[0, 1, 0, 3][..], b"and more"].concat();
    let ours = [string(NAME), rest.clone()].concat();
    for kind in [
        option::GO,
        option::INFO,
        option::SET_META_CONTEXT,
        option::LIST_META_CONTEXT,
    ] {
        for name in [NAME, ""] {
            let came = come(&option(kind, &[string(name), rest.clone()].concat())).await;
            assert_eq!(came.server, [(kind, ours.clone())]);
            let told = [
                reply(kind, option_reply::INFO, b"info"),
                reply(kind, option_reply::ACK, &[]),
            ];
            assert_eq!(came.client, told.concat());
            match came.admitted {
                Ok(is_in) => assert!(is_in && kind == option::GO),
                Err(error) => assert!(error.kind() == Kind::NbdClosed && kind != option::GO),
            }
        }
    }
}

#[tokio::test]
async fn the_old_way_in() {
    let entered = [0, 0, 0, 0, 0, 0, 16, 0, 0, 3];
    for name in [NAME, ""] {
        for (flags, zeroes) in [(FLAGS, 0), (FLAG_FIXED_NEWSTYLE, 124), (0, 124)] {
            let came = come_with(flags, &option(option::EXPORT_NAME, name.as_bytes())).await;
            assert!(came.admitted.unwrap());
            assert_eq!(came.server, [(option::EXPORT_NAME, NAME.into())]);
            assert_eq!(came.client, [&entered[..], &vec![0; zeroes]].concat());
        }
    }
}

#[tokio::test]
async fn other_exports() {
    for name in ["disk1", "disk", "disk00", "qf-abcdefghij-0-acc", "\0"] {
        for kind in [
            option::GO,
            option::INFO,
            option::SET_META_CONTEXT,
            option::LIST_META_CONTEXT,
        ] {
            let data = [string(name), vec![0; 4]].concat();
            assert_eq!(refused(kind, &data).await, option_reply::ERR_UNKNOWN);
        }
        let came = come(&option(option::EXPORT_NAME, name.as_bytes())).await;
        assert!(!came.admitted.unwrap());
        assert_eq!((came.server, came.client), (vec![], vec![]));
    }
}

#[tokio::test]
async fn names_that_are_none() {
    for data in [
        &[][..],
        &[0, 0, 0],
        &[0, 0, 0, 6],
        b"\0\0\0\x06disk0",
        &[0xff; 64],
    ] {
        for kind in [option::GO, option::INFO, option::SET_META_CONTEXT] {
            assert_eq!(refused(kind, data).await, option_reply::ERR_INVALID);
        }
    }
}

#[tokio::test]
async fn the_list_has_this_export_only() {
    let came = come(&option(option::LIST, &[])).await;
    let told = [
        reply(option::LIST, option_reply::SERVER, &string(NAME)),
        reply(option::LIST, option_reply::ACK, &[]),
    ];
    assert_eq!((came.client, came.server), (told.concat(), vec![]));
    assert_eq!(
        refused(option::LIST, b"data").await,
        option_reply::ERR_INVALID
    );
}

#[tokio::test]
async fn options_of_which_the_server_does_not_hear() {
    for (kind, error) in [
        (option::START_TLS, option_reply::ERR_POLICY),
        (option::EXTENDED_HEADERS, option_reply::ERR_UNSUP),
        (0, option_reply::ERR_UNSUP),
        (4, option_reply::ERR_UNSUP),
        (99, option_reply::ERR_UNSUP),
        (u32::MAX, option_reply::ERR_UNSUP),
    ] {
        for data in [&[][..], &string(NAME)] {
            assert_eq!(refused(kind, data).await, error);
        }
    }
}

#[tokio::test]
async fn structured_replies_are_between_client_and_server() {
    let came = come(&option(option::STRUCTURED_REPLY, b"")).await;
    assert_eq!(came.server, [(option::STRUCTURED_REPLY, vec![])]);
}

#[tokio::test]
async fn a_client_that_changes_its_mind() {
    let says = [
        option(option::GO, &[string("other"), vec![0; 2]].concat()),
        option(option::ABORT, &[]),
        option(option::GO, &[string(NAME), vec![0; 2]].concat()),
    ];
    let came = come(&says.concat()).await;
    assert!(!came.admitted.unwrap());
    let goodbye = reply(option::ABORT, option_reply::ACK, &[]);
    assert!(came.client.ends_with(&goodbye));
    assert_eq!(came.server, []);
}

#[tokio::test]
async fn clients_that_break_the_protocol() {
    let mut long = option(99, &[]);
    long[12..].copy_from_slice(&(MAX_OPTION_REPLY + 1).to_be_bytes());
    for (flags, says, why) in [
        (FLAGS, vec![0; 16], "wrong magic"),
        (FLAGS, long, "bytes long"),
        (FLAGS, option(99, &[]).repeat(MAX_OPTIONS + 1), "more than"),
        (0, option(option::LIST, &[]), "fixed newstyle"),
    ] {
        let came = come_with(flags, &says).await;
        let error: Error = came.admitted.unwrap_err();
        assert_eq!(error.kind(), Kind::NbdProtocol);
        assert!(error.chain().contains(why), "{}", error.chain());
    }
}

#[tokio::test]
async fn an_end_anywhere() {
    let go = [string(NAME), vec![0; 2]].concat();
    let says = [
        option(option::STRUCTURED_REPLY, &[]),
        option(option::GO, &go),
    ]
    .concat();
    for length in 0..says.len() {
        let came = come(&says[..length]).await;
        assert_eq!(came.admitted.unwrap_err().kind(), Kind::NbdClosed);
    }
    assert!(come(&says).await.admitted.unwrap());
}

#[tokio::test]
async fn servers_that_break_the_protocol() {
    let go = [string(NAME), vec![0; 2]].concat();
    let says = [
        &u32::from(FLAGS).to_be_bytes()[..],
        &option(option::GO, &go),
    ]
    .concat();
    let mut long = reply(option::GO, option_reply::INFO, &[]);
    long[16..].copy_from_slice(&(MAX_OPTION_REPLY + 1).to_be_bytes());
    let endless = reply(option::GO, option_reply::INFO, &[]).repeat(MAX_OPTION_REPLIES);
    let other = reply(option::INFO, option_reply::ACK, &[]);
    for (answer, kind) in [
        (vec![], Kind::NbdClosed),
        (vec![0; 20], Kind::NbdProtocol),
        (other, Kind::NbdProtocol),
        (long, Kind::NbdProtocol),
        (endless, Kind::NbdProtocol),
    ] {
        let (mut server, mut ours) = tokio::io::duplex(64 * 1024);
        let (mut client, theirs) = tokio::io::duplex(64 * 1024);
        client.write_all(&says).await.unwrap();
        server.write_all(&greeting(FLAGS)).await.unwrap();
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
        let admitted = admit(theirs, &mut ours, NAME, &Open).await;
        assert_eq!(admitted.map(drop).unwrap_err().kind(), kind);
    }
}

/// Options as a client that wants in elsewhere may try them.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        Just(string(NAME)),
        Just(string("")),
        Just(string("qf-abcdefghij-0-acc")),
        proptest::collection::vec(any::<u8>(), 0..12),
    ];
    let rest = proptest::collection::vec(any::<u8>(), 0..12);
    let kind = prop_oneof![1u32..13, any::<u32>()];
    (kind, name, rest).prop_map(|(kind, name, rest)| {
        let name = if kind == option::EXPORT_NAME {
            &name[name.len().min(4)..]
        } else {
            &name
        };
        option(kind, &[name, &rest].concat())
    })
}

proptest! {
    /// Whatever a client says: what the server hears is of this export.
    #[test]
    fn the_server_hears_of_no_other_export(
        options in proptest::collection::vec(any_option(), 0..8),
        junk in proptest::collection::vec(any::<u8>(), 0..40),
        flags in 0u16..4,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let says = [options.concat(), junk].concat();
        let came = runtime.block_on(come_with(flags, &says));
        for (kind, data) in came.server {
            match kind {
                option::EXPORT_NAME => prop_assert_eq!(data, NAME.as_bytes()),
                option::STRUCTURED_REPLY => {}
                option::GO | option::INFO | option::SET_META_CONTEXT | option::LIST_META_CONTEXT => {
                    prop_assert!(data.starts_with(&string(NAME)), "{:?}", data);
                }
                _ => prop_assert!(false, "option {kind}"),
            }
        }
        // Each answer is to an option, and has the magic of one.
        if let Err(error) = came.admitted {
            prop_assert!(matches!(error.kind(), Kind::NbdProtocol | Kind::NbdClosed));
            let mut rest = &came.client[..];
            while !rest.is_empty() {
                prop_assert_eq!(u64_at(rest, 0), crate::nbd::wire::OPTION_REPLY_MAGIC);
                rest = &rest[20 + u32_at(rest, 16) as usize..];
            }
        }
    }
}
