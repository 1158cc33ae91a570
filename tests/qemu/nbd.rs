//! The NBD client against the server that it is made for.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step is a failed test

use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use qemu_fleece_engine::buffer::{Buffer, Pool};
use qemu_fleece_engine::extent::Content;
use qemu_fleece_engine::nbd::wire::{Replies, flag};
use qemu_fleece_engine::nbd::{Client, status};
use qemu_fleece_engine::{Error, Kind, Result};
use serde_json::json;

use crate::storage_daemon::StorageDaemon;

/// Longest that a test may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The deadline of connections.
const PATIENT: Duration = Duration::from_secs(30);

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, test).await.expect("in time")
}

async fn connect(daemon: &StorageDaemon, export: &str, context: Option<&str>) -> Result<Client> {
    Client::connect(&daemon.address(), export, context, PATIENT).await
}

fn refused(client: Result<Client>) -> Error {
    client.map(drop).expect_err("it is refused")
}

/// Bytes that tell where they belong.
fn pattern(length: u64) -> Vec<u8> {
    (0..length / 8)
        .flat_map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

async fn filled(length: u64, byte: u8) -> Buffer {
    let mut buffer = Pool::new(1).take(usize::try_from(length).unwrap()).await;
    buffer.fill(byte);
    buffer
}

/// The whole export, by reads of an odd size, eight at a time.
async fn read_all(client: &Client) -> Vec<u8> {
    let size = client.export().size;
    let pool = Pool::new(8);
    let mut bytes = Vec::new();
    let mut tickets = VecDeque::new();
    let mut at = 0;
    while at < size || !tickets.is_empty() {
        if at < size && tickets.len() < 8 {
            let length = (700 * KIB + 512).min(size - at);
            let mut buffer = pool.take(usize::try_from(length).unwrap()).await;
            buffer.fill(0xee);
            tickets.push_back(client.submit_read(at, buffer).await.unwrap());
            at += length;
        } else if let Some(ticket) = tickets.pop_front() {
            bytes.extend_from_slice(&ticket.await.unwrap());
        }
    }
    bytes
}

/// The status of the whole export, asked for in one and then what is left. Also
/// the extents in the longest answer.
async fn status_of(client: &Client) -> (Vec<(u64, u64)>, usize) {
    let size = client.export().size;
    let (mut found, mut at, mut longest) = (Vec::<(u64, u64)>::new(), 0, 0);
    while at < size {
        let ticket = client.submit_block_status(at, size - at).await.unwrap();
        let extents = ticket.await.unwrap();
        longest = longest.max(extents.len());
        at += extents.iter().map(|(length, _)| length).sum::<u64>();
        for (length, flags) in extents {
            match found.last_mut() {
                Some((known, same)) if *same == flags => *known += length,
                _ => found.push((length, flags)),
            }
        }
    }
    assert_eq!(at, size);
    (found, longest)
}

#[tokio::test]
async fn every_byte_arrives_also_behind_the_last_block() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        // Data, a hole, data, and an end that is no multiple of a sector.
        let (data, size) = (pattern(8 * MIB), 40 * MIB + 1000);
        let file = File::create_new(daemon.dir().join("disk")).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(&data, 0).unwrap();
        file.write_all_at(&data[..8 * 1024 * 1024 - 24], 32 * MIB + 1024)
            .unwrap();
        daemon.open("disk").await;
        daemon.export("disk", false, None).await;
        let client = connect(&daemon, "disk", Some("base:allocation"))
            .await
            .unwrap();
        // Whole sectors: what the file lacks reads as zeros.
        assert_eq!(client.export().size, size.next_multiple_of(512));
        let mut expected = std::fs::read(daemon.dir().join("disk")).unwrap();
        expected.resize(usize::try_from(client.export().size).unwrap(), 0);
        assert!(read_all(&client).await == expected);

        let (extents, _) = status_of(&client).await;
        let mut at = 0;
        for (length, flags) in extents {
            let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
            let zero = expected[range].iter().all(|byte| *byte == 0);
            if status::content(flags) != Content::Data {
                assert!(zero, "{length} bytes at {at} are not zeros");
            }
            at += length;
        }
        client.close().await;
    })
    .await;
}

