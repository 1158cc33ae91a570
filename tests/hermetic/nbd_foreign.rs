//! Against an NBD server of another make: the `nbd` crate's, which has neither GO
//! nor chunks, and takes one request at a time.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::io::Cursor;
use std::net::TcpListener;
use std::thread;

use qemu_fleece_engine::Kind;
use qemu_fleece_engine::buffer::Pool;
use qemu_fleece_engine::nbd::wire::{Replies, flag};
use qemu_fleece_engine::nbd::{Address, Client};

use crate::nbd_server::{LIMIT, PATIENT, assert_says};

/// Bytes of the export.
const SIZE: usize = 4 << 20;

fn image() -> Vec<u8> {
    (0..SIZE)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect()
}

/// Serves one client over TCP; ends with the bytes as they are then.
fn serve() -> (Address, thread::JoinHandle<std::io::Result<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        let mut bytes = image();
        nbd::server::handshake(&stream, |name| match name {
            "disk" => Ok(nbd::Export {
                size: SIZE as u64,
                ..nbd::Export::<()>::default()
            }),
            _ => Err(std::io::Error::other("no such export")),
        })?;
        nbd::server::transmission(&stream, Cursor::new(&mut bytes[..]))?;
        Ok(bytes)
    });
    (address, server)
}

#[tokio::test]
async fn reads_writes_and_flushes() {
    let (address, server) = serve();
    let work = async {
        let client = Client::connect(&address, "disk", None, PATIENT)
            .await
            .unwrap();
        let export = client.export();
        assert_eq!(
            (export.size, export.replies),
            (SIZE as u64, Replies::Simple)
        );
        assert!(export.has(flag::SEND_FLUSH) && !export.has(flag::READ_ONLY));

        let mut expected = image();
        let pool = Pool::new(16);
        let mut tickets = Vec::new();
        for offset in (0..SIZE).step_by(300_000) {
            let length = 300_000.min(SIZE - offset);
            let buffer = pool.take(length).await;
            tickets.push((
                offset,
                client.submit_read(offset as u64, buffer).await.unwrap(),
            ));
        }
        for (offset, ticket) in tickets {
            let bytes = ticket.await.unwrap();
            assert!(bytes[..] == expected[offset..offset + bytes.len()]);
        }

        let mut tickets = Vec::new();
        for (index, offset) in (1000..SIZE).step_by(500_000).enumerate() {
            let mut buffer = pool.take(100_001).await;
            buffer.fill(u8::try_from(index).unwrap());
            expected[offset..offset + buffer.len()].copy_from_slice(&buffer);
            tickets.push(client.submit_write(offset as u64, buffer).await.unwrap());
        }
        for ticket in tickets {
            ticket.await.unwrap();
        }
        client.submit_flush().await.unwrap().await.unwrap();
        client.close().await;
        expected
    };
    let expected = tokio::time::timeout(LIMIT, work).await.unwrap();
    assert!(server.join().unwrap().unwrap() == expected);
}

#[tokio::test]
async fn an_export_that_it_does_not_have() {
    let (address, server) = serve();
    let client = Client::connect(&address, "other", None, PATIENT).await;
    assert_says(&client.map(drop).unwrap_err(), Kind::NbdUnreachable, "");
    assert!(server.join().unwrap().is_err());
}
