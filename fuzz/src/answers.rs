//! What a monitor answers to our questions, and what is made of it: disks, their images and
//! checkpoints, and the sessions that others have left, as their notes tell of them.
//!
//! An input is lines `COMMAND JSON`: each time that a command comes its next line is the
//! answer, or its last; a command without one is not known.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use qemu_fleece_engine::chain::{self, Scope};
use qemu_fleece_engine::qemu::discover::{Disk, Reason};
use qemu_fleece_engine::qemu::{Qmp, Schema, query, step};
use qemu_fleece_engine::{inspect, reclaim, saved};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

use super::peer::block_on;

/// Bytes between the two.
const PIPE: usize = 64 * 1024;

/// Never reached: each command is answered.
const DEADLINE: Duration = Duration::from_secs(60);

/// Names of disks are such as a host can use; two disks have none in common; what is told of a
/// checkpoint is what its bitmaps say; a session that is found removes nothing but its own.
pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    block_on(async {
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let answers = Answers::new(text);
        let qemu = tokio::spawn(answers.give(theirs));
        if let Ok(qmp) = Qmp::over(ours, DEADLINE).await {
            look(&qmp).await;
        }
        qemu.abort();
    });
}

async fn look(qmp: &Qmp) {
    if let Ok(vm) = inspect::inspect(qmp).await {
        disks_are_sane(&vm.disks);
        assert!(
            vm.our_objects
                .iter()
                .all(|name| name.contains(step::PREFIX))
        );
    }
    for found in reclaim::sessions(qmp).await.unwrap_or_default() {
        removes_its_own(&found);
    }
    let _told = query::block_jobs(qmp).await;
    let _told = query::package(qmp).await;
    if let Ok(schema) = Schema::probe(qmp).await {
        let _told = schema.has_argument("blockdev-backup", "discard-source");
    }
}

fn disks_are_sane(disks: &[Disk]) {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let mut names = HashSet::new();
    for disk in disks {
        assert!(
            !disk.id.is_empty() && disk.id.bytes().all(legal),
            "{:?}",
            disk.id
        );
        let is_alone = names.insert(&disk.id) || disk.excluded == Some(Reason::AmbiguousId);
        assert!(is_alone, "two disks are {}", disk.id);
        for found in chain::checkpoints(disk) {
            let name = found.checkpoint.bitmap();
            assert!(found.parts.iter().all(|part| part.bitmap.name == name));
            assert!(!found.parts.is_empty());
            assert!(
                found
                    .dirty_bytes(disk)
                    .is_none_or(|dirty| dirty <= disk.size)
            );
        }
    }
    let told = chain::list(disks, &Scope::default());
    assert_eq!(told.len(), disks.len());
}

fn removes_its_own(found: &reclaim::Found) {
    if let Some(deed) = &found.deed {
        let text = saved::to_text(deed).expect("it was JSON");
        assert_eq!(saved::deed(&text).as_ref(), Some(deed));
    }
    let session = format!("{}{}", step::PREFIX, found.id);
    for path in found.removes() {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let is_partial = name.starts_with(".qf-") && name.ends_with(".partial");
        let is_ours = name == session || name == format!("{session}-nbd");
        assert!(
            path.is_absolute() && (is_partial || is_ours),
            "{}",
            path.display()
        );
    }
}

/// A QEMU that answers by heart.
struct Answers {
    lines: HashMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Command {
    execute: String,
    id: u64,
}

impl Answers {
    fn new(text: &str) -> Self {
        let mut lines: HashMap<String, Vec<String>> = HashMap::new();
        for (command, answer) in text.lines().filter_map(|line| line.split_once(' ')) {
            lines
                .entry(command.to_owned())
                .or_default()
                .push(answer.to_owned());
        }
        // They are taken from the end.
        lines.values_mut().for_each(|answers| answers.reverse());
        Self { lines }
    }

    fn next(&mut self, command: &Command) -> String {
        let id = command.id;
        let Some(answers) = self.lines.get_mut(&command.execute) else {
            let known = matches!(command.execute.as_str(), "qmp_capabilities");
            let returned = r#""return": {}"#;
            let refused = r#""error": {"class": "CommandNotFound", "desc": "not known"}"#;
            return format!(
                "{{{}, \"id\": {id}}}\n",
                if known { returned } else { refused }
            );
        };
        let answer = if answers.len() > 1 {
            answers.pop()
        } else {
            answers.last().cloned()
        };
        format!(
            "{{\"id\": {id}, \"return\": {}}}\n",
            answer.unwrap_or_default()
        )
    }

    async fn give(mut self, stream: DuplexStream) -> std::io::Result<()> {
        let (reader, mut writer) = tokio::io::split(stream);
        writer.write_all(b"{\"QMP\": {}}\n").await?;
        let mut commands = BufReader::new(reader).lines();
        while let Some(line) = commands.next_line().await? {
            let command: Command = serde_json::from_str(&line)?;
            writer.write_all(self.next(&command).as_bytes()).await?;
        }
        Ok(())
    }
}
