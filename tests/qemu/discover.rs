//! Discovery of disks in real machines and storage daemons.
#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

use qemu_fleece_engine::qemu::discover::{self, Disk, Reason};
use serde_json::json;

use crate::machine::{Images, Machine, storage_daemon};
use crate::storage_daemon::StorageDaemon;
use crate::within;

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

async fn disks(arguments: &[String]) -> Vec<Disk> {
    let machine = Machine::start(arguments).await;
    let qmp = machine.connect().await;
    let mut disks = discover::disks(&qmp).await.unwrap();
    discover::find_iothreads(&qmp, &mut disks).await.unwrap();
    disks
}

fn find<'a>(disks: &'a [Disk], id: &str) -> &'a Disk {
    let found = disks.iter().find(|disk| disk.id == id);
    found.unwrap_or_else(|| panic!("no disk {id} in {disks:#?}"))
}

#[tokio::test]
async fn each_kind_of_device_has_a_stable_id() {
    within(async {
        let images = Images::new();
        let mut arguments = words(
            "-device virtio-scsi-pci,id=s0 -device qemu-xhci,id=x0 \
             -device virtio-blk-pci,drive=a,id=vda -device virtio-blk-pci,drive=b \
             -device scsi-hd,drive=c,id=sda,bus=s0.0 -device nvme,drive=d,id=nvme0,serial=1 \
             -device usb-storage,drive=e,id=usb,bus=x0.0",
        );
        for name in ["a", "b", "c", "d", "e"] {
            images.create(name, "qcow2", &[]);
            arguments.splice(0..0, images.blockdev(name, "qcow2", ""));
        }
        images.create("auto", "qcow2", &[]);
        let drive = format!("if=virtio,format=qcow2,file={}", images.path("auto"));
        arguments.extend(["-drive".into(), drive]);
        let disks = disks(&arguments).await;
        for (id, node) in [
            ("vda", "a"),
            ("b", "b"),
            ("sda", "c"),
            ("nvme0", "d"),
            ("usb", "e"),
        ] {
            let disk = find(&disks, id);
            assert_eq!((disk.node.as_str(), disk.excluded), (node, None));
            assert_eq!((disk.format.as_str(), disk.size), ("qcow2", 1 << 20));
            assert_eq!(disk.iothread, None);
        }
        let auto = find(&disks, "virtio0");
        assert!(auto.node.starts_with('#'), "{auto:?}");
        assert_eq!(auto.excluded, None);
        assert_eq!(disks.len(), 6);
    })
    .await;
}

#[tokio::test]
async fn what_is_left_out_is_listed_with_its_reason() {
    within(async {
        let images = Images::new();
        for name in ["a", "ro", "medium", "data", "slow"] {
            images.create(name, "raw", &[]);
        }
        let flash = std::fs::File::create(images.path("flash")).unwrap();
        flash.set_len(4 << 20).unwrap();
        let mut arguments = images.blockdev("ro", "raw", ",read-only=on");
        arguments.extend(images.blockdev("medium", "raw", ",read-only=on"));
        arguments.extend(images.blockdev("data", "raw", ""));
        arguments.extend(images.blockdev("slow", "raw", ""));
        arguments.extend(words(
            "-object throttle-group,id=g -blockdev driver=throttle,node-name=t,throttle-group=g,file=slow \
             -device virtio-scsi-pci,id=s0 -device virtio-blk-pci,drive=ro,id=fixed \
             -device scsi-cd,bus=s0.0,id=empty -device scsi-cd,bus=s0.0,id=full,drive=medium \
             -device virtio-blk-pci,drive=t,id=throttled \
             -device virtio-blk-pci,drive=data,id=pflash-data",
        ));
        let drive = format!("if=pflash,format=raw,unit=0,file={}", images.path("flash"));
        arguments.extend(["-drive".into(), drive]);
        let disks = disks(&arguments).await;
        for (id, reason) in [
            ("fixed", Some(Reason::ReadOnly)),
            ("empty", Some(Reason::Removable)),
            ("full", Some(Reason::Removable)),
            ("throttled", Some(Reason::FilterNode)),
            ("pflash0", Some(Reason::UnsupportedDriver)),
            // A user's disk, whatever it is called.
            ("pflash-data", None),
        ] {
            assert_eq!(find(&disks, id).excluded, reason, "{id}");
        }
    })
    .await;
}

#[tokio::test]
async fn only_newer_qcow2_stores_bitmaps() {
    within(async {
        let images = Images::new();
        images.create("new", "qcow2", &["compat=1.1"]);
        images.create("old", "qcow2", &["compat=0.10"]);
        images.create("raw", "raw", &[]);
        let mut arguments = Vec::new();
        for (name, format) in [("new", "qcow2"), ("old", "qcow2"), ("raw", "raw")] {
            arguments.extend(images.blockdev(name, format, ""));
            arguments.extend(words(&format!(
                "-device virtio-blk-pci,drive={name},id={name}"
            )));
        }
        let disks = disks(&arguments).await;
        let stores = |id| find(&disks, id).persistent_bitmaps;
        assert_eq!(
            (stores("new"), stores("old"), stores("raw")),
            (true, false, false)
        );
    })
    .await;
}

