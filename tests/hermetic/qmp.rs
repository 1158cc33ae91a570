//! The QMP actor against a scripted monitor, one test a fault.

use std::time::Duration;

use qemu_fleece_engine::qemu::{Address, Qmp, Refusal, job, query};
use qemu_fleece_engine::{Kind, Result};
use serde_json::{Value, json};
use std::error::Error as _;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};

/// Long enough for any answer that comes at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// For answers that never come.
const SHORT: Duration = Duration::from_millis(50);

/// The monitor's end of a connection.
struct Peer {
    stream: BufReader<DuplexStream>,
}

impl Peer {
    async fn send(&mut self, text: &str) {
        let sent = self.stream.get_mut().write_all(text.as_bytes());
        tokio::time::timeout(PATIENCE, sent).await.unwrap().unwrap();
    }

    /// The next command; its id goes into the answer.
    async fn command(&mut self) -> (String, Value) {
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, self.stream.read_line(&mut line))
            .await
            .unwrap()
            .unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        (
            command["execute"].as_str().unwrap().to_owned(),
            command["id"].clone(),
        )
    }

    async fn answer(&mut self, id: &Value, value: Value) {
        self.send(&format!("{}\r\n", json!({"return": value, "id": id})))
            .await;
    }
}

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

fn pair() -> (DuplexStream, Peer) {
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    (
        ours,
        Peer {
            stream: BufReader::new(theirs),
        },
    )
}

/// A client that has shaken hands, and its peer.
async fn ready() -> (Qmp, Peer) {
    let (ours, mut peer) = pair();
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    peer.send(GREETING).await;
    let (name, id) = peer.command().await;
    assert_eq!(name, "qmp_capabilities");
    peer.answer(&id, json!({})).await;
    (client.await.unwrap().unwrap(), peer)
}

async fn greeted_with(text: &str) -> Result<Qmp> {
    let (ours, mut peer) = pair();
    peer.send(text).await;
    Qmp::over(ours, PATIENCE).await
}

fn ask(qmp: &Qmp) -> tokio::task::JoinHandle<Result<Value>> {
    let qmp = qmp.clone();
    tokio::spawn(async move { qmp.execute_raw("query-jobs", json!({})).await })
}

#[tokio::test]
async fn a_second_greeting_is_no_answer() {
    let (ours, mut peer) = pair();
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    // So does a QEMU that is just starting.
    peer.send(GREETING).await;
    peer.send(GREETING).await;
    let (_, id) = peer.command().await;
    peer.answer(&id, json!({})).await;
    let qmp = client.await.unwrap().unwrap();
    let asked = ask(&qmp);
    let (_, id) = peer.command().await;
    peer.answer(&id, json!(["answer"])).await;
    assert_eq!(asked.await.unwrap().unwrap(), json!(["answer"]));
}

#[tokio::test]
async fn no_greeting_means_that_another_client_holds_the_monitor() {
    let (ours, _peer) = pair();
    let error = Qmp::over(ours, SHORT).await.unwrap_err();
    assert_eq!(error.kind(), Kind::MonitorBusy);
}

#[tokio::test]
async fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::parse(dir.path().join("none").to_str().unwrap()).unwrap();
    assert_eq!(
        Qmp::connect(&address, PATIENCE).await.unwrap_err().kind(),
        Kind::MonitorUnreachable
    );
}

#[tokio::test]
async fn what_is_no_greeting_is_no_monitor() {
    for text in [
        "SSH-2.0-OpenSSH\r\n",
        "[]\n",
        "{\"event\":\"STOP\"}\n",
        "{\"QMP\": {}} {}\n",
        "\u{fffd}\n",
        "{\"QMP\"\n",
    ] {
        assert_eq!(
            greeted_with(text).await.unwrap_err().kind(),
            Kind::MonitorProtocol,
            "{text:?}"
        );
    }
}

