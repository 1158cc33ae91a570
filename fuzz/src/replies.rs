//! What an NBD server answers, whatever was asked.

use std::time::Duration;

use qemu_fleece_engine::Result;
use qemu_fleece_engine::buffer::{Buffer, Pool};
use qemu_fleece_engine::nbd::wire::{
    FLAG_FIXED_NEWSTYLE, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, flag, info, option, option_reply,
};
use qemu_fleece_engine::nbd::{Client, Ticket};

use super::input::{Cuts, Input};
use super::peer::{Peer, block_on};

/// The export's bytes.
const SIZE: u64 = 64 * 1024;

/// The id of its meta context.
const CONTEXT: u32 = 7;

/// Never reached: the server hangs up before.
const DEADLINE: Duration = Duration::from_secs(60);

/// What is asked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    command: u8,
    offset: u64,
    length: u64,
}

/// However the bytes are cut, each who asked gets the same answer, and gets one. Bytes that are
/// handed out came from the server, all of them: what stood in the buffer before is nowhere in
/// them. Extents are of what was asked for.
pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let replies = input.byte() % 3;
    let count = 1 + usize::from(input.byte() % 4);
    let asked: Vec<Asked> = (0..count).map(|_| draw(&mut input)).collect();
    let script = input.rest();
    let whole = block_on(ask(replies, &asked, script, Cuts::Whole, 0x00));
    let cut = block_on(ask(replies, &asked, script, Cuts::Small, 0xff));
    assert_eq!(cut, whole);
}

fn draw(input: &mut Input<'_>) -> Asked {
    let command = input.byte() % 6;
    let offset = input.short();
    Asked {
        command,
        offset,
        length: (1 + input.short() % 4096).min(SIZE - offset),
    }
}

async fn ask(
    replies: u8,
    asked: &[Asked],
    script: &[u8],
    cuts: Cuts,
    fill: u8,
) -> Vec<std::result::Result<String, String>> {
    let peer = Peer::new(&welcome(replies), Cuts::Whole).holding(script, cuts);
    let context = (replies > 0).then_some("base:allocation");
    let client = Client::over(peer.clone(), "x", context, DEADLINE).await;
    let client = client.expect("the handshake is right");
    let pool = Pool::new(asked.len());
    let mut waiting = Vec::new();
    for one in asked {
        let buffer = || {
            let length = usize::try_from(one.length).expect("it is small");
            let mut buffer = pool.try_take(length).expect("one is free");
            buffer.fill(fill);
            buffer
        };
        waiting.push(submit(&client, one, buffer).await);
    }
    peer.go_on();
    let mut answers = Vec::new();
    for (one, ticket) in asked.iter().zip(waiting) {
        answers.push(match ticket {
            Ok(ticket) => ticket.told(one).await.map_err(|error| error.chain()),
            Err(error) => Err(error.chain()),
        });
    }
    // It has hung up, or lied: whoever asks now is told.
    let late = match client.submit_flush().await {
        Ok(ticket) => ticket.await,
        Err(error) => Err(error),
    };
    answers.push(late.map(|()| String::new()).map_err(|error| error.chain()));
    assert!(answers.last().is_some_and(Result::is_err));
    answers
}

enum Waiting {
    Bytes(Ticket<Buffer>),
    Extents(Ticket<Vec<(u64, u64)>>),
    Done(Ticket<()>),
}

impl Waiting {
    async fn told(self, asked: &Asked) -> Result<String> {
        match self {
            Self::Bytes(ticket) => ticket.await.map(|bytes| {
                assert_eq!(bytes.len() as u64, asked.length);
                format!("{:?}", &*bytes)
            }),
            Self::Extents(ticket) => ticket.await.map(|extents| {
                let total: u64 = extents.iter().map(|(length, _)| length).sum();
                assert!(total > 0 && total <= asked.length);
                assert!(extents.iter().all(|(length, _)| *length > 0));
                assert!(extents.windows(2).all(|two| two[0].1 != two[1].1));
                format!("{extents:?}")
            }),
            Self::Done(ticket) => ticket.await.map(|()| String::new()),
        }
    }
}

async fn submit(client: &Client, asked: &Asked, buffer: impl Fn() -> Buffer) -> Result<Waiting> {
    let Asked { offset, length, .. } = *asked;
    Ok(match asked.command {
        0 => Waiting::Bytes(client.submit_read(offset, buffer()).await?),
        1 => Waiting::Done(client.submit_write(offset, buffer()).await?),
        2 => Waiting::Done(client.submit_trim(offset, length).await?),
        3 => Waiting::Done(client.submit_write_zeroes(offset, length, false).await?),
        4 => Waiting::Done(client.submit_flush().await?),
        _ => Waiting::Extents(client.submit_block_status(offset, length).await?),
    })
}

/// The handshake of a server of simple, structured or extended replies.
fn welcome(replies: u8) -> Vec<u8> {
    let mut bytes = NBDMAGIC.to_be_bytes().to_vec();
    bytes.extend(IHAVEOPT.to_be_bytes());
    bytes.extend(FLAG_FIXED_NEWSTYLE.to_be_bytes());
    let mut reply = |option: u32, kind: u32, data: &[u8]| {
        bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        for number in [
            option,
            kind,
            u32::try_from(data.len()).expect("it is small"),
        ] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(data);
    };
    if replies == 2 {
        reply(option::EXTENDED_HEADERS, option_reply::ACK, &[]);
    } else {
        reply(option::EXTENDED_HEADERS, option_reply::ERR_UNSUP, &[]);
        let known = if replies == 1 {
            option_reply::ACK
        } else {
            option_reply::ERR_UNSUP
        };
        reply(option::STRUCTURED_REPLY, known, &[]);
    }
    if replies > 0 {
        let context = [&CONTEXT.to_be_bytes()[..], b"base:allocation"].concat();
        reply(
            option::SET_META_CONTEXT,
            option_reply::META_CONTEXT,
            &context,
        );
        reply(option::SET_META_CONTEXT, option_reply::ACK, &[]);
    }
    let flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
    let export = [
        &info::EXPORT.to_be_bytes()[..],
        &SIZE.to_be_bytes(),
        &flags.to_be_bytes(),
    ];
    reply(option::GO, option_reply::INFO, &export.concat());
    reply(option::GO, option_reply::ACK, &[]);
    bytes
}
