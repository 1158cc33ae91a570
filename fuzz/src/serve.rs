//! What a client of our own NBD server asks: QEMU, when it pushes to us.

use qemu_fleece_engine::nbd::serve::{Asked, MAX_WRITE, Offered, Served, welcome_tls};

use super::input::{Cuts, Input};
use super::peer::{Peer, block_on};

/// However the bytes are cut, the same is asked, and the same is answered; writes lie within the
/// export, and are no longer than is announced.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let size = input.short() << 8;
    let script = input.rest();
    assert_eq!(
        talk(size, script, Cuts::Small),
        talk(size, script, Cuts::Whole)
    );
    let tls = |cuts| {
        let peer = Peer::new(script, cuts);
        let mut stream = peer.clone();
        let agreed = block_on(welcome_tls(&mut stream));
        (
            agreed.map(drop).map_err(|error| error.chain()),
            peer.written(),
        )
    };
    assert_eq!(tls(Cuts::Small), tls(Cuts::Whole));
}

fn talk(size: u64, script: &[u8], cuts: Cuts) -> (Vec<String>, Vec<u8>) {
    let peer = Peer::new(script, cuts);
    let mut told = Vec::new();
    let end = block_on(async {
        let mut served = Served::welcome(peer.clone(), Offered::to_write(size)).await?;
        loop {
            let (cookie, asked) = served.asked().await?;
            told.push(format!("{cookie} {asked:?}"));
            match asked {
                Asked::Write(range) => {
                    assert!(range.end <= size && range.end - range.start <= u64::from(MAX_WRITE));
                    let length = usize::try_from(range.end - range.start).expect("it is small");
                    let mut bytes = vec![0; length];
                    served.payload(&mut bytes).await?;
                    told.push(format!("{bytes:?}"));
                    served.done(cookie).await?;
                }
                Asked::Zero(range) => {
                    assert!(range.start < range.end && range.end <= size);
                    served.done(cookie).await?;
                }
                Asked::Flush => served.done(cookie).await?,
                Asked::Other => {}
                Asked::Goodbye => return Ok(()),
            }
        }
    });
    let end: qemu_fleece_engine::Result<()> = end;
    told.push(format!("{:?}", end.map_err(|error| error.chain())));
    (told, peer.written())
}
