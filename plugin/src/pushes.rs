//! `backup.push`: QEMU writes a disk to the host's target, or to us for the host.

use std::convert::Infallible;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use qemu_fleece_engine::nbd::wire::MAX_STRING;
use qemu_fleece_engine::push::{self, MAX_WORKERS, Options, Progress};
use qemu_fleece_engine::relay::Socket;
use qemu_fleece_engine::target::{NbdServer, Place, Target, Tls};
use qemu_fleece_engine::view::View;
use qemu_fleece_protocol::backup::Mode;
use qemu_fleece_protocol::envelope::notification_line;
use qemu_fleece_protocol::event::ProgressParams;
use qemu_fleece_protocol::push as protocol;
use qemu_fleece_protocol::push::{PushParams, PushResult};
use qemu_fleece_protocol::restore::Format;
use qemu_fleece_protocol::{Code, Id, WireError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::inherited::Inherited;
use crate::requests::{Outcome, Started, link, spawn, stream, to_raw};
use crate::serve::Server;
use crate::stream::{self, Stream};
use crate::wire;
use crate::writer::Outlet;

/// Writes under way where the host does not say.
const WORKERS: u64 = 8;

/// How long a target may take nothing, where the host does not say, in milliseconds,
const TIMEOUT_MS: u64 = 10_000;

/// and what it may say.
const TIMEOUTS_MS: std::ops::RangeInclusive<u64> = 1_000..=600_000;

/// How often a push is looked at, and told of.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Starts `backup.push`.
pub(crate) fn push(server: &mut Server, id: &Id, params: PushParams) -> Started {
    let options = options(&params)?;
    let target = from_target(params.target, params.compress, &server.config.inherited)?;
    let backup = server.backups.get(&params.backup)?;
    let view = backup.view(&params.disk)?;
    let begin = backup.disk(&params.disk)?.begin.clone();
    let over = backup.session.over();
    let runtime_dir = backup.session.dir().to_owned();
    let (carrier, outlet) = (server.carrier.unwrap_or_default(), server.outlet.clone());
    let Some(target) = target else {
        return Ok(stream(server, id, over, move |id, cancel| {
            let stream = Stream {
                id,
                begin,
                view,
                carrier,
                outlet,
                cancel,
            };
            async move {
                let pushed = stream::run_push(stream, options, runtime_dir).await;
                pushed.and_then(to_raw)
            }
        }));
    };
    let cancel = server.token(id);
    link(over, cancel.clone());
    let stream = id.clone();
    Ok(spawn(server, id, async move {
        let (told, progress) = watch::channel(Progress::default());
        let teller = Teller {
            stream,
            disk: begin.disk,
            view: Arc::clone(&view),
            outlet,
            progress,
            started: Instant::now(),
            scratch_peak: 0,
        };
        let pushed = push::push(&view, target, &options, &runtime_dir, &told, &cancel);
        let reply = teller.tell_of(pushed, begin.mode).await.and_then(to_raw);
        cancel.cancel();
        Outcome::Reply(reply)
    }))
}

/// Tells of a push while it is under way.
struct Teller {
    stream: Id,
    disk: String,
    view: Arc<View>,
    outlet: Outlet,
    progress: watch::Receiver<Progress>,
    started: Instant,
    scratch_peak: u64,
}

impl Teller {
    async fn tell_of(
        mut self,
        push: impl Future<Output = qemu_fleece_engine::Result<u64>>,
        mode: Mode,
    ) -> Result<PushResult, WireError> {
        // Beside the push, which goes on while QEMU does not tell.
        let pushed = tokio::select! {
            biased;
            pushed = push => pushed,
            never = self.keep_telling() => match never {},
        };
        self.tell().await;
        self.view.remember().await;
        let copied_bytes = pushed.map_err(|error| wire::of_view(&error, &self.view))?;
        Ok(PushResult {
            mode,
            copied_bytes,
            scratch_peak: self.scratch_peak,
            duration_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            digest: None,
        })
    }

    async fn keep_telling(&mut self) -> Infallible {
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.tell().await;
        }
    }

    async fn tell(&mut self) {
        let scratch_bytes = self.view.scratch_bytes().await;
        self.scratch_peak = self.scratch_peak.max(scratch_bytes);
        let Progress { done, total } = *self.progress.borrow();
        let params = ProgressParams {
            stream: self.stream.clone(),
            disk: self.disk.clone(),
            done,
            total,
            data_bytes: 0,
            scratch_bytes,
        };
        // One that finds standard output full is of no use later: the push does not wait.
        if let Ok(line) = notification_line("progress", params, None) {
            let _full = self.outlet.try_send(line.into());
        }
    }
}