/// An iothread that is overlooked ends a VM of QEMU 7.2 at the first backup.
#[tokio::test]
async fn an_iothread_is_found_wherever_it_is_set() {
    within(async {
        let images = Images::new();
        let mut arguments = words("-object iothread,id=io0 -object iothread,id=io1");
        // Also one that is called like a disk.
        arguments.extend(words("-object iothread,id=sda"));
        for name in ["a", "b", "c", "d", "e"] {
            images.create(name, "qcow2", &[]);
            arguments.extend(images.blockdev(name, "qcow2", ""));
        }
        arguments.extend(words(
            "-device virtio-blk-pci,drive=a,id=vda,iothread=io0 -device virtio-blk-pci,drive=b,id=vdb \
             -device virtio-scsi-pci,id=s0,iothread=io1 -device scsi-hd,drive=c,id=sda,bus=s0.0 \
             -device scsi-hd,drive=d,bus=s0.0",
        ));
        let mapped = json!({
            "driver": "virtio-blk-pci", "drive": "e", "id": "vde", "num-queues": 2,
            "iothread-vq-mapping": [{"iothread": "io1"}, {"iothread": "io0"}],
        });
        arguments.extend(["-device".into(), mapped.to_string()]);
        let disks = disks(&arguments).await;
        for (id, iothread) in [
            ("vda", Some("io0")),
            ("vdb", None),
            ("sda", Some("io1")),
            ("d", Some("io1")),
            ("vde", Some("io0,io1")),
        ] {
            assert_eq!(find(&disks, id).iothread.as_deref(), iothread, "{id}");
        }
    })
    .await;
}

#[tokio::test]
async fn bitmaps_are_told_in_each_state() {
    within(async {
        let images = Images::new();
        images.create("a", "qcow2", &[]);
        let node = json!({
            "driver": "qcow2", "node-name": "a",
            "file": {"driver": "file", "filename": images.path("a")},
        });
        let persistent = json!({"node": "a", "name": "lost", "persistent": true});
        let mut daemon = StorageDaemon::start().await;
        daemon.run("blockdev-add", node.clone()).await;
        daemon.run("block-dirty-bitmap-add", persistent).await;
        // Closing stores it; dying with it open leaves it inconsistent.
        daemon.run("blockdev-del", json!({"node-name": "a"})).await;
        daemon.run("blockdev-add", node).await;
        daemon.kill().await;

        let mut arguments = images.blockdev("a", "qcow2", "");
        arguments.extend(words("-device virtio-blk-pci,drive=a,id=vda"));
        let machine = Machine::start(&arguments).await;
        let qmp = machine.connect().await;
        for bitmap in [
            json!({"node": "a", "name": "kept", "persistent": true, "granularity": 131_072}),
            json!({"node": "a", "name": "off", "disabled": true}),
        ] {
            qmp.execute_raw("block-dirty-bitmap-add", bitmap)
                .await
                .unwrap();
        }
        let disks = discover::disks(&qmp).await.unwrap();
        let disk = find(&disks, "vda");
        assert_eq!(disk.bitmaps().len(), 3);
        let bitmap = |name| {
            disk.bitmaps()
                .iter()
                .find(|bitmap| bitmap.name == name)
                .unwrap()
        };
        let (lost, kept, off) = (bitmap("lost"), bitmap("kept"), bitmap("off"));
        assert!(lost.inconsistent && lost.persistent && !lost.recording);
        assert!(kept.persistent && kept.recording && !kept.inconsistent && !kept.busy);
        assert_eq!((kept.granularity, kept.count), (131_072, 0));
        assert!(!off.persistent && !off.recording);
    })
    .await;
}

/// Neither id nor bitmaps may change with a session, or after one that was lost.
#[tokio::test]
async fn a_filter_of_ours_hides_nothing() {
    within(async {
        let images = Images::new();
        images.create("a", "qcow2", &[]);
        let mut arguments = images.blockdev("a", "qcow2", "");
        // Without an id of its own, the disk is known by its node.
        arguments.extend(words("-device virtio-blk-pci,drive=a"));
        let machine = Machine::start(&arguments).await;
        let qmp = machine.connect().await;
        let bitmap = json!({"node": "a", "name": "b"});
        qmp.execute_raw("block-dirty-bitmap-add", bitmap)
            .await
            .unwrap();
        let before = discover::disks(&qmp).await.unwrap();
        let target = json!({"driver": "null-co", "node-name": "qf-x-0-s", "size": 1 << 20});
        qmp.execute_raw("blockdev-add", target).await.unwrap();
        let backup = json!({
            "job-id": "qf-x-0", "device": "a", "target": "qf-x-0-s", "sync": "none",
            "filter-node-name": "qf-x-0-cbw", "auto-dismiss": false,
        });
        qmp.execute_raw("blockdev-backup", backup).await.unwrap();
        let during = discover::disks(&qmp).await.unwrap();
        let mut expected = before;
        expected[0].excluded = Some(Reason::InBackup);
        assert_eq!(during, expected);
    })
    .await;
}

#[tokio::test]
async fn a_machine_without_disks_has_none_even_with_nodes() {
    within(async {
        let images = Images::new();
        images.create("spare", "raw", &[]);
        assert_eq!(disks(&images.blockdev("spare", "raw", "")).await, []);
    })
    .await;
}

#[tokio::test]
async fn a_storage_daemon_has_the_images_that_its_user_named() {
    within(async {
        let images = Images::new();
        let mut arguments = Vec::new();
        for name in ["base", "top", "qf-x"] {
            images.create(name, "qcow2", &[]);
            let backing = if name == "top" { ",backing=base" } else { "" };
            arguments.extend(images.blockdev(name, "qcow2", backing));
        }
        let (_daemon, qmp) = storage_daemon(&arguments).await;
        assert!(!qmp.can_pass_fds());
        let disks = discover::disks(&qmp).await.unwrap();
        let mut found: Vec<_> = disks
            .iter()
            .map(|disk| (disk.id.as_str(), disk.excluded))
            .collect();
        found.sort_by_key(|(id, _)| *id);
        assert_eq!(found, [("base", Some(Reason::BackingNode)), ("top", None)]);
    })
    .await;
}