#[tokio::test]
async fn an_endless_line_is_cut_off() {
    let (ours, mut peer) = pair();
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    let chunk = vec![b' '; 1 << 20];
    for _ in 0..17 {
        if peer.stream.get_mut().write_all(&chunk).await.is_err() {
            break;
        }
    }
    let error = client.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::MonitorProtocol);
    assert!(error.chain().contains("longer than"), "{}", error.chain());
}

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let (qmp, mut peer) = ready().await;
    let (first, second) = (ask(&qmp), ask(&qmp));
    let (one, two) = (peer.command().await.1, peer.command().await.1);
    // Which of the two tasks came first does not matter: both get an answer, and not the same.
    peer.answer(&two, json!(2)).await;
    peer.answer(&one, json!(1)).await;
    let mut found = [
        first.await.unwrap().unwrap(),
        second.await.unwrap().unwrap(),
    ];
    found.sort_by_key(Value::as_u64);
    assert_eq!(found, [json!(1), json!(2)]);
}

#[tokio::test]
async fn unknown_events_members_ids_and_blank_lines_harm_nothing() {
    let (qmp, mut peer) = ready().await;
    let mut events = qmp.events();
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    peer.send(
        "\r\n{\"event\":\"NEW_IN_12\",\"data\":{\"a\":[1]},\"timestamp\":{},\"more\":true}\r\n",
    )
    .await;
    peer.send("{\"return\":{},\"id\":987654}\r\n{\"return\":{}}\r\n")
        .await;
    peer.send(&format!("{{\"id\":{id},\"more\":1,\"return\":[]}}\r\n"))
        .await;
    assert_eq!(asked.await.unwrap().unwrap(), json!([]));
    let event = events.recv().await.unwrap();
    assert_eq!(
        (event.name.as_str(), event.data),
        ("NEW_IN_12", json!({"a": [1]}))
    );
}

#[tokio::test]
async fn a_refusal_carries_qemus_words() {
    let (qmp, mut peer) = ready().await;
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    peer.send(&format!(
        "{{\"error\":{{\"class\":\"NewClass\",\"desc\":\"no\"}},\"id\":{id}}}\r\n"
    ))
    .await;
    let error = asked.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::QemuRefused);
    let refusal = error.source().unwrap().downcast_ref::<Refusal>().unwrap();
    assert_eq!(
        (refusal.class.as_str(), refusal.desc.as_str()),
        ("NewClass", "no")
    );
}

#[tokio::test]
async fn a_late_answer_is_nobody_elses() {
    let (qmp, mut peer) = ready().await;
    let error = qmp
        .execute_raw_within("query-jobs", json!({}), SHORT)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::QemuTimeout);
    let late = peer.command().await.1;
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    peer.answer(&late, json!("late")).await;
    peer.answer(&id, json!("in time")).await;
    assert_eq!(asked.await.unwrap().unwrap(), json!("in time"));
}

#[tokio::test]
async fn a_caller_that_gives_up_harms_nothing() {
    let (qmp, mut peer) = ready().await;
    let gone = ask(&qmp);
    let id = peer.command().await.1;
    gone.abort();
    peer.answer(&id, json!({})).await;
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    peer.answer(&id, json!([])).await;
    assert!(asked.await.unwrap().is_ok());
}

#[tokio::test]
async fn the_end_of_the_connection_ends_all_that_waits() {
    let (qmp, mut peer) = ready().await;
    let mut events = qmp.events();
    let (one, two) = (ask(&qmp), ask(&qmp));
    peer.command().await;
    peer.command().await;
    drop(peer);
    for asked in [one, two] {
        assert_eq!(
            asked.await.unwrap().unwrap_err().kind(),
            Kind::MonitorClosed
        );
    }
    assert!(matches!(
        events.recv().await,
        Err(tokio::sync::broadcast::error::RecvError::Closed)
    ));
    assert_eq!(
        ask(&qmp).await.unwrap().unwrap_err().kind(),
        Kind::MonitorClosed
    );
    assert!(qmp.is_closed());
}

#[tokio::test]
async fn a_lie_ends_the_connection_and_is_named() {
    for lie in [
        "{} {}\r\n",
        "[1]\r\n",
        "\"text\"\r\n",
        "{\"return\":\r\n",
        "{\"id\":\"text\"}\r\n",
    ] {
        let (qmp, mut peer) = ready().await;
        let asked = ask(&qmp);
        peer.command().await;
        peer.send(lie).await;
        assert_eq!(
            asked.await.unwrap().unwrap_err().kind(),
            Kind::MonitorProtocol,
            "{lie:?}"
        );
    }
    let (qmp, mut peer) = ready().await;
    let asked = ask(&qmp);
    peer.command().await;
    peer.stream
        .get_mut()
        .write_all(b"{\"event\":\"\xff\"}\r\n")
        .await
        .unwrap();
    assert_eq!(
        asked.await.unwrap().unwrap_err().kind(),
        Kind::MonitorProtocol
    );
}