#[tokio::test]
async fn qemu_speaks_extended_headers_and_says_what_it_can() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let size = 9 << 30;
        let file = File::create_new(daemon.dir().join("disk")).unwrap();
        file.set_len(size).unwrap();
        daemon.open("disk").await;
        daemon.export("disk", false, None).await;
        let client = connect(&daemon, "disk", Some("base:allocation"))
            .await
            .unwrap();
        let export = client.export().clone();
        assert_eq!(export.replies, Replies::Extended);
        assert_eq!((export.size, export.max_payload), (size, 32 << 20));
        assert!(export.min_block <= 512 && export.preferred_block == 4096);
        assert!(export.has(flag::READ_ONLY) && export.has(flag::CAN_MULTI_CONN));
        assert!(!export.has(flag::SEND_TRIM));
        // More than 32 bits in one request, and in one extent.
        let ticket = client.submit_block_status(0, size).await.unwrap();
        let extents = ticket.await.unwrap();
        assert_eq!(extents.len(), 1, "{extents:?}");
        assert_eq!(extents[0].0, size);
        assert_eq!(status::content(extents[0].1), Content::Zero { hole: true });
        client.close().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_written_zeroed_and_trimmed_is_on_disk() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let size = 16 * MIB;
        let mut expected = pattern(size);
        std::fs::write(daemon.dir().join("disk"), &expected).unwrap();
        daemon.open("disk").await;
        daemon.export("disk", true, None).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        let export = client.export();
        for can in [flag::SEND_TRIM, flag::SEND_WRITE_ZEROES, flag::SEND_FLUSH] {
            assert!(export.has(can));
        }
        let mut tickets = Vec::new();
        for (index, offset) in (0..10).zip((0..).step_by(1024 * 1024)) {
            let buffer = filled(300 * KIB, index).await;
            expected[offset..offset + buffer.len()].fill(index);
            tickets.push(client.submit_write(offset as u64, buffer).await.unwrap());
        }
        tickets.push(
            client
                .submit_write_zeroes(10 * MIB, MIB, true)
                .await
                .unwrap(),
        );
        tickets.push(
            client
                .submit_write_zeroes(12 * MIB + 512, MIB, false)
                .await
                .unwrap(),
        );
        tickets.push(client.submit_trim(14 * MIB, MIB).await.unwrap());
        for ticket in tickets {
            ticket.await.unwrap();
        }
        client.submit_flush().await.unwrap().await.unwrap();
        expected[10 << 20..11 << 20].fill(0);
        expected[(12 << 20) + 512..(13 << 20) + 512].fill(0);
        // A file's discarded blocks read as zeros.
        expected[14 << 20..15 << 20].fill(0);
        assert!(read_all(&client).await == expected);
        assert!(std::fs::read(daemon.dir().join("disk")).unwrap() == expected);
        client.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_dirty_bitmap_tells_what_was_written() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let file = File::create_new(daemon.dir().join("disk")).unwrap();
        file.set_len(64 * MIB).unwrap();
        daemon.open("disk").await;
        let bitmap = json!({"node": "disk", "name": "b", "granularity": 64 * KIB});
        daemon.run("block-dirty-bitmap-add", bitmap).await;
        daemon.export("disk", true, None).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        let write = client
            .submit_write(MIB, filled(512, 1).await)
            .await
            .unwrap();
        let zero = client.submit_write_zeroes(8 * MIB, MIB, false).await;
        // The last granule, by its last sector.
        let last = client
            .submit_write(64 * MIB - 512, filled(512, 1).await)
            .await;
        write.await.unwrap();
        zero.unwrap().await.unwrap();
        last.unwrap().await.unwrap();
        client.close().await;
        daemon.unexport("disk").await;
        let bitmap = json!({"node": "disk", "name": "b"});
        daemon.run("block-dirty-bitmap-disable", bitmap).await;
        daemon.export("disk", false, Some("b")).await;

        let changes = connect(&daemon, "disk", Some("qemu:dirty-bitmap:b"))
            .await
            .unwrap();
        let (extents, _) = status_of(&changes).await;
        let dirty: Vec<(u64, bool)> = extents
            .iter()
            .map(|(length, flags)| (*length, status::is_dirty(*flags)))
            .collect();
        let granule = 64 * KIB;
        assert_eq!(
            dirty,
            [
                (MIB, false),
                (granule, true),
                (7 * MIB - granule, false),
                (MIB, true),
                (55 * MIB - granule, false),
                (granule, true),
            ]
        );
        changes.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_status_longer_than_one_answer_is_read_to_its_end() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        // Each second sector dirty: more than the 131,072 extents of one answer.
        let writes = 70_000u64;
        let size = writes * KIB;
        let node = json!({"driver": "null-co", "node-name": "disk", "size": size});
        daemon.run("blockdev-add", node).await;
        let bitmap = json!({"node": "disk", "name": "b", "granularity": 512});
        daemon.run("block-dirty-bitmap-add", bitmap).await;
        daemon.export("disk", true, Some("b")).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        let pool = Pool::new(16);
        let mut tickets = VecDeque::new();
        for index in 0..writes {
            let buffer = pool.take(512).await;
            tickets.push_back(client.submit_write(index * KIB, buffer).await.unwrap());
            if tickets.len() == 16 {
                tickets.pop_front().unwrap().await.unwrap();
            }
        }
        for ticket in tickets {
            ticket.await.unwrap();
        }
        let changes = connect(&daemon, "disk", Some("qemu:dirty-bitmap:b"))
            .await
            .unwrap();
        let (extents, longest) = status_of(&changes).await;
        assert_eq!(longest, 131_072);
        assert_eq!(extents.len() as u64, 2 * writes);
        for (index, (length, flags)) in extents.into_iter().enumerate() {
            assert_eq!((length, status::is_dirty(flags)), (512, index % 2 == 0));
        }
    })
    .await;
}

