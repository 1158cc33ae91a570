//! What this QEMU can do, by its own account rather than by its version:
//! distributions carry features back.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::qemu::Qmp;

/// The commands of a QEMU, with their arguments (QAPI `SchemaInfo`). It stays the
/// same while that QEMU lives; asking costs some hundred KiB, so ask once.
///
/// Since 0.1.0.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    entities: HashMap<String, Entity>,
}

/// A command or a type; other members of it are ignored.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Entity {
    name: String,
    meta_type: String,
    /// A command's arguments: the name of an object.
    arg_type: Option<String>,
    /// An object's members; an enum has members of the same shape.
    #[serde(default)]
    members: Vec<Member>,
    /// An object's further members, by the value of its tag.
    #[serde(default)]
    variants: Vec<Variant>,
}

#[derive(Clone, Debug, Deserialize)]
struct Member {
    /// An alternate's members have none.
    name: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Variant {
    case: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Schema {
    /// `query-qmp-schema`.
    ///
    /// # Errors
    /// QEMU's, the monitor's.
    pub async fn probe(qmp: &Qmp) -> Result<Self> {
        let answer = qmp.execute_raw("query-qmp-schema", json!({})).await?;
        let entities: Vec<EntityOrOther> = serde_json::from_value(answer).map_err(|error| {
            Error::new(
                Kind::MonitorProtocol,
                "reading the answer to query-qmp-schema",
            )
            .because(error)
        })?;
        let entities = entities.into_iter().filter_map(|entity| match entity {
            EntityOrOther::Entity(entity) => Some((entity.name.clone(), entity)),
            EntityOrOther::Other(_) => None,
        });
        Ok(Self {
            entities: entities.collect(),
        })
    }

    /// Whether there is such a command.
    #[must_use]
    pub fn has_command(&self, command: &str) -> bool {
        self.command(command).is_some()
    }

    /// Whether a command takes such an argument, whatever the others are, as
    /// `blockdev-backup` and `on-cbw-error`.
    #[must_use]
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        self.arguments(command)
            .is_some_and(|arguments| arguments.has_member(argument))
    }

    /// Whether a command whose arguments depend on a tag knows such a value of it,
    /// as `blockdev-add` the driver `snapshot-access`, or `block-export-add` the
    /// type `nbd`.
    #[must_use]
    pub fn has_variant(&self, command: &str, case: &str) -> bool {
        self.variant(command, case).is_some()
    }

    /// [`Schema::has_argument`] of one variant, as `blockdev-add`,
    /// `copy-before-write` and `cbw-timeout`.
    #[must_use]
    pub fn has_variant_argument(&self, command: &str, case: &str, argument: &str) -> bool {
        self.variant(command, case)
            .and_then(|variant| self.entities.get(&variant.kind))
            .is_some_and(|arguments| arguments.has_member(argument))
    }

    fn command(&self, command: &str) -> Option<&Entity> {
        self.entities
            .get(command)
            .filter(|entity| entity.meta_type == "command")
    }

    fn arguments(&self, command: &str) -> Option<&Entity> {
        self.entities.get(self.command(command)?.arg_type.as_ref()?)
    }

    fn variant(&self, command: &str, case: &str) -> Option<&Variant> {
        let mut variants = self.arguments(command)?.variants.iter();
        variants.find(|variant| variant.case == case)
    }
}

/// An entity of a shape that is not known is no reason to know nothing.
#[derive(Deserialize)]
#[serde(untagged)]
enum EntityOrOther {
    Entity(Entity),
    Other(serde::de::IgnoredAny),
}

impl Entity {
    fn has_member(&self, name: &str) -> bool {
        self.members
            .iter()
            .any(|member| member.name.as_deref() == Some(name))
    }
}
