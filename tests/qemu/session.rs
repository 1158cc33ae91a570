//! The end of a stream and of a backup: nothing is complete before the one, and nothing
//! begins after the other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use qemu_fleece_engine::Kind;
use qemu_fleece_engine::begin::{self, Member};
use qemu_fleece_engine::checkpoint::Name;
use qemu_fleece_engine::guardian::Program;
use qemu_fleece_engine::image::Format;
use qemu_fleece_engine::inspect;
use qemu_fleece_engine::plan::Wish;
use qemu_fleece_engine::pull::Pull;
use qemu_fleece_engine::push::{self, Options, Progress};
use qemu_fleece_engine::qemu::Qmp;
use qemu_fleece_engine::quiesce::Consistency;
use qemu_fleece_engine::receive::Receive;
use qemu_fleece_engine::room::{self, OnFull};
use qemu_fleece_engine::server::Server;
use qemu_fleece_engine::session::Session;
use qemu_fleece_engine::target::Target;
use qemu_fleece_engine::view::View;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::machine::{Images, Machine};
use crate::within;

fn options() -> Options {
    Options {
        compress: false,
        speed: None,
        workers: 1,
        discard_source: None,
        timeout: Duration::from_secs(10),
    }
}

/// A machine with one disk, and an open backup of it.
struct Rig {
    qmp: Qmp,
    session: Session,
    view: Arc<View>,
    dir: TempDir,
    _machine: Machine,
    _images: Images,
}

impl Rig {
    async fn start() -> Self {
        let images = Images::new();
        images.create("a", "qcow2", &[]);
        let mut arguments = images.blockdev("a", "qcow2", "");
        arguments.extend(["-device".into(), "virtio-blk-pci,drive=a,id=vda".into()]);
        let machine = Machine::start(&arguments).await;
        let dir = tempfile::tempdir().unwrap();
        let qmp = machine.connect().await;
        let session = begin(&qmp, dir.path()).await;
        Self {
            qmp,
            view: session.view("vda").unwrap(),
            session,
            dir,
            _machine: machine,
            _images: images,
        }
    }
}

/// A backup of its disk.
async fn begin(qmp: &Qmp, dir: &Path) -> Session {
    let wish = Wish {
        chain: Name::parse("default").unwrap(),
        disks: None,
        base: None,
        checkpoint: None,
        strict: false,
        keep_unchanged: false,
        keep_ms: 0,
    };
    let member = Member {
        qmp: qmp.clone(),
        server: Server::default(),
        wish,
        runtime_dir: dir.to_owned(),
        scratch: room::Wish {
            dir: dir.to_owned(),
            is_named: true,
            disk_max_bytes: None,
            max_bytes: None,
            min_free_bytes: None,
            on_full: OnFull::default(),
        },
        consistency: Consistency::Crash,
    };
    // Nothing is held, so nobody is started to let it go.
    let guardian = Program {
        path: "/nonexistent".into(),
        name: "nobody".into(),
        arguments: Vec::new(),
    };
    let begun = begin::begin(vec![member], &guardian, &CancellationToken::new()).await;
    begun.unwrap().sessions.pop().unwrap()
}

/// All of a pull, but that it is finished.
async fn read(view: Arc<View>) -> Pull {
    let mut pull = Pull::open(view, 0, false, CancellationToken::new())
        .await
        .unwrap();
    while pull.next().await.unwrap().is_some() {}
    pull
}

#[tokio::test]
async fn a_pull_is_complete_when_the_host_has_its_end() {
    within(async {
        let rig = Rig::start().await;
        let (session, view) = (rig.session, rig.view);
        drop(read(Arc::clone(&view)).await);
        let unfinished = session.check_commit(None).unwrap_err();
        assert_eq!(unfinished.kind(), Kind::Incomplete);
        let early = Pull::open(Arc::clone(&view), 0, false, CancellationToken::new());
        early.await.unwrap().finish();
        let unread = session.check_commit(None).unwrap_err();
        assert_eq!(unread.kind(), Kind::Incomplete);
        read(view).await.finish();
        session.check_commit(None).unwrap();
        assert_eq!(session.abort().await, Vec::<String>::new());
    })
    .await;
}

#[tokio::test]
async fn nothing_begins_after_the_end() {
    within(async {
        let rig = Rig::start().await;
        let (view, dir) = (&rig.view, rig.dir.path());
        assert_eq!(rig.session.abort().await, Vec::<String>::new());
        // Nobody has told these of the end.
        let never = CancellationToken::new();
        let target = Target::File {
            path: dir.join("new"),
            format: Format::Raw,
            backing: None,
        };
        let (told, _progress) = watch::channel(Progress::default());
        let pushed = push::push(view, target, &options(), dir, &told, &never).await;
        assert_eq!(pushed.unwrap_err().kind(), Kind::Cancelled);
        let receive = Receive::open(Arc::clone(view), options(), dir.into(), never);
        let mut receive = receive.await.unwrap();
        let received = receive.next().await;
        assert_eq!(received.unwrap_err().kind(), Kind::Cancelled);
        assert_eq!(receive.close().await, Vec::<String>::new());
        let exported = view.export(dir, None).await;
        assert_eq!(exported.unwrap_err().kind(), Kind::Cancelled);
        let left = inspect::inspect(&rig.qmp).await.unwrap().our_objects;
        assert_eq!(left, Vec::<String>::new());
        assert_eq!(dir.read_dir().unwrap().count(), 0);
    })
    .await;
}
