//! The QMP actor, its questions and jobs, against the real QEMU.

use std::error::Error as _;
use std::os::fd::AsFd;
use std::time::Duration;

use qemu_fleece_engine::Kind;
use qemu_fleece_engine::qemu::{Address, Qmp, Refusal, Schema, job, query};
use serde_json::json;

use crate::machine::{Images, Machine, PATIENCE, storage_daemon};
use crate::within;

/// For greetings that never come.
const SHORT: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_machine_tells_who_it_is() {
    within(async {
        let named = [
            "-name",
            "vm 1",
            "-uuid",
            "5a1c9a3e-0000-4000-8000-000000000001",
        ];
        let machine = Machine::start(&named.map(String::from)).await;
        let qmp = machine.connect().await;
        assert!(query::version(&qmp).await.unwrap().major >= 9);
        query::package(&qmp).await.unwrap();
        assert_eq!(query::name(&qmp).await.unwrap().as_deref(), Some("vm 1"));
        assert_eq!(query::uuid(&qmp).await.unwrap().as_deref(), Some(named[3]));
        let status = query::status(&qmp).await.unwrap();
        assert_eq!(status.as_deref(), Some("prelaunch"));
        assert!(query::jobs(&qmp).await.unwrap().is_empty());
        assert!(query::block_exports(&qmp).await.unwrap().is_empty());
        let refused = qmp
            .execute_raw("no-such-command", json!({}))
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), Kind::QemuRefused);
        let words = refused.source().unwrap().downcast_ref::<Refusal>().unwrap();
        assert_eq!(words.class, "CommandNotFound");
    })
    .await;
}