#[tokio::test]
async fn an_answer_of_another_shape_is_told() {
    let (qmp, mut peer) = ready().await;
    let asked = tokio::spawn(async move { query::version(&qmp).await });
    let id = peer.command().await.1;
    peer.answer(&id, json!({"qemu": {"major": "ten"}})).await;
    assert_eq!(
        asked.await.unwrap().unwrap_err().kind(),
        Kind::MonitorProtocol
    );
}

#[tokio::test]
async fn a_flood_of_events_stops_no_command_and_is_told_to_who_lags() {
    let (qmp, mut peer) = ready().await;
    let mut events = qmp.events();
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    for _ in 0..3000 {
        peer.send("{\"event\":\"X\"}\r\n").await;
    }
    peer.answer(&id, json!([])).await;
    assert!(asked.await.unwrap().is_ok());
    assert!(matches!(
        events.recv().await,
        Err(tokio::sync::broadcast::error::RecvError::Lagged(_))
    ));
}

#[tokio::test]
async fn descriptors_do_not_go_where_they_cannot() {
    let (qmp, _peer) = ready().await;
    assert!(!qmp.can_pass_fds());
    let file = tempfile::tempfile().unwrap();
    let passed = qmp
        .execute_with_fd("add-fd", json!({}), std::os::fd::AsFd::as_fd(&file))
        .await;
    assert_eq!(passed.unwrap_err().kind(), Kind::QemuUnsupported);
}

#[tokio::test]
async fn the_last_handle_closes_the_connection() {
    let (qmp, mut peer) = ready().await;
    drop(qmp);
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, peer.stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_monitor_that_does_not_read_is_still_heard() {
    // Room for less than one command: the long one below cannot be sent whole.
    let (ours, theirs) = tokio::io::duplex(64);
    let mut peer = Peer {
        stream: BufReader::new(theirs),
    };
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    peer.send(GREETING).await;
    let id = peer.command().await.1;
    peer.answer(&id, json!({})).await;
    let qmp = client.await.unwrap().unwrap();
    let mut events = qmp.events();
    let (long, sent) = (qmp.clone(), json!({"text": "x".repeat(10_000)}));
    let asked = tokio::spawn(async move { long.execute_raw("query-jobs", sent).await });
    let mut first = [0];
    let begun = peer.stream.read_exact(&mut first);
    tokio::time::timeout(PATIENCE, begun)
        .await
        .unwrap()
        .unwrap();
    for _ in 0..100 {
        peer.send("{\"event\":\"X\"}\r\n").await;
    }
    for _ in 0..100 {
        let event = tokio::time::timeout(PATIENCE, events.recv()).await;
        assert_eq!(event.unwrap().unwrap().name, "X");
    }
    let mut rest = String::new();
    let read = peer.stream.read_line(&mut rest);
    tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
    let command: Value = serde_json::from_str(&format!("{{{rest}")).unwrap();
    assert_eq!(command["arguments"]["text"].as_str().unwrap().len(), 10_000);
    peer.answer(&command["id"], json!([])).await;
    assert_eq!(asked.await.unwrap().unwrap(), json!([]));
}

#[tokio::test]
async fn the_last_handle_closes_even_what_is_not_read() {
    let (ours, theirs) = tokio::io::duplex(64);
    let mut peer = Peer {
        stream: BufReader::new(theirs),
    };
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    peer.send(GREETING).await;
    let id = peer.command().await.1;
    peer.answer(&id, json!({})).await;
    let qmp = client.await.unwrap().unwrap();
    let sent = json!({"text": "x".repeat(10_000)});
    let error = qmp.execute_raw_within("query-jobs", sent, SHORT).await;
    assert_eq!(error.unwrap_err().kind(), Kind::QemuTimeout);
    drop(qmp);
    // The end comes in the middle of the line.
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, peer.stream.read_to_end(&mut rest)).await;
    read.unwrap().unwrap();
    assert!(!rest.contains(&b'\n'), "{} bytes", rest.len());
}

