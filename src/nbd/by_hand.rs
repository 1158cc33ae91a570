//! What tests say on the wire, byte by byte.

use crate::nbd::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};

/// Flags of a server or client that knows all there is.
pub(super) const FLAGS: u16 = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;

fn length(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap().to_be_bytes()
}

pub(super) fn greeting(flags: u16) -> Vec<u8> {
    let numbers = [NBDMAGIC.to_be_bytes(), IHAVEOPT.to_be_bytes()];
    [&numbers.concat()[..], &flags.to_be_bytes()].concat()
}

pub(super) fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = IHAVEOPT.to_be_bytes();
    [&magic[..], &kind.to_be_bytes(), &length(data), data].concat()
}

pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = OPTION_REPLY_MAGIC.to_be_bytes();
    let numbers = [option.to_be_bytes(), kind.to_be_bytes(), length(data)];
    [&magic[..], &numbers.concat(), data].concat()
}

/// A string behind its length.
pub(super) fn string(text: &str) -> Vec<u8> {
    [&length(text.as_bytes())[..], text.as_bytes()].concat()
}

pub(super) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

pub(super) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let numbers = [SIMPLE_REPLY_MAGIC.to_be_bytes(), error.to_be_bytes()];
    [&numbers.concat()[..], &cookie.to_be_bytes()].concat()
}

pub(super) fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(length(data));
    bytes.extend(data);
    bytes
}
