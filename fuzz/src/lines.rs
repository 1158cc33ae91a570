//! What a host sends: lines and payloads, the requests in them, and their parameters.

use std::fmt::Debug;

use qemu_fleece_protocol::envelope::Request;
use qemu_fleece_protocol::line::{Framer, LineError, Piece};
use qemu_fleece_protocol::{backup, checkpoint, export, hello, orphan, push, restore, vm};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::input::Cuts;

/// Longest line here: short, so that inputs reach it.
const LIMIT: usize = 1024;

/// Longest payload here.
const MAX_PAYLOAD: u64 = 512;

/// What the plugin would make of a piece of its input.
#[derive(Debug, PartialEq)]
enum Seen {
    Bad(String),
    Request(String, Option<Vec<u8>>),
    End(Result<(), LineError>),
}

/// However the bytes are cut, the same is seen in them; never more is held than the limits
/// allow; a request, and its parameters, are the same when they are written and read again.
pub fn run(input: &[u8]) {
    let whole = read(input, Cuts::Whole);
    assert_eq!(read(input, Cuts::Small), whole);
}

fn read(input: &[u8], cuts: Cuts) -> Vec<Seen> {
    let (mut framer, mut waiting, mut seen) = (Framer::new(LIMIT), None, Vec::new());
    for bytes in cuts.of(input) {
        framer.push(bytes);
        loop {
            match framer.next_piece() {
                Ok(None) => break,
                Ok(Some(Piece::Line(line))) => {
                    assert!(line.len() <= LIMIT && !line.contains(&b'\n'));
                    seen.extend(take_line(&line, &mut framer, &mut waiting));
                }
                Ok(Some(Piece::Payload(payload))) => {
                    let request = waiting.take().expect("a payload has its request");
                    seen.push(Seen::Request(request, Some(payload)));
                }
                Err(error) => seen.push(Seen::Bad(error.to_string())),
            }
        }
        let limit = LIMIT.max(usize::try_from(MAX_PAYLOAD).expect("it is small"));
        assert!(framer.held() <= limit + bytes.len());
    }
    seen.push(Seen::End(framer.finish()));
    seen
}

/// As the plugin's `input` does.
fn take_line(line: &[u8], framer: &mut Framer, waiting: &mut Option<String>) -> Option<Seen> {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err(bad) => {
            framer.skip_payload(bad.payload_bytes);
            return Some(Seen::Bad(format!("{bad:?}")));
        }
    };
    survives(&request);
    let known = METHODS.iter().find(|(name, _)| *name == request.method);
    let params = known.map(|(_, check)| check(&request));
    let told = format!("{} {} {params:?}", request.id, request.method);
    match usize::try_from(request.payload_bytes) {
        Ok(0) => Some(Seen::Request(told, None)),
        Ok(length) if request.payload_bytes <= MAX_PAYLOAD => {
            framer.payload(length);
            *waiting = Some(told);
            None
        }
        _ => {
            framer.skip_payload(request.payload_bytes);
            Some(Seen::Bad(told))
        }
    }
}

fn survives(request: &Request) {
    let line = serde_json::json!({
        "jsonrpc": "2.0", "id": request.id, "method": request.method,
        "params": request.params, "payload_bytes": request.payload_bytes,
    });
    // Parameters that are nested too deeply are refused only when they are read.
    let Ok(line) = serde_json::to_vec(&line) else {
        return;
    };
    let again = Request::parse(&line).expect("it was a request");
    assert_eq!(
        (&again.id, &again.method, again.payload_bytes),
        (&request.id, &request.method, request.payload_bytes)
    );
}

type Check = fn(&Request) -> Result<String, String>;

/// Each method, with the type of its parameters.
pub const METHODS: &[(&str, Check)] = &[
    ("hello", check::<hello::HelloParams>),
    ("ping", check::<hello::NoParams>),
    ("cancel", check::<hello::CancelParams>),
    ("shutdown", check::<hello::NoParams>),
    ("vm.inspect", check::<vm::InspectParams>),
    ("checkpoint.list", check::<checkpoint::ListParams>),
    ("checkpoint.create", check::<checkpoint::CreateParams>),
    ("checkpoint.delete", check::<checkpoint::DeleteParams>),
    ("checkpoint.disable", check::<checkpoint::ToggleParams>),
    ("checkpoint.enable", check::<checkpoint::ToggleParams>),
    ("checkpoint.merge", check::<checkpoint::MergeParams>),
    ("checkpoint.redefine", check::<checkpoint::RedefineParams>),
    ("checkpoint.repair", check::<checkpoint::RepairParams>),
    ("backup.estimate", check::<backup::EstimateParams>),
    ("backup.begin", check::<backup::BeginParams>),
    ("backup.begin_group", check::<backup::BeginGroupParams>),
    ("backup.attach", check::<orphan::AttachParams>),
    ("reclaim", check::<orphan::ReclaimParams>),
    ("backup.read", check::<backup::ReadParams>),
    ("backup.push", check::<push::PushParams>),
    ("backup.export", check::<export::ExportParams>),
    ("backup.map", check::<export::MapParams>),
    ("backup.ack", check::<backup::AckParams>),
    ("backup.commit", check::<backup::CommitParams>),
    ("backup.abort", check::<backup::AbortParams>),
    ("restore.begin", check::<restore::RestoreBeginParams>),
    ("restore.write", check::<restore::RestoreWriteParams>),
    ("restore.finish", check::<restore::RestoreParams>),
    ("restore.abort", check::<restore::RestoreParams>),
];

fn check<P>(request: &Request) -> Result<String, String>
where
    P: Debug + PartialEq + Serialize + DeserializeOwned,
{
    let params: P = request
        .params()
        .map_err(|error| error.data.code.name().to_owned())?;
    let text = serde_json::to_string(&params).expect("it was JSON");
    let again: P = serde_json::from_str(&text).expect("parameters are read as they are written");
    assert_eq!(again, params);
    Ok(text)
}
