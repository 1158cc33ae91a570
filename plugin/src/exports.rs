//! `backup.export` and `backup.map`: the host reads by itself.

use std::sync::Arc;

use qemu_fleece_engine::export::Exported;
use qemu_fleece_engine::extent::{Content, length};
use qemu_fleece_engine::map::Map;
use qemu_fleece_engine::relay::Socket;
use qemu_fleece_engine::view::View;
use qemu_fleece_protocol::envelope::notification_line;
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::export::{
    BlockSize, ExportParams, ExportResult, Extent, ExtentKind, ExtentsParams, MapParams, MapResult,
    Readable,
};
use qemu_fleece_protocol::record::Begin;
use qemu_fleece_protocol::{Code, Id, WireError};
use tokio_util::sync::CancellationToken;

use crate::inherited::Inherited;
use crate::requests::{Outcome, Started, spawn, stream, to_raw};
use crate::serve::Server;
use crate::wire;
use crate::writer::Outlet;

/// Most extents in one notification.
const BATCH: usize = 4096;

/// Starts `backup.export`.
pub(crate) fn export(server: &mut Server, id: &Id, params: ExportParams) -> Started {
    let socket = match params.socket.as_deref() {
        None => None,
        Some(text) => Some(socket(text, &server.config.inherited)?),
    };
    let backup = server.backups.get_mut(&params.backup)?;
    let view = backup.session.exporting(&params.disk);
    let view = view.map_err(|error| wire::unchanged(&error))?;
    let dir = backup.session.dir().to_owned();
    let begin = backup.disk(&params.disk)?.begin.clone();
    Ok(spawn(server, id, async move {
        let exported = view.export(&dir, socket).await;
        view.remember().await;
        let exported = exported.map_err(|error| wire::of_view(&error, &view));
        Outcome::Reply(
            exported
                .and_then(|exported| to_result(&exported, &view, &begin))
                .and_then(to_raw),
        )
    }))
}

/// The socket of `fd:N`, which stays the host's until the disk is exported.
fn socket(text: &str, inherited: &Inherited) -> Result<Socket, WireError> {
    let invalid = |why: String| WireError::new(Code::InvalidParams, why);
    let fd = inherited.copy(text)?;
    let fd = fd.ok_or_else(|| invalid("`socket` is fd:N".to_owned()))?;
    Socket::check(fd).map_err(|error| invalid(format!("{text:?}: {error}")))
}

fn to_result(exported: &Exported, view: &View, begin: &Begin) -> Result<ExportResult, WireError> {
    let socket = exported.socket.to_str().ok_or_else(|| {
        let why = format!(
            "the socket's path is not UTF-8: {}",
            exported.socket.display()
        );
        WireError::new(Code::Internal, why).left(StateLeft::BackupOpen)
    })?;
    let (minimum, preferred, maximum) = exported.block_sizes;
    Ok(ExportResult {
        address: format!("unix:{socket}"),
        export: begin.disk.clone(),
        uri: format!("nbd+unix:///{}?socket={}", begin.disk, escape(socket)),
        size: begin.size,
        mode: begin.mode,
        readable: if view.is_whole() {
            Readable::All
        } else {
            Readable::Changed
        },
        allocation_context: "base:allocation".into(),
        changes_context: view.public_context(),
        granularity: begin.granularity,
        block_size: BlockSize {
            minimum: minimum.into(),
            preferred: preferred.into(),
            maximum: maximum.into(),
        },
    })
}

/// A path as a part of a URI's query (RFC 3986).
fn escape(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(&byte) {
            text.push(byte.into());
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// Starts `backup.map`.
pub(crate) fn map(server: &mut Server, id: &Id, params: &MapParams) -> Started {
    let backup = server.backups.get(&params.backup)?;
    let view = backup.view(&params.disk)?;
    let over = backup.session.over();
    let (outlet, disk) = (server.outlet.clone(), params.disk.clone());
    Ok(stream(server, id, over, move |id, cancel| async move {
        let map = Map::open(Arc::clone(&view), cancel.clone()).await;
        let map = map.map_err(|error| wire::of_view(&error, &view))?;
        send(map, &view, &outlet, &id, &disk, &cancel)
            .await
            .and_then(to_raw)
    }))
}

async fn send(
    mut map: Map,
    view: &View,
    outlet: &Outlet,
    id: &Id,
    disk: &str,
    cancel: &CancellationToken,
) -> Result<MapResult, WireError> {
    let mut result = MapResult {
        extents: 0,
        data_bytes: 0,
        zero_bytes: 0,
        same_bytes: 0,
    };
    let mut batch = Vec::new();
    loop {
        let next = map.next().await;
        let next = next.map_err(|error| wire::of_view(&error, view))?;
        let last = next.is_none();
        if let Some(extent) = next {
            let bytes = length(&extent.range);
            let (kind, sum) = match extent.content {
                Content::Data => (ExtentKind::Data, &mut result.data_bytes),
                Content::Zero { .. } => (ExtentKind::Zero, &mut result.zero_bytes),
                Content::Same => (ExtentKind::Same, &mut result.same_bytes),
            };
            *sum += bytes;
            result.extents += 1;
            batch.push((extent.range.start, bytes, kind));
        }
        if batch.len() == BATCH || (last && !batch.is_empty()) {
            put(std::mem::take(&mut batch), outlet, id, disk, cancel).await?;
        }
        if last {
            return Ok(result);
        }
    }
}

/// Hands a batch to standard output, unless the request is cancelled first.
async fn put(
    extents: Vec<Extent>,
    outlet: &Outlet,
    id: &Id,
    disk: &str,
    cancel: &CancellationToken,
) -> Result<(), WireError> {
    let error = |code, why: String| WireError::new(code, why).left(StateLeft::BackupOpen);
    let params = ExtentsParams {
        stream: id.clone(),
        disk: disk.to_owned(),
        extents,
    };
    let line = notification_line("extents", params, None)
        .map_err(|json| error(Code::Internal, format!("writing JSON: {json}")))?;
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(error(Code::Cancelled, "the request was cancelled".into())),
        sent = outlet.send(line.into()) => {
            sent.map_err(|_closed| error(Code::Cancelled, "standard output is closed".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn a_path_in_a_uri_is_read_back_whatever_is_in_it() {
        assert_eq!(
            escape("/run/a b&c=d/ä~x.sock"),
            "/run/a%20b%26c%3Dd/%C3%A4~x.sock"
        );
    }
}
