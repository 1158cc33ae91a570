//! The test guest's agent: obeys one line at a time from a control channel.
//!
//! Each line gets exactly one answer, `ok …` or `error …`, when it is done. The commands
//! are in `tests/README.md`.

mod disk;
mod pattern;
mod writer;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::process::Command;

use writer::{Plan, Writer};

fn main() -> io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or("/dev/ttyS1".into());
    let channel = OpenOptions::new().read(true).write(true).open(path)?;
    let mut answers = &channel;
    let mut agent = Agent::default();
    answers.write_all(b"ready\n")?;
    for line in BufReader::new(&channel).lines() {
        let answer = match agent.obey(&line?) {
            Ok(text) if text.is_empty() => "ok".into(),
            Ok(text) => format!("ok {text}"),
            Err(error) => format!("error {error}"),
        };
        // One line, whatever a program has printed.
        answers.write_all((answer.replace('\n', "\\n") + "\n").as_bytes())?;
    }
    Ok(())
}

#[derive(Default)]
struct Agent {
    writers: BTreeMap<String, Writer>,
}

impl Agent {
    fn obey(&mut self, line: &str) -> io::Result<String> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let args: Vec<&str> = rest.split_whitespace().collect();
        match (command, args.as_slice()) {
            ("ping", []) => done(Ok(())),
            ("disks", []) => list_disks(),
            ("write", [target, offset, length, seed]) => done(disk::write(
                &disk::open(target)?,
                number(offset)?,
                number(length)?,
                number(seed)?,
            )),
            ("check", [target, offset, length, seed]) => done(disk::check(
                &disk::open(target)?,
                number(offset)?,
                number(length)?,
                number(seed)?,
            )),
            ("zero", [target, offset, length]) => done(disk::zero(
                &disk::open(target)?,
                number(offset)?,
                number(length)?,
            )),
            ("zeroout", [target, offset, length]) => done(disk::zeroout(
                &disk::open(target)?,
                number(offset)?,
                number(length)?,
            )),
            ("discard", [target, offset, length]) => done(disk::discard(
                &disk::open(target)?,
                number(offset)?,
                number(length)?,
            )),
            ("mkfs", [target]) => run(&["mke2fs", "-q", "-F", "-t", "ext4", &disk::path(target)?]),
            ("mount", [target, folder]) => {
                std::fs::create_dir_all(folder)?;
                run(&["mount", "-t", "ext4", &disk::path(target)?, folder])
            }
            ("umount", [folder]) => run(&["umount", folder]),
            ("sync", []) => run(&["sync"]),
            ("start", [name, target, options @ ..]) => {
                self.start(name, Plan::random(target, options)?)
            }
            ("count", [name, targets @ ..]) if !targets.is_empty() => {
                self.start(name, Plan::count(targets)?)
            }
            ("stat", [name]) => self.writer(name)?.report(),
            ("stop", [name]) => {
                let report = self.writer(name)?.stop();
                self.writers.remove(*name);
                report
            }
            ("sh", _) => run(&["sh", "-c", rest]),
            // The answer could not leave any more afterwards: the power goes a moment later.
            ("poweroff", []) => run(&[
                "sh",
                "-c",
                "sync; (sleep 0.1; poweroff -f) >/dev/null 2>&1 &",
            ]),
            _ => Err(io::Error::other(format!("not a command: {line}"))),
        }
    }

    fn start(&mut self, name: &str, plan: Plan) -> io::Result<String> {
        if self.writers.contains_key(name) {
            return Err(io::Error::other(format!("a writer {name} is at work")));
        }
        self.writers.insert(name.into(), Writer::start(plan));
        Ok(String::new())
    }

    fn writer(&mut self, name: &str) -> io::Result<&mut Writer> {
        self.writers
            .get_mut(name)
            .ok_or_else(|| io::Error::other(format!("no writer {name}")))
    }
}

fn done(result: io::Result<()>) -> io::Result<String> {
    result.map(|()| String::new())
}

/// A number with an optional binary unit: `512`, `64K`, `16M`, `1G`.
fn number(text: &str) -> io::Result<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value: u64 = digits
        .parse()
        .map_err(|_| io::Error::other(format!("not a number: {text}")))?;
    Ok(value << shift)
}

fn list_disks() -> io::Result<String> {
    let mut words = Vec::new();
    for (serial, path) in disk::all()? {
        words.push(format!(
            "{serial}={path}:{}",
            disk::size(&disk::open(&path)?)?
        ));
    }
    Ok(words.join(" "))
}

/// Runs a program, which finds each disk's device in a variable named like the disk.
fn run(words: &[&str]) -> io::Result<String> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .envs(disk::all()?)
        .output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).trim().to_string();
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
    if output.status.success() {
        Ok(stdout)
    } else {
        Err(io::Error::other(format!(
            "{}: {stderr} {stdout}",
            output.status
        )))
    }
}