#[tokio::test]
async fn exports_and_contexts_that_qemu_does_not_have() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let node = json!({"driver": "null-co", "node-name": "disk", "size": MIB});
        daemon.run("blockdev-add", node).await;
        daemon.export("disk", false, None).await;
        let error = refused(connect(&daemon, "other", None).await);
        assert_eq!(error.kind(), Kind::NbdUnreachable);
        assert!(error.chain().contains("other"), "{}", error.chain());
        let context = "qemu:dirty-bitmap:none";
        let error = refused(connect(&daemon, "disk", Some(context)).await);
        assert_eq!(error.kind(), Kind::NbdUnreachable);
        assert!(error.chain().contains(context), "{}", error.chain());
        let error = refused(connect(&daemon, "other", Some("base:allocation")).await);
        assert_eq!(error.kind(), Kind::NbdUnreachable);
    })
    .await;
}

/// A disk of 1 MiB whose fifth block cannot be read, or written.
async fn bad_disk(daemon: &mut StorageDaemon, operation: &str) -> Client {
    // Not known to be zeros: QEMU would answer for those without reading.
    let node = json!({"driver": "null-co", "size": MIB});
    let bad = json!({"driver": "blkdebug", "node-name": "disk", "image": node,
        "inject-error": [{"event": "none", "iotype": operation, "errno": 5, "sector": 8}]});
    daemon.run("blockdev-add", bad).await;
    daemon.export("disk", true, None).await;
    connect(daemon, "disk", None).await.unwrap()
}

#[tokio::test]
async fn a_failed_write_leaves_the_connection_alive() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let client = bad_disk(&mut daemon, "write").await;
        let ticket = client.submit_write(0, filled(16 * KIB, 1).await).await;
        let error = ticket.unwrap().await.unwrap_err();
        assert_eq!(error.kind(), Kind::NbdRefused);
        assert!(error.chain().contains("EIO"), "{}", error.chain());
        let ticket = client
            .submit_write(64 * KIB, filled(16 * KIB, 1).await)
            .await;
        ticket.unwrap().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_failed_read_is_an_error_and_qemu_hangs_up_over_it() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let client = bad_disk(&mut daemon, "read").await;
        let ticket = client.submit_read(0, filled(16 * KIB, 1).await).await;
        // QEMU 10.0.2 sends no error chunk for a READ without the flag DF.
        let error = ticket.unwrap().await.map(drop).unwrap_err();
        assert_eq!(error.kind(), Kind::NbdClosed);
        let later = client
            .submit_read(64 * KIB, filled(16 * KIB, 1).await)
            .await;
        assert_eq!(later.map(drop).unwrap_err().kind(), Kind::NbdClosed);
    })
    .await;
}

#[tokio::test]
async fn a_write_to_a_read_only_export_is_refused() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let node = json!({"driver": "null-co", "node-name": "disk", "size": MIB});
        daemon.run("blockdev-add", node).await;
        daemon.export("disk", false, None).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        let ticket = client.submit_write(0, filled(MIB, 1).await).await.unwrap();
        let error = ticket.await.unwrap_err();
        assert_eq!(error.kind(), Kind::NbdRefused);
        assert!(
            error.chain().contains("Export is read-only"),
            "{}",
            error.chain()
        );
        let ticket = client.submit_read(0, filled(MIB, 1).await).await.unwrap();
        ticket.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_server_dies_with_requests_under_way() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        // Reads that take longer than the daemon lives.
        let node = json!({"driver": "null-co", "node-name": "disk", "size": MIB,
            "latency-ns": 30_000_000_000_u64});
        daemon.run("blockdev-add", node).await;
        daemon.export("disk", false, None).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        let mut tickets = Vec::new();
        for _ in 0..16 {
            tickets.push(client.submit_read(0, filled(512, 1).await).await.unwrap());
        }
        daemon.kill().await;
        for ticket in tickets {
            assert_eq!(ticket.await.unwrap_err().kind(), Kind::NbdClosed);
        }
        let later = client.submit_read(0, filled(512, 1).await).await;
        assert_eq!(later.unwrap_err().kind(), Kind::NbdClosed);
    })
    .await;
}

#[tokio::test]
async fn qemu_lets_go_of_a_client_that_left_with_replies_under_way() {
    within(async {
        let mut daemon = StorageDaemon::start().await;
        let node = json!({"driver": "null-co", "node-name": "disk", "size": 64 * MIB});
        daemon.run("blockdev-add", node).await;
        daemon.export("disk", false, None).await;
        let client = connect(&daemon, "disk", None).await.unwrap();
        for _ in 0..16 {
            // Nobody waits for them.
            let _ticket = client.submit_read(0, filled(MIB, 1).await).await.unwrap();
        }
        drop(client);
        // It hangs on replies that nobody takes.
        daemon.unexport("disk").await;
    })
    .await;
}
