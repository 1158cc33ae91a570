//! What an NBD server says before it serves anything.

use qemu_fleece_engine::Result;
use qemu_fleece_engine::nbd::handshake::{Export, negotiate, negotiate_simple, start_tls};
use qemu_fleece_engine::nbd::serve::{Offered, Served};
use qemu_fleece_engine::nbd::wire::{DEFAULT_MAX_PAYLOAD, Replies, flag};

use super::input::{Cuts, Input};
use super::peer::{Peer, block_on};

/// Bytes between two of us.
const PIPE: usize = 4096;

/// However the bytes are cut, the same is agreed and the same is said; what is agreed is sane;
/// and it can be offered on, as a relay does to QEMU: who negotiates with us finds the same.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let (how, script) = (input.byte() % 4, input.rest());
    let (whole, said) = agree(how, script, Cuts::Whole);
    let (cut, cut_said) = agree(how, script, Cuts::Small);
    assert_eq!((cut, cut_said), (whole.clone(), said));
    if let Ok(Some(export)) = whole {
        is_sane(&export, how);
        is_offered_on(export);
    }
}

fn agree(how: u8, script: &[u8], cuts: Cuts) -> (Result<Option<Export>, String>, Vec<u8>) {
    let mut peer = Peer::new(script, cuts);
    let agreed = block_on(async {
        match how {
            0 => negotiate(&mut peer, "x", None).await.map(Some),
            1 => negotiate(&mut peer, "x", Some("base:allocation"))
                .await
                .map(Some),
            2 => negotiate_simple(&mut peer, "x").await.map(Some),
            _ => start_tls(&mut peer).await.map(|()| None),
        }
    });
    (agreed.map_err(|error| error.chain()), peer.written())
}

fn is_sane(export: &Export, how: u8) {
    assert!(i64::try_from(export.size).is_ok());
    assert!(export.has(flag::HAS_FLAGS));
    assert!(export.min_block.is_power_of_two() && export.min_block <= 64 * 1024);
    assert!(export.preferred_block.is_power_of_two());
    assert!(export.preferred_block >= export.min_block);
    assert!(export.max_payload <= DEFAULT_MAX_PAYLOAD);
    assert!(export.max_payload.is_multiple_of(export.min_block));
    assert_eq!(export.context.is_some(), how == 1);
    assert!(how != 2 || export.replies == Replies::Simple);
}

fn is_offered_on(export: Export) {
    let found = block_on(async {
        let (mut client, server) = tokio::io::duplex(PIPE);
        let served = Served::welcome(server, Offered::of(&export));
        let (served, found) = tokio::join!(served, negotiate_simple(&mut client, "x"));
        served.expect("it is welcome");
        found
    });
    let expected = Export {
        replies: Replies::Simple,
        context: None,
        ..export
    };
    assert_eq!(found.expect("it is sane"), expected);
}