fn invalid(why: impl Into<String>) -> WireError {
    WireError::new(Code::InvalidParams, why)
}

fn options(params: &PushParams) -> Result<Options, WireError> {
    let workers = params.workers.unwrap_or(WORKERS);
    if !(1..=MAX_WORKERS).contains(&workers) {
        return Err(invalid(format!("workers is 1 to {MAX_WORKERS}")));
    }
    let timeout_ms = params.timeout_ms.unwrap_or(TIMEOUT_MS);
    if !TIMEOUTS_MS.contains(&timeout_ms) {
        return Err(invalid(format!("timeout_ms is in {TIMEOUTS_MS:?}")));
    }
    // QEMU's own numbers are signed.
    let speed = params.speed;
    if speed.is_some_and(|speed| speed == 0 || i64::try_from(speed).is_err()) {
        return Err(invalid("speed is 1 or more bytes a second"));
    }
    Ok(Options {
        compress: params.compress,
        speed,
        workers,
        discard_source: params.discard_source,
        timeout: Duration::from_millis(timeout_ms),
    })
}

/// The engine's target; `None`: the host itself, by records.
fn from_target(
    target: protocol::Target,
    compress: bool,
    inherited: &Inherited,
) -> Result<Option<Target>, WireError> {
    // QEMU writes no compressed cluster where there is one already.
    let can_compress = matches!(
        &target,
        protocol::Target::File {
            format: Format::Qcow2,
            ..
        }
    );
    if compress && !can_compress {
        return Err(invalid("compress is for new qcow2 files only"));
    }
    Ok(Some(match target {
        protocol::Target::Records {} => return Ok(None),
        protocol::Target::File {
            path,
            format,
            backing,
        } => Target::File {
            path: PathBuf::from(path),
            format: wire::from_format(format),
            backing: backing.map(|below| (below.path, wire::from_format(below.format))),
        },
        protocol::Target::Existing {
            path,
            format,
            is_zero,
        } => Target::Existing {
            place: match inherited.copy(&path)? {
                Some(fd) => Place::File(File::from(fd)),
                None => Place::Path(PathBuf::from(path)),
            },
            format: wire::from_format(format),
            is_zero,
        },
        protocol::Target::Nbd { export, .. } if export.len() > MAX_STRING => {
            let why = format!("the export's name is longer than {MAX_STRING} bytes");
            return Err(invalid(why));
        }
        protocol::Target::Nbd {
            address,
            export,
            is_zero,
            tls,
        } => Target::Nbd {
            server: from_address(&address, inherited)?,
            export,
            is_zero,
            tls: tls.map(from_tls),
        },
    }))
}

fn from_address(address: &str, inherited: &Inherited) -> Result<NbdServer, WireError> {
    if let Some(fd) = inherited.copy(address)? {
        // It stays the host's until the push speaks with it.
        let socket = Socket::check(fd);
        let socket = socket.map_err(|error| invalid(format!("{address:?}: {error}")))?;
        return Ok(NbdServer::Connected(socket));
    }
    match address.split_once(':') {
        Some(("unix", path)) if path.starts_with('/') => Ok(NbdServer::Unix(PathBuf::from(path))),
        Some(("tcp", place)) if place.contains(':') => Ok(NbdServer::Tcp(place.to_owned())),
        _ => Err(invalid(
            "an NBD server's address is unix:/path, tcp:host:port or fd:N",
        )),
    }
}

fn from_tls(tls: protocol::Tls) -> Tls {
    match tls {
        protocol::Tls::X509 { dir, hostname } => Tls::X509 { dir, hostname },
        protocol::Tls::Psk { dir, username } => Tls::Psk {
            dir,
            username: username.unwrap_or_else(|| "qemu".to_owned()),
        },
    }
}
