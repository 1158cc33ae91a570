//! The guest agent's client against a scripted agent, one test a fault that a real one cannot make.

use std::error::Error as _;
use std::time::Duration;

use qemu_fleece_engine::qemu::{Address, GuestAgent, Refusal};
use qemu_fleece_engine::{Kind, Result};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Long enough for any answer that comes at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// For answers that never come.
const SHORT: Duration = Duration::from_millis(50);

const THAWED: &[u8] = b"{\"return\": \"thawed\"}\n";

/// The agent's end of a connection.
struct Peer {
    stream: BufReader<UnixStream>,
    _dir: tempfile::TempDir,
}

impl Peer {
    async fn send(&mut self, bytes: &[u8]) {
        let sent = self.stream.get_mut().write_all(bytes);
        tokio::time::timeout(PATIENCE, sent).await.unwrap().unwrap();
    }

    /// The next command's name and id, and whether a sentinel stood before it.
    async fn command(&mut self) -> (String, Option<u64>, bool) {
        let mut line = Vec::new();
        let read = self.stream.read_until(b'\n', &mut line);
        tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
        let marked = line.first() == Some(&0xff);
        let command: Value = serde_json::from_slice(&line[usize::from(marked)..]).unwrap();
        let name = command["execute"].as_str().unwrap().to_owned();
        (name, command["arguments"]["id"].as_u64(), marked)
    }

    /// The sync that comes before a command: its id.
    async fn sync(&mut self) -> u64 {
        let (name, id, marked) = self.command().await;
        assert!(marked && name == "guest-sync-delimited", "{name}");
        id.unwrap()
    }
}

/// The agent's answer to a sync.
fn synced(id: u64) -> Vec<u8> {
    let mut line = vec![0xff];
    line.extend(format!("{{\"return\": {id}}}\n").bytes());
    line
}

async fn pair() -> (GuestAgent, Peer) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = GuestAgent::connect(&Address::Unix(path), PATIENCE).await;
    let stream = BufReader::new(listener.accept().await.unwrap().0);
    (agent.unwrap(), Peer { stream, _dir: dir })
}

/// A client in step, and its peer.
async fn ready() -> (GuestAgent, Peer) {
    let (mut agent, mut peer) = pair().await;
    let script = async {
        let id = peer.sync().await;
        peer.send(&synced(id)).await;
        peer.send(THAWED).await;
        peer.command().await;
    };
    let (frozen, ()) = tokio::join!(agent.is_frozen(PATIENCE), script);
    assert!(!frozen.unwrap());
    (agent, peer)
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> Kind {
    result.unwrap_err().kind()
}

#[tokio::test]
async fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let address = Address::Unix(path.clone());
    for _ in 0..2 {
        let connected = GuestAgent::connect(&address, PATIENCE).await;
        assert_eq!(kind(connected), Kind::AgentUnreachable);
        // Then a socket that nobody listens at.
        drop(UnixListener::bind(&path));
    }
}

#[tokio::test]
async fn silence_is_waited_for_only_so_long() {
    let (mut agent, mut peer) = pair().await;
    assert_eq!(kind(agent.is_frozen(SHORT).await), Kind::AgentUnreachable);
    // A sync that is answered by half.
    peer.send(b"\xff{\"retu").await;
    assert_eq!(kind(agent.is_frozen(SHORT).await), Kind::AgentUnreachable);
    assert!(!agent.is_broken());
}

#[tokio::test]
async fn what_was_meant_for_others_is_passed_over() {
    let (mut agent, mut peer) = pair().await;
    let script = async {
        let id = peer.sync().await;
        peer.send(b"{\"return\": \"frozen\"}\n{\"error\": {\"class\": \"a\", \"desc\": \"b\"}}\n")
            .await;
        peer.send(&[b"garbage\0without end ".as_slice(), &synced(id ^ 1)].concat())
            .await;
        peer.send(b"{\"return\": 7}\n\xffno JSON\n\xff\xff{\"return\": null}\n")
            .await;
        // The last one was cut off by half.
        peer.send(&[b"\xff{\"ret".as_slice(), &synced(id), THAWED].concat())
            .await;
    };
    let (frozen, ()) = tokio::join!(agent.is_frozen(PATIENCE), script);
    assert!(!frozen.unwrap());
}

