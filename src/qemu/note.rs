//! Notes: texts that QEMU keeps for us as long as it lives, and tells whoever asks.
//!
//! Each is an object of QEMU's type `secret`, which holds any text under an id and gives it
//! back (`qom-get` of its `data`), in qemu-system and in the storage daemon alike. There is
//! nothing secret in ours. So what has to be known of a session is where its objects are:
//! no file can be lost, or tell of a QEMU that is gone.

use serde::Deserialize;
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::qemu::{Qmp, Refusal};

/// Longest note that is believed: a session of 256 disks has some 200 KiB.
pub const MAX_NOTE_BYTES: usize = 4 * 1024 * 1024;

/// Writes a new note.
///
/// # Errors
/// QEMU's, also where one of that id is there; the monitor's.
pub async fn add(qmp: &Qmp, id: &str, text: &str) -> Result<()> {
    let note = json!({"qom-type": "secret", "id": id, "data": text});
    qmp.execute_raw("object-add", note).await.map(drop)
}

/// Writes a note anew.
///
/// # Errors
/// QEMU's, also where it is not there; the monitor's.
pub async fn change(qmp: &Qmp, id: &str, text: &str) -> Result<()> {
    let set = json!({"path": path(id), "property": "data", "value": text});
    qmp.execute_raw("qom-set", set).await.map(drop)
}

/// Reads a note; `None`: it is not there.
///
/// # Errors
/// [`Kind::MonitorProtocol`] for one that is no text, or longer than
/// [`MAX_NOTE_BYTES`]; the monitor's.
pub async fn read(qmp: &Qmp, id: &str) -> Result<Option<String>> {
    let get = json!({"path": path(id), "property": "data"});
    let unusable = |why: &'static str| {
        Err(Error::new(Kind::MonitorProtocol, format!("reading note {id}")).because(why))
    };
    match qmp.execute_raw("qom-get", get).await {
        Ok(serde_json::Value::String(text)) if text.len() <= MAX_NOTE_BYTES => Ok(Some(text)),
        Ok(serde_json::Value::String(_)) => unusable("it is too long"),
        Ok(_) => unusable("it is no text"),
        Err(error) if error.kind() == Kind::QemuRefused => Ok(None),
        Err(error) => Err(error),
    }
}

/// The ids of all objects that users have made in QEMU, notes among them.
///
/// # Errors
/// QEMU's, the monitor's.
pub async fn ids(qmp: &Qmp) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Property {
        name: String,
    }
    let listed = qmp
        .execute_raw("qom-list", json!({"path": "/objects"}))
        .await;
    let listed = match listed {
        // A storage daemon has no place for objects as long as there are none.
        Err(error) if is_not_found(&error) => return Ok(Vec::new()),
        listed => listed?,
    };
    let listed: Vec<Property> = serde_json::from_value(listed).map_err(|error| {
        Error::new(Kind::MonitorProtocol, "reading the answer to qom-list").because(error)
    })?;
    Ok(listed.into_iter().map(|property| property.name).collect())
}

fn is_not_found(error: &Error) -> bool {
    use std::error::Error as _;
    error
        .source()
        .and_then(|source| source.downcast_ref::<Refusal>())
        .is_some_and(|refusal| refusal.class == "DeviceNotFound")
}

fn path(id: &str) -> String {
    format!("/objects/{id}")
}
