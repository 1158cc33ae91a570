//! Standard input: a thread that cuts it into requests.

use std::fs::File;
use std::io::Read;

use qemu_fleece_protocol::envelope::{BadLine, Request};
use qemu_fleece_protocol::line::{Framer, Piece};
use qemu_fleece_protocol::{Code, MAX_LINE_BYTES, MAX_PAYLOAD_BYTES, WireError};
use tokio::sync::mpsc;

/// Requests that wait for the loop. More stay in the pipe.
const QUEUE: usize = 4;

/// Bytes of one read.
const READ_BYTES: usize = 256 * 1024;

/// What comes from the host.
#[derive(Debug)]
pub(crate) enum Input {
    /// A request, and the payload behind it.
    Request(Request, Option<Vec<u8>>),
    /// A line that is no request; the answer is in it.
    Bad(Box<BadLine>),
    /// The end of the input, or of reading it.
    End,
}

/// Starts the thread. It ends with the input, or with the receiver.
pub(crate) fn spawn(stdin: File) -> std::io::Result<mpsc::Receiver<Input>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            // The receiver is gone only when the process ends.
            let _closed = read(stdin, &sender);
            let _closed = sender.blocking_send(Input::End);
        })?;
    Ok(receiver)
}

type Closed = mpsc::error::SendError<Input>;

fn read(mut stdin: File, sender: &mpsc::Sender<Input>) -> Result<(), Closed> {
    let mut framer = Framer::new(MAX_LINE_BYTES);
    let mut bytes = vec![0; READ_BYTES];
    let mut waiting: Option<Request> = None;
    loop {
        match stdin.read(&mut bytes) {
            Ok(0) => break,
            Ok(length) => framer.push(&bytes[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::error!(%error, "reading standard input");
                break;
            }
        }
        loop {
            match framer.next_piece() {
                Ok(None) => break,
                Ok(Some(Piece::Line(line))) => take_line(&line, &mut framer, &mut waiting, sender)?,
                Ok(Some(Piece::Payload(payload))) => {
                    if let Some(request) = waiting.take() {
                        sender.blocking_send(Input::Request(request, Some(payload)))?;
                    }
                }
                Err(error) => {
                    sender.blocking_send(bad(None, Code::LineTooLong, error.to_string()))?
                }
            }
        }
    }
    if let Err(error) = framer.finish() {
        sender.blocking_send(bad(None, Code::ParseError, error.to_string()))?;
    }
    Ok(())
}

fn take_line(
    line: &[u8],
    framer: &mut Framer,
    waiting: &mut Option<Request>,
    sender: &mpsc::Sender<Input>,
) -> Result<(), Closed> {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err(bad) => {
            framer.skip_payload(bad.payload_bytes);
            return sender.blocking_send(Input::Bad(bad));
        }
    };
    match usize::try_from(request.payload_bytes) {
        Ok(0) => sender.blocking_send(Input::Request(request, None)),
        Ok(length) if request.payload_bytes <= MAX_PAYLOAD_BYTES => {
            framer.payload(length);
            *waiting = Some(request);
            Ok(())
        }
        _ => {
            framer.skip_payload(request.payload_bytes);
            let why = format!("a payload has at most {MAX_PAYLOAD_BYTES} bytes");
            sender.blocking_send(bad(Some(request), Code::InvalidPayload, why))
        }
    }
}

fn bad(request: Option<Request>, code: Code, why: String) -> Input {
    let id = request.map(|request| request.id);
    Input::Bad(Box::new(BadLine {
        id,
        error: WireError::new(code, why),
        payload_bytes: 0,
    }))
}
