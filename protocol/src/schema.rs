//! The JSON Schema of every message, made from the types.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use crate::{
    backup, checkpoint, error, event, export, hello, orphan, push, record, restore, scratch, vm,
};

/// The whole of the wire as one JSON document: `$defs` as JSON Schema 2020-12,
/// and per method and notification a reference to its parameters and result.
#[must_use]
pub fn schema() -> Value {
    let mut types = SchemaSettings::draft2020_12().into_generator();
    let mut methods = Map::new();
    {
        let mut method = |name: &str, params: Schema, result: Schema| {
            methods.insert(name.into(), json!({"params": params, "result": result}));
        };
        let g = &mut types;
        method(
            "hello",
            of::<hello::HelloParams>(g),
            of::<hello::HelloResult>(g),
        );
        method("ping", of::<hello::NoParams>(g), of::<hello::PingResult>(g));
        method(
            "cancel",
            of::<hello::CancelParams>(g),
            of::<hello::CancelResult>(g),
        );
        method(
            "shutdown",
            of::<hello::NoParams>(g),
            of::<hello::ShutdownResult>(g),
        );
        method(
            "vm.inspect",
            of::<vm::InspectParams>(g),
            of::<vm::InspectResult>(g),
        );
        method(
            "checkpoint.list",
            of::<checkpoint::ListParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.create",
            of::<checkpoint::CreateParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.delete",
            of::<checkpoint::DeleteParams>(g),
            of::<checkpoint::DeleteResult>(g),
        );
        method(
            "checkpoint.disable",
            of::<checkpoint::ToggleParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.enable",
            of::<checkpoint::ToggleParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.merge",
            of::<checkpoint::MergeParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.redefine",
            of::<checkpoint::RedefineParams>(g),
            of::<checkpoint::DisksResult>(g),
        );
        method(
            "checkpoint.repair",
            of::<checkpoint::RepairParams>(g),
            of::<checkpoint::RepairResult>(g),
        );
        method(
            "backup.estimate",
            of::<backup::EstimateParams>(g),
            of::<backup::EstimateResult>(g),
        );
        method(
            "backup.begin",
            of::<backup::BeginParams>(g),
            of::<backup::BeginResult>(g),
        );
        method(
            "backup.begin_group",
            of::<backup::BeginGroupParams>(g),
            of::<backup::BeginGroupResult>(g),
        );
        method(
            "backup.attach",
            of::<orphan::AttachParams>(g),
            of::<orphan::AttachResult>(g),
        );
        method(
            "reclaim",
            of::<orphan::ReclaimParams>(g),
            of::<orphan::ReclaimResult>(g),
        );
        method(
            "backup.read",
            of::<backup::ReadParams>(g),
            of::<backup::ReadResult>(g),
        );
        method(
            "backup.push",
            of::<push::PushParams>(g),
            of::<push::PushResult>(g),
        );
        method(
            "backup.export",
            of::<export::ExportParams>(g),
            of::<export::ExportResult>(g),
        );
        method(
            "backup.map",
            of::<export::MapParams>(g),
            of::<export::MapResult>(g),
        );
        method(
            "backup.ack",
            of::<backup::AckParams>(g),
            of::<backup::AckResult>(g),
        );
        method(
            "backup.commit",
            of::<backup::CommitParams>(g),
            of::<backup::CommitResult>(g),
        );
        method(
            "backup.abort",
            of::<backup::AbortParams>(g),
            of::<backup::AbortResult>(g),
        );
        method(
            "restore.begin",
            of::<restore::RestoreBeginParams>(g),
            of::<restore::RestoreBeginResult>(g),
        );
        method(
            "restore.write",
            of::<restore::RestoreWriteParams>(g),
            of::<restore::RestoreWriteResult>(g),
        );
        method(
            "restore.finish",
            of::<restore::RestoreParams>(g),
            of::<restore::RestoreFinishResult>(g),
        );
        method(
            "restore.abort",
            of::<restore::RestoreParams>(g),
            of::<backup::AbortResult>(g),
        );
    }
    let notifications = json!({
        "record": of::<event::RecordParams>(&mut types),
        "extents": of::<export::ExtentsParams>(&mut types),
        "progress": of::<event::ProgressParams>(&mut types),
        "vm": of::<event::VmParams>(&mut types),
        "scratch": of::<scratch::ScratchParams>(&mut types),
    });
    let record = of::<record::Record>(&mut types);
    let error = of::<error::WireError>(&mut types);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qemu-fleece protocol",
        "protocol": crate::VERSION,
        "methods": methods,
        "notifications": notifications,
        "record": record,
        "error": error,
        "$defs": types.take_definitions(true),
    })
}

fn of<T: JsonSchema>(types: &mut SchemaGenerator) -> Schema {
    types.subschema_for::<T>()
}
