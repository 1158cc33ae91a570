//! The guardian, run by the engine, against a scripted agent: faults that a real one cannot make.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use qemu_fleece_engine::Kind;
use qemu_fleece_engine::guardian::Program;
use qemu_fleece_engine::qemu::{Address, Qmp};
use qemu_fleece_engine::quiesce::{Consistency, How, Policy, Quiet, quiesce};
use serde_json::{Value, json};

use crate::support::{Monitor, PATIENCE};

/// For agents that do not answer in time.
const SHORT: Duration = Duration::from_secs(2);

/// What the agent does about a command.
enum Answer {
    Say(&'static str),
    Nothing,
    HangUp,
    /// No more clients either.
    Vanish,
}

use Answer::{HangUp, Nothing, Say, Vanish};

const TWO: Answer = Say("{\"return\": 2}");

/// What each agent says before it is asked to freeze.
fn as_usual(command: &str) -> Answer {
    match command {
        "guest-fsfreeze-status" => Say("{\"return\": \"thawed\"}"),
        "guest-info" => Say("{\"return\": {}}"),
        _ => TWO,
    }
}

/// An agent at a socket; `heard` gets its commands, but for syncs.
struct Agent {
    folder: tempfile::TempDir,
    heard: mpsc::Receiver<String>,
}

impl Agent {
    fn start(answer: impl FnMut(&str) -> Answer + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("agent")).unwrap();
        let (told, heard) = mpsc::channel();
        let mut answer = answer;
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if !serve(stream.unwrap(), &told, &mut answer) {
                    return;
                }
            }
        });
        Self { folder, heard }
    }

    fn wanted(&self, policy: Policy, deadline: Duration) -> Consistency {
        Consistency::Agent {
            address: Address::Unix(self.folder.path().join("agent")),
            policy,
            deadline,
        }
    }

    /// Waits until it hears a command.
    fn hears(&self, command: &str) {
        while self.heard.recv_timeout(PATIENCE).unwrap() != command {}
    }
}

/// One client; whether there may be another.
fn serve(
    stream: UnixStream,
    told: &mpsc::Sender<String>,
    answer: &mut impl FnMut(&str) -> Answer,
) -> bool {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    while stream
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        let start = usize::from(line[0] == 0xff);
        let command: Value = serde_json::from_slice(&line[start..]).unwrap();
        line.clear();
        let name = command["execute"].as_str().unwrap();
        let said = if name == "guest-sync-delimited" {
            let id = &command["arguments"]["id"];
            [
                b"\xff".as_slice(),
                format!("{{\"return\": {id}}}\n").as_bytes(),
            ]
            .concat()
        } else {
            let _nobody_asks = told.send(name.to_owned());
            match answer(name) {
                Say(text) => format!("{text}\n").into_bytes(),
                Nothing => continue,
                HangUp => return true,
                Vanish => return false,
            }
        };
        if stream.get_mut().write_all(&said).is_err() {
            break;
        }
    }
    true
}

fn program() -> Program {
    Program {
        path: PathBuf::from(env!("CARGO_BIN_EXE_qemu-fleece")),
        name: "qemu-fleece".into(),
        arguments: vec!["guardian".into()],
    }
}

/// A monitor, which is not asked anything that matters here.
async fn monitor() -> (Qmp, Monitor) {
    let monitor = Monitor::start(|peer| {
        peer.greet();
        peer.serve(|_, _| Some(json!({"return": {}})));
    });
    let address = Address::Unix(PathBuf::from(&monitor.path));
    (Qmp::connect(&address, PATIENCE).await.unwrap(), monitor)
}

async fn hold(wanted: &Consistency) -> Result<Quiet, Kind> {
    let quiet = quiesce(&monitor().await.0, wanted, &program()).await;
    quiet.map_err(|error| error.kind())
}

#[tokio::test]
async fn all_is_well() {
    let agent = Agent::start(as_usual);
    let quiet = hold(&agent.wanted(Policy::Require, PATIENCE))
        .await
        .unwrap();
    let released = quiet.release().await.unwrap();
    assert_eq!((released.how, released.filesystems), (How::Agent, 2));
    assert!(released.why_not.is_none() && released.held > Duration::ZERO);
    let heard: Vec<String> = agent.heard.try_iter().collect();
    let commands = [
        "guest-fsfreeze-status",
        "guest-info",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
    ];
    assert_eq!(heard, commands);
}

#[tokio::test]
async fn a_freeze_without_an_answer_is_thawed() {
    let agent = Agent::start(|command| match command {
        "guest-fsfreeze-freeze" => Nothing,
        _ => as_usual(command),
    });
    let held = hold(&agent.wanted(Policy::Require, SHORT)).await;
    assert_eq!(held.unwrap_err(), Kind::AgentUnreachable);
    agent.hears("guest-fsfreeze-freeze");
    agent.hears("guest-fsfreeze-thaw");
}

