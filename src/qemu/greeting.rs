//! What a monitor says first: QEMU's version. It greets one client at a time.
//!
//! ```text
//! (rest of what it had for a client that is gone)* -> greeting
//! ```
//! QEMU answers a command whose client was killed meanwhile: to the next client. A reply that
//! the killed one had read in part goes on with the next one too.

use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncRead;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Kind, Result};
use crate::qemu::actor::next;
use crate::qemu::line::Lines;

/// The first major version whose monitor reads all of what comes over TLS. Those before wait for
/// more once they have read the first byte.
pub(super) const HEARS_TLS: u64 = 8;

/// Lines that may come before it; and how long it may take after one that is no message.
const REST_LINES: usize = 16;
const REST_DEADLINE: Duration = Duration::from_secs(1);

/// Reads it, of a QEMU of the major version `least` or newer.
///
/// # Errors
/// [`Kind::MonitorBusy`]: there is none within `deadline`; [`Kind::QemuUnsupported`];
/// [`Kind::MonitorProtocol`]; [`Kind::MonitorClosed`].
pub(super) async fn read(
    reader: &mut (impl AsyncRead + Unpin),
    lines: &mut Lines,
    deadline: Duration,
    least: u64,
) -> Result<()> {
    let doing = "reading the monitor's greeting";
    let mut end = Instant::now() + deadline;
    let mut instead: Option<Error> = None;
    for _ in 0..=REST_LINES {
        let error = match timeout_at(end, next(reader, lines)).await {
            Err(_elapsed) => return Err(instead.unwrap_or_else(missing)),
            Ok(Ok(None)) => {
                let closed = || Error::new(Kind::MonitorClosed, doing).because("end of file");
                return Err(instead.unwrap_or_else(closed));
            }
            Ok(Ok(Some(message))) => match message.greeting {
                Some(said) => return check(&said, least),
                None => Error::new(Kind::MonitorProtocol, doing)
                    .because("the first line is no QMP greeting"),
            },
            // Only the first line can be the rest of one.
            Ok(Err(error)) if instead.is_some() => return Err(error),
            Ok(Err(error)) => {
                lines.pass_over();
                // This may be anything, and say no more.
                end = end.min(Instant::now() + REST_DEADLINE);
                error
            }
        };
        instead.get_or_insert(error);
    }
    Err(instead.unwrap_or_else(missing))
}

/// There is none: QEMU greets another client.
pub(super) fn missing() -> Error {
    Error::new(Kind::MonitorBusy, "waiting for the monitor's greeting")
        .because("another client holds this monitor")
}

fn check(said: &Value, least: u64) -> Result<()> {
    let major = said["version"]["qemu"]["major"].as_u64();
    if major.is_some_and(|major| major < least) {
        let why = format!("it hears nothing over TLS: QEMU {least}.0 and later do");
        return Err(Error::new(Kind::QemuUnsupported, "asking QEMU").because(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, duplex};

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7}}}}\r\n";
    const ANSWER: &str = "{\"return\": {}, \"id\": 31}\r\n";

    const PATIENT: Duration = Duration::from_secs(60);

    /// What a client makes of this text, after which nothing comes.
    async fn of(text: &str, deadline: Duration, least: u64) -> Result<()> {
        let (mut qemu, mut client) = duplex(1 << 16);
        qemu.write_all(text.as_bytes()).await.unwrap();
        let mut lines = Lines::default();
        read(&mut client, &mut lines, deadline, least).await
    }

    #[tokio::test]
    async fn comes_after_what_was_somebody_elses() {
        for before in [
            "",
            ANSWER,
            "{\"event\": \"STOP\"}\r\n",
            "\"name\": \"x\"}], \"id\": 30}\r\n",
            "{\"name\": \"x\"}], \"id\": 30}\r\n{\"event\": \"STOP\"}\r\n",
            &ANSWER.repeat(REST_LINES),
        ] {
            let text = format!("{before}{GREETING}");
            of(&text, PATIENT, 0).await.unwrap();
        }
    }

    #[tokio::test]
    async fn others_are_no_qemu() {
        let silent = of("", Duration::from_millis(10), 0).await;
        assert_eq!(Kind::MonitorBusy, silent.unwrap_err().kind());
        let other = of(ANSWER, Duration::from_millis(10), 0).await;
        assert_eq!(Kind::MonitorProtocol, other.unwrap_err().kind());
        for text in [
            "SSH-2.0-OpenSSH\r\n",
            "HTTP/1.1 400\r\nServer: x\r\n",
            &ANSWER.repeat(REST_LINES + 1),
        ] {
            // Before its deadline: this is known soon.
            let other = tokio::time::timeout(PATIENT / 2, of(text, PATIENT, 0)).await;
            let error = other.expect(text).unwrap_err();
            assert_eq!(Kind::MonitorProtocol, error.kind(), "{text}");
        }
    }

    #[tokio::test]
    async fn tells_the_version() {
        let refused = of(GREETING, PATIENT, HEARS_TLS).await.unwrap_err();
        assert_eq!(Kind::QemuUnsupported, refused.kind());
    }
}
