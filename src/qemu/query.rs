//! Small questions to QEMU, and their answers in the members that matter.
//! Unknown members are ignored; words are kept as text.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::qemu::{Qmp, Refusal};

async fn ask<T: DeserializeOwned>(
    qmp: &Qmp,
    command: &'static str,
    arguments: serde_json::Value,
) -> Result<T> {
    let answer = qmp.execute_raw(command, arguments).await?;
    serde_json::from_value(answer).map_err(|error| {
        Error::new(
            Kind::MonitorProtocol,
            format!("reading the answer to {command}"),
        )
        .because(error)
    })
}

/// QEMU's version (QAPI `VersionTriple`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// As 10 in 10.0.2.
    pub major: u32,
    /// As 0 in 10.0.2.
    pub minor: u32,
    /// As 2 in 10.0.2.
    pub micro: u32,
}

/// What the distribution calls its build, as `Debian 1:10.0.2`; empty where it does not.
///
/// # Errors
/// As all here: QEMU's, the monitor's.
pub async fn package(qmp: &Qmp) -> Result<String> {
    #[derive(Deserialize)]
    struct Answer {
        package: String,
    }
    ask::<Answer>(qmp, "query-version", json!({}))
        .await
        .map(|answer| answer.package)
}

/// `query-version`.
///
/// # Errors
/// As all here: QEMU's, the monitor's.
pub async fn version(qmp: &Qmp) -> Result<Version> {
    #[derive(Deserialize)]
    struct Answer {
        qemu: Version,
    }
    ask::<Answer>(qmp, "query-version", json!({}))
        .await
        .map(|answer| answer.qemu)
}

/// `query-name`; `None` for a VM without one.
///
/// # Errors
/// [`Kind::QemuRefused`] in a storage daemon.
pub async fn name(qmp: &Qmp) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Answer {
        name: Option<String>,
    }
    ask::<Answer>(qmp, "query-name", json!({}))
        .await
        .map(|answer| answer.name)
}

/// `query-uuid`; `None` for a VM without one, which QEMU tells as all zeros.
///
/// # Errors
/// [`Kind::QemuRefused`] in a storage daemon.
pub async fn uuid(qmp: &Qmp) -> Result<Option<String>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "UPPERCASE")]
    struct Answer {
        uuid: String,
    }
    let Answer { uuid } = ask(qmp, "query-uuid", json!({})).await?;
    let set = uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-'));
    Ok(set.then_some(uuid))
}

/// `query-status`: the run state.
///
/// # Errors
/// [`Kind::QemuRefused`] in a storage daemon.
pub async fn status(qmp: &Qmp) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Answer {
        status: String,
    }
    ask::<Answer>(qmp, "query-status", json!({}))
        .await
        .map(|answer| Some(answer.status))
}

/// `query-migrate`: what became of the last migration (`active`, `completed`, `failed`, ...).
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn migration(qmp: &Qmp) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Answer {
        status: Option<String>,
    }
    ask::<Answer>(qmp, "query-migrate", json!({}))
        .await
        .map(|answer| answer.status)
}

/// An NBD, FUSE or vhost-user export (QAPI `BlockExportInfo`).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExport {
    /// Its id.
    pub id: String,
    /// `nbd`, `fuse`, `vhost-user-blk`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// The node that it shows.
    #[serde(default)]
    pub node_name: String,
}

/// `query-block-exports`.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn block_exports(qmp: &Qmp) -> Result<Vec<BlockExport>> {
    ask(qmp, "query-block-exports", json!({})).await
}

/// A job (QAPI `JobInfo`).
#[derive(Clone, Debug, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `created`, `running`, ..., `concluded`.
    pub status: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// A job that works on nodes (QAPI `BlockJobInfo`).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJob {
    /// Its id.
    pub device: String,
    /// `running`, `paused`, `pending`, `concluded`, ...
    pub status: String,
    /// It was told to pause; it is `paused` once nothing of it is under way.
    pub paused: bool,
    /// How far it is, in bytes.
    pub offset: u64,
    /// How far it has to go; may grow.
    pub len: u64,
    /// `ok`; `nospace` or `failed` where it has stopped for an error.
    pub io_status: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// `query-block-jobs`.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn block_jobs(qmp: &Qmp) -> Result<Vec<BlockJob>> {
    ask(qmp, "query-block-jobs", json!({})).await
}

/// `query-jobs`.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn jobs(qmp: &Qmp) -> Result<Vec<Job>> {
    ask(qmp, "query-jobs", json!({})).await
}

/// `query-fdsets`: sets of descriptors as (id, what their giver calls them); none in a
/// storage daemon, which takes none.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn fdsets(qmp: &Qmp) -> Result<Vec<(i64, String)>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Set {
        fdset_id: i64,
        fds: Vec<Fd>,
    }
    #[derive(Deserialize)]
    struct Fd {
        opaque: Option<String>,
    }
    let sets: Vec<Set> = match ask(qmp, "query-fdsets", json!({})).await {
        Err(error) if is_unknown_command(&error) => Vec::new(),
        sets => sets?,
    };
    let named = sets.into_iter().map(|set| {
        let opaque = set.fds.into_iter().find_map(|fd| fd.opaque);
        (set.fdset_id, opaque.unwrap_or_default())
    });
    Ok(named.collect())
}