#[tokio::test]
async fn a_freeze_that_fails_is_thawed() {
    let agent = Agent::start(|command| match command {
        "guest-fsfreeze-freeze" => {
            Say("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}")
        }
        _ => as_usual(command),
    });
    let held = hold(&agent.wanted(Policy::Require, PATIENCE)).await;
    assert_eq!(held.unwrap_err(), Kind::AgentRefused);
    agent.hears("guest-fsfreeze-freeze");
    agent.hears("guest-fsfreeze-thaw");
}

#[tokio::test]
async fn nobody_waits_for_a_freeze_and_a_thaw_for_ever() {
    let agent = Agent::start(|command| match command {
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => Nothing,
        _ => as_usual(command),
    });
    let held = hold(&agent.wanted(Policy::Require, SHORT)).await;
    assert_eq!(held.unwrap_err(), Kind::GuestHeld);
    // The guardian goes on by itself.
    for _ in 0..6 {
        agent.hears("guest-fsfreeze-thaw");
    }
}

/// VSS lets go after 10 s, and tells so when it is asked to.
#[tokio::test]
async fn an_agent_that_had_to_let_go_by_itself() {
    let agent = || {
        Agent::start(|command| match command {
            "guest-fsfreeze-thaw" => Say(
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"couldn't hold writes\"}}",
            ),
            _ => as_usual(command),
        })
    };
    let wanted = agent();
    let quiet = hold(&wanted.wanted(Policy::Require, PATIENCE))
        .await
        .unwrap();
    let lost = quiet.release().await.unwrap_err();
    assert_eq!(lost.kind(), Kind::ConsistencyLost, "{}", lost.chain());
    let tried = agent();
    let quiet = hold(&tried.wanted(Policy::Try, PATIENCE)).await.unwrap();
    let released = quiet.release().await.unwrap();
    assert_eq!(released.how, How::Crash);
    assert_eq!(released.why_not.unwrap().kind(), Kind::ConsistencyLost);
}

#[tokio::test]
async fn an_agent_that_hangs_up_is_called_again() {
    let mut calls = 0;
    let agent = Agent::start(move |command| match command {
        "guest-fsfreeze-thaw" => {
            calls += 1;
            if calls < 3 { HangUp } else { TWO }
        }
        _ => as_usual(command),
    });
    let quiet = hold(&agent.wanted(Policy::Require, PATIENCE))
        .await
        .unwrap();
    // It is thawed; whether it was not before is what nobody can tell.
    let lost = quiet.release().await.unwrap_err();
    assert_eq!(lost.kind(), Kind::ConsistencyLost, "{}", lost.chain());
}

#[tokio::test]
async fn a_guest_that_is_gone_is_not_waited_for() {
    let agent = Agent::start(|command| match command {
        "guest-fsfreeze-thaw" => Vanish,
        _ => as_usual(command),
    });
    let quiet = hold(&agent.wanted(Policy::Require, PATIENCE))
        .await
        .unwrap();
    let asked = Instant::now();
    let lost = quiet.release().await.unwrap_err();
    assert_eq!(lost.kind(), Kind::GuestHeld, "{}", lost.chain());
    assert!(asked.elapsed() < PATIENCE, "{:?}", asked.elapsed());
}

#[tokio::test]
async fn what_is_dropped_is_let_go() {
    let agent = Agent::start(as_usual);
    // Not by the deadline.
    let quiet = hold(&agent.wanted(Policy::Require, 10 * PATIENCE))
        .await
        .unwrap();
    agent.hears("guest-fsfreeze-freeze");
    drop(quiet);
    // The task that does it needs this thread.
    let thaw = tokio::task::spawn_blocking(move || agent.hears("guest-fsfreeze-thaw"));
    thaw.await.unwrap();
}

#[tokio::test]
async fn a_guardian_that_cannot_be_started() {
    let agent = Agent::start(as_usual);
    for path in ["/no/such/program", "/bin/true"] {
        let program = Program {
            path: PathBuf::from(path),
            ..program()
        };
        let (qmp, _monitor) = monitor().await;
        let wanted = agent.wanted(Policy::Require, PATIENCE);
        let error = quiesce(&qmp, &wanted, &program).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal, "{}", error.chain());
        let wanted = agent.wanted(Policy::Try, PATIENCE);
        let quiet = quiesce(&qmp, &wanted, &program).await.unwrap();
        assert_eq!(quiet.release().await.unwrap().how, How::Crash);
    }
    assert_eq!(agent.heard.try_iter().count(), 0);
}