#[tokio::test]
async fn a_machine_without_a_name_has_none() {
    within(async {
        let machine = Machine::start(&[]).await;
        let qmp = machine.connect().await;
        assert_eq!(query::name(&qmp).await.unwrap(), None);
        assert_eq!(query::uuid(&qmp).await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn a_second_client_is_told_that_the_monitor_is_busy() {
    within(async {
        let machine = Machine::start(&[]).await;
        let first = machine.connect().await;
        let waiting = Qmp::connect(&machine.address(), SHORT).await.unwrap_err();
        assert_eq!(waiting.kind(), Kind::MonitorBusy);
        // Then QEMU's queue of waiting clients is full: also busy, not absent.
        let Address::Unix(path) = machine.address() else {
            unreachable!()
        };
        let mut queued = Vec::new();
        while let Ok(stream) = tokio::net::UnixStream::connect(&path).await {
            queued.push(stream);
            assert!(queued.len() < 1000, "the queue has no end");
        }
        let refused = Qmp::connect(&machine.address(), PATIENCE)
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), Kind::MonitorBusy, "{}", refused.chain());
        // The first client noticed nothing; when all leave, the next is served.
        query::version(&first).await.unwrap();
        drop((first, queued));
        while let Err(error) = Qmp::connect(&machine.address(), PATIENCE).await {
            assert_eq!(error.kind(), Kind::MonitorBusy, "{}", error.chain());
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_unlinked_file_becomes_a_disk() {
    within(async {
        let machine = Machine::start(&[]).await;
        let qmp = machine.connect().await;
        assert!(qmp.can_pass_fds());
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        // Many commands at once: the descriptor stays with its own.
        let versions = (0..20).map(|_| {
            let qmp = qmp.clone();
            tokio::spawn(async move { query::version(&qmp).await.unwrap() })
        });
        let versions: Vec<_> = versions.collect();
        let added = qmp
            .execute_with_fd(
                "add-fd",
                json!({"opaque": "x".repeat(100_000)}),
                file.as_fd(),
            )
            .await
            .unwrap();
        for version in versions {
            version.await.unwrap();
        }
        let name = format!("/dev/fdset/{}", added["fdset-id"]);
        let node = json!({"driver": "file", "node-name": "n", "filename": name});
        qmp.execute_raw("blockdev-add", node).await.unwrap();
        let nodes = query::named_block_nodes(&qmp).await.unwrap();
        assert_eq!(nodes[0].image.virtual_size, 1 << 20);
    })
    .await;
}

#[tokio::test]
async fn a_monitor_on_tcp_passes_no_descriptors() {
    within(async {
        let listen = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"];
        let machine = Machine::start(&listen.map(String::from)).await;
        let qmp = machine.connect().await;
        let devices = qmp.execute_raw("query-chardev", json!({})).await.unwrap();
        let port = devices
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|device| {
                device["filename"]
                    .as_str()?
                    .strip_prefix("disconnected:tcp:")
            })
            .filter_map(|name| name.split(',').next())
            .next()
            .unwrap();
        let address = Address::parse(&format!("tcp:{port}")).unwrap();
        let tcp = Qmp::connect(&address, PATIENCE).await.unwrap();
        query::version(&tcp).await.unwrap();
        assert!(!tcp.can_pass_fds());
        let file = tempfile::tempfile().unwrap();
        let passed = tcp.execute_with_fd("add-fd", json!({}), file.as_fd()).await;
        assert_eq!(passed.unwrap_err().kind(), Kind::QemuUnsupported);
    })
    .await;
}

#[tokio::test]
async fn the_end_of_qemu_ends_its_client() {
    within(async {
        let machine = Machine::start(&[]).await;
        let qmp = machine.connect().await;
        let mut events = qmp.events();
        drop(machine);
        while events.recv().await.is_ok() {}
        let late = query::version(&qmp).await.unwrap_err();
        assert_eq!(late.kind(), Kind::MonitorClosed);
    })
    .await;
}

/// A backup job `j` of a node `a`.
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
async fn backup(qmp: &Qmp, sync: &str) {
    let target = json!({"driver": "null-co", "node-name": "t", "size": 1 << 20});
    qmp.execute_raw("blockdev-add", target).await.unwrap();
    let backup = json!({
        "job-id": "j", "device": "a", "target": "t", "sync": sync,
        "auto-finalize": false, "auto-dismiss": false,
    });
    qmp.execute_raw("blockdev-backup", backup).await.unwrap();
}

#[tokio::test]
async fn jobs_come_to_their_end_when_told() {
    within(async {
        let images = Images::new();
        images.create("a", "qcow2", &[]);
        let machine = Machine::start(&images.blockdev("a", "qcow2", "")).await;
        let qmp = machine.connect().await;
        backup(&qmp, "full").await;
        while query::jobs(&qmp).await.unwrap()[0].status != "pending" {
            tokio::time::sleep(SHORT / 10).await;
        }
        job::finalize(&qmp, "j", PATIENCE).await.unwrap();
        assert!(query::jobs(&qmp).await.unwrap().is_empty());
        // To end what is not there is no error; to bring it to its end is.
        job::cancel(&qmp, "j", PATIENCE).await.unwrap();
        let gone = job::finalize(&qmp, "j", PATIENCE).await.unwrap_err();
        assert_eq!(gone.kind(), Kind::QemuRefused);
    })
    .await;
}

#[tokio::test]
async fn a_job_without_an_end_can_be_cancelled() {
    within(async {
        let images = Images::new();
        images.create("a", "qcow2", &[]);
        let machine = Machine::start(&images.blockdev("a", "qcow2", "")).await;
        let qmp = machine.connect().await;
        backup(&qmp, "none").await;
        job::cancel(&qmp, "j", PATIENCE).await.unwrap();
        assert!(query::jobs(&qmp).await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn the_schema_tells_what_there_is() {
    within(async {
        let machine = Machine::start(&[]).await;
        let schema = Schema::probe(&machine.connect().await).await.unwrap();
        assert!(schema.has_command("add-fd") && schema.has_command("query-status"));
        assert!(!schema.has_command("no-such-command"));
        // Types are no commands.
        assert!(!schema.has_command("str"));
        assert!(schema.has_argument("blockdev-backup", "filter-node-name"));
        assert!(!schema.has_argument("blockdev-backup", "no-such-argument"));
        assert!(!schema.has_argument("query-status", "anything"));
        for driver in ["copy-before-write", "snapshot-access", "qcow2"] {
            assert!(schema.has_variant("blockdev-add", driver), "{driver}");
        }
        assert!(!schema.has_variant("blockdev-add", "no-such-driver"));
        assert!(schema.has_variant("block-export-add", "nbd"));
        let cbw =
            |argument| schema.has_variant_argument("blockdev-add", "copy-before-write", argument);
        assert!(cbw("cbw-timeout") && !cbw("no-such-argument"));

        let (_daemon, qmp) = storage_daemon(&[]).await;
        let schema = Schema::probe(&qmp).await.unwrap();
        assert!(schema.has_command("blockdev-backup") && !schema.has_command("add-fd"));
    })
    .await;
}