#[tokio::test]
async fn a_late_answer_is_not_the_next_ones() {
    let (mut agent, mut peer) = ready().await;
    assert_eq!(kind(agent.freeze(SHORT).await), Kind::AgentUnreachable);
    let script = async {
        assert_eq!(peer.command().await.0, "guest-fsfreeze-freeze");
        let id = peer.sync().await;
        // It is there before the sync is answered: whenever the agent freezes, it thaws.
        assert_eq!(peer.command().await.0, "guest-fsfreeze-thaw");
        peer.send(b"{\"return\": 5}\n").await;
        peer.send(&synced(id)).await;
        peer.send(b"{\"return\": 3}\n").await;
    };
    let (thawed, ()) = tokio::join!(agent.thaw(PATIENCE), script);
    assert_eq!(thawed.unwrap(), 3);
    // In step again: no sync any more.
    let script = async {
        assert_eq!(
            peer.command().await,
            ("guest-fsfreeze-freeze".into(), None, false)
        );
        peer.send(b"{\"return\": 2}\n").await;
    };
    let (frozen, ()) = tokio::join!(agent.freeze(PATIENCE), script);
    assert_eq!(frozen.unwrap(), 2);
}

#[tokio::test]
async fn a_refusal_carries_the_agents_words() {
    let (mut agent, mut peer) = ready().await;
    peer.send(b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\n")
        .await;
    let error = agent.freeze(PATIENCE).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AgentRefused);
    let refusal = error.source().unwrap().downcast_ref::<Refusal>().unwrap();
    assert_eq!(
        (refusal.class.as_str(), refusal.desc.as_str()),
        ("CommandNotFound", "no")
    );
}

#[tokio::test]
async fn what_no_agent_says() {
    for odd in [
        "no JSON\n",
        "[]\n",
        "{}\n",
        "{\"return\": -1}\n",
        "{\"return\": \"2\"}\n",
        "{\"return\": 2.5}\n",
        "\u{fffd}\n",
    ] {
        let (mut agent, mut peer) = ready().await;
        peer.send(odd.as_bytes()).await;
        assert_eq!(
            kind(agent.freeze(PATIENCE).await),
            Kind::AgentUnreachable,
            "{odd:?}"
        );
    }
    let (mut agent, mut peer) = ready().await;
    peer.send(b"{\"return\": \"melting\"}\n").await;
    assert_eq!(
        kind(agent.is_frozen(PATIENCE).await),
        Kind::AgentUnreachable
    );
}

#[tokio::test]
async fn an_endless_line_is_cut_off() {
    let (mut agent, mut peer) = ready().await;
    let script = async {
        let chunk = [b' '; 4096];
        // It hangs up, which the peer may see or not.
        for _ in 0..32 {
            if peer.stream.get_mut().write_all(&chunk).await.is_err() {
                break;
            }
        }
    };
    let (frozen, ()) = tokio::join!(agent.freeze(PATIENCE), script);
    let error = frozen.unwrap_err();
    assert_eq!(error.kind(), Kind::AgentUnreachable);
    assert!(error.chain().contains("longer than"), "{}", error.chain());
    assert!(agent.is_broken());
}

#[tokio::test]
async fn the_end_of_the_connection_is_told_at_once_and_stays() {
    let (mut agent, mut peer) = ready().await;
    peer.send(b"{\"return\"").await;
    drop(peer);
    for _ in 0..2 {
        assert_eq!(kind(agent.freeze(PATIENCE).await), Kind::AgentUnreachable);
        assert!(agent.is_broken());
    }
}

#[tokio::test]
async fn commands_that_are_disabled_are_known() {
    let enabled = |name: &str, is: bool| format!("{{\"name\": \"{name}\", \"enabled\": {is}}}");
    for (freeze, thaw, lacks) in [
        (true, true, None),
        (true, false, Some("guest-fsfreeze-thaw")),
        (false, true, Some("guest-fsfreeze-freeze")),
    ] {
        let (mut agent, mut peer) = ready().await;
        let commands = [
            enabled("guest-exec", false),
            enabled("guest-fsfreeze-freeze", freeze),
            enabled("guest-fsfreeze-thaw", thaw),
        ];
        let info = format!(
            "{{\"return\": {{\"supported_commands\": [{}]}}}}\n",
            commands.join(",")
        );
        peer.send(info.as_bytes()).await;
        assert_eq!(agent.lacks(PATIENCE).await.unwrap(), lacks);
    }
    // One that does not tell may have them all.
    let (mut agent, mut peer) = ready().await;
    peer.send(b"{\"return\": {\"version\": \"0.1\"}}\n").await;
    assert_eq!(agent.lacks(PATIENCE).await.unwrap(), None);
}