/// Whether QEMU does not know the command: a storage daemon has only some.
#[must_use]
pub fn is_unknown_command(error: &Error) -> bool {
    use std::error::Error as _;
    error
        .source()
        .and_then(|source| source.downcast_ref::<Refusal>())
        .is_some_and(|refusal| refusal.class == "CommandNotFound")
}

/// A dirty bitmap (QAPI `BlockDirtyInfo`).
#[derive(Clone, Debug, Deserialize)]
pub struct DirtyBitmap {
    /// Filters keep bitmaps without a name.
    pub name: Option<String>,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Changes are recorded.
    pub recording: bool,
    /// A job or an export uses it.
    pub busy: bool,
    /// The image stores it.
    pub persistent: bool,
    /// It was not stored in order, and cannot be used.
    #[serde(default)]
    pub inconsistent: bool,
}

/// An image (QAPI `ImageInfo`).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// Bytes that a reader sees.
    pub virtual_size: u64,
    /// Bytes that its file takes, where that is known.
    pub actual_size: Option<u64>,
    /// Bytes of a cluster, of formats that have them.
    pub cluster_size: Option<u64>,
    /// What is special to the format.
    pub format_specific: Option<FormatSpecific>,
}

impl Image {
    /// Whether it keeps its data in another file, as a qcow2 can.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        let special = self.format_specific.as_ref();
        special.is_some_and(|special| !special.data["data-file"].is_null())
    }
}

/// A file as QEMU names it, without what may change around it: options, and the image
/// below, which QEMU tells as `json:{...}` where they are not the image's own.
#[must_use]
pub fn plain_file(name: &str) -> String {
    let Some(Ok(mut options)) = name
        .strip_prefix("json:")
        .map(serde_json::from_str::<serde_json::Value>)
    else {
        return name.to_owned();
    };
    let mut at = &options;
    while at.get("filename").is_none() && at["file"].is_object() {
        at = &at["file"];
    }
    if let Some(file) = at["filename"].as_str() {
        return file.to_owned();
    }
    if let Some(options) = options.as_object_mut() {
        options.remove("backing");
    }
    options.to_string()
}

/// What is special to a format (QAPI `ImageInfoSpecific`).
#[derive(Clone, Debug, Deserialize)]
pub struct FormatSpecific {
    /// The members, by format.
    pub data: serde_json::Value,
}

/// A block node (QAPI `BlockDeviceInfo`).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name; begins with `#` where QEMU made it up.
    #[serde(default)]
    pub node_name: String,
    /// The driver.
    pub drv: String,
    /// Opened read-only.
    pub ro: bool,
    /// Whether this QEMU may use the image, which may be another's after a migration;
    /// told since 10.0.
    pub active: Option<bool>,
    /// What is opened, as QEMU names it.
    pub file: String,
    /// What the node below it is named by, where it has a backing node.
    #[serde(rename = "backing_file")]
    pub backing_file: Option<String>,
    /// The image.
    pub image: Image,
    /// Its dirty bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<DirtyBitmap>,
}

/// `query-named-block-nodes`, without the images below each.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn named_block_nodes(qmp: &Qmp) -> Result<Vec<BlockNode>> {
    ask(qmp, "query-named-block-nodes", json!({"flat": true})).await
}

/// A guest's device (QAPI `BlockInfo`).
#[derive(Clone, Debug, Deserialize)]
pub struct BlockDevice {
    /// The backend's name; empty with `-blockdev`.
    pub device: String,
    /// The device's id, or its path in the object tree.
    pub qdev: Option<String>,
    /// The guest can eject it.
    pub removable: bool,
    /// `ok`, or why the guest stands still: `nospace`, `failed`. Told only of a device that
    /// stops its guest on such errors, rather than pass them on.
    #[serde(rename = "io-status")]
    pub io_status: Option<String>,
    /// What is in it.
    pub inserted: Option<BlockNode>,
}

/// `query-block`: the guest's devices; none in a storage daemon.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn block_devices(qmp: &Qmp) -> Result<Vec<BlockDevice>> {
    ask(qmp, "query-block", json!({})).await
}

/// The path of a device that QEMU tells by its id or path: a bare id may also be that of an
/// iothread or another object.
#[must_use]
pub fn device_path(device: &str) -> String {
    match device.starts_with('/') {
        true => device.to_owned(),
        false => format!("/machine/peripheral/{device}"),
    }
}

/// `qom-get`; `path` is best absolute: a bare id may be several objects.
///
/// # Errors
/// [`Kind::QemuRefused`] where there is no such object or property.
pub async fn property(qmp: &Qmp, path: &str, property: &str) -> Result<serde_json::Value> {
    qmp.execute_raw("qom-get", json!({"path": path, "property": property}))
        .await
}

#[cfg(test)]
mod tests {
    use super::plain_file;

    #[test]
    fn a_file_is_known_whatever_is_said_around_it() {
        let overlay = r#"json:{"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "/b"}}, "driver": "qcow2", "file": {"driver": "file", "filename": "/a"}}"#;
        assert_eq!(plain_file(overlay), "/a");
        assert_eq!(plain_file("/a"), "/a");
        assert_eq!(plain_file("json:{"), "json:{");
        let server = r#"json:{"driver": "raw", "backing": {"x": 1}, "file": {"driver": "nbd", "path": "/s"}}"#;
        assert_eq!(
            plain_file(server),
            r#"{"driver":"raw","file":{"driver":"nbd","path":"/s"}}"#
        );
    }
}