#[tokio::test]
async fn what_was_not_sent_when_its_caller_gave_up_is_not_sent() {
    let (ours, theirs) = tokio::io::duplex(64);
    let mut peer = Peer {
        stream: BufReader::new(theirs),
    };
    let client = tokio::spawn(Qmp::over(ours, PATIENCE));
    peer.send(GREETING).await;
    let id = peer.command().await.1;
    peer.answer(&id, json!({})).await;
    let qmp = client.await.unwrap().unwrap();
    let sent = json!({"text": "x".repeat(10_000)});
    let long = qmp.execute_raw_within("first", sent, SHORT);
    let behind = qmp.execute_raw_within("second", json!({}), SHORT);
    let (long, behind) = tokio::join!(long, behind);
    assert_eq!(long.unwrap_err().kind(), Kind::QemuTimeout);
    assert_eq!(behind.unwrap_err().kind(), Kind::QemuTimeout);
    let third = tokio::spawn(async move { qmp.execute_raw("third", json!({})).await });
    // What was begun is sent whole.
    assert_eq!(peer.command().await.0, "first");
    let (name, id) = peer.command().await;
    assert_eq!(name, "third");
    peer.answer(&id, json!(3)).await;
    assert_eq!(third.await.unwrap().unwrap(), json!(3));
}

#[tokio::test]
async fn null_is_an_answer() {
    let (qmp, mut peer) = ready().await;
    let asked = ask(&qmp);
    let id = peer.command().await.1;
    peer.answer(&id, Value::Null).await;
    assert_eq!(asked.await.unwrap().unwrap(), Value::Null);
}

/// The client's end of [`job::finalize`], under way.
fn finalize(qmp: &Qmp, deadline: Duration) -> tokio::task::JoinHandle<Result<()>> {
    let qmp = qmp.clone();
    tokio::spawn(async move { job::finalize(&qmp, "j", deadline).await })
}

async fn answer_next(peer: &mut Peer, name: &str, value: Value) {
    let (asked, id) = peer.command().await;
    assert_eq!(asked, name);
    peer.answer(&id, value).await;
}

async fn refuse_next(peer: &mut Peer) {
    let id = peer.command().await.1;
    peer.send(&format!(
        "{{\"error\":{{\"class\":\"GenericError\",\"desc\":\"no\"}},\"id\":{id}}}\r\n"
    ))
    .await;
}

#[tokio::test]
async fn a_job_whose_event_was_missed_is_seen_to_end() {
    let (qmp, mut peer) = ready().await;
    let running = finalize(&qmp, PATIENCE);
    answer_next(&mut peer, "job-finalize", json!({})).await;
    answer_next(
        &mut peer,
        "query-jobs",
        json!([{"id": "j", "status": "running"}]),
    )
    .await;
    // More than a subscriber can lag behind, and its own event is not among them.
    peer.send(&"{\"event\":\"X\"}\r\n".repeat(5000)).await;
    answer_next(
        &mut peer,
        "query-jobs",
        json!([{"id": "j", "status": "concluded", "error": "disk full"}]),
    )
    .await;
    // That it failed is told even where it cannot be dismissed.
    refuse_next(&mut peer).await;
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::QemuRefused);
    assert!(error.chain().contains("disk full"), "{}", error.chain());
}

#[tokio::test]
async fn a_job_that_is_gone_did_not_succeed() {
    let (qmp, mut peer) = ready().await;
    let running = finalize(&qmp, PATIENCE);
    answer_next(&mut peer, "job-finalize", json!({})).await;
    answer_next(&mut peer, "query-jobs", json!([])).await;
    refuse_next(&mut peer).await;
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::QemuRefused);
}

#[tokio::test]
async fn a_job_that_never_ends_is_waited_for_only_so_long() {
    let (qmp, mut peer) = ready().await;
    let running = finalize(&qmp, Duration::from_millis(50));
    answer_next(&mut peer, "job-finalize", json!({})).await;
    answer_next(
        &mut peer,
        "query-jobs",
        json!([{"id": "j", "status": "running"}]),
    )
    .await;
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::QemuTimeout);
}

#[tokio::test]
async fn a_job_ends_with_the_connection() {
    let (qmp, mut peer) = ready().await;
    let running = finalize(&qmp, PATIENCE);
    answer_next(&mut peer, "job-finalize", json!({})).await;
    answer_next(
        &mut peer,
        "query-jobs",
        json!([{"id": "j", "status": "running"}]),
    )
    .await;
    drop(peer);
    let error = running.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::MonitorClosed);
}
