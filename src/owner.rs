//! Whose a session is, and whether its process lives.
//!
//! A process is known by the kernel that runs it (`boot`), the namespace that counts it,
//! its number and its start: the four together are never used twice. Whoever shares kernel
//! and namespace with it can tell whether it lives, unless `/proc` hides others' processes;
//! nobody else can, and must not guess.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The kernel's boot id.
    boot: String,
    /// The PID namespace.
    namespace: String,
    /// The process, in that namespace.
    pid: u32,
    /// When it started, in the kernel's ticks since boot.
    started: u64,
}

/// What is known of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Alive,
    /// It has ended.
    Dead,
    /// It runs, or ran, where it cannot be seen from here.
    Elsewhere,
}

impl Owner {
    /// This process. Where the kernel does not tell (no `/proc`), it is one that nobody can
    /// see: its sessions are never taken for dead.
    #[must_use]
    pub fn here() -> Self {
        let pid = std::process::id();
        Self {
            boot: boot().unwrap_or_default(),
            namespace: namespace().unwrap_or_default(),
            pid,
            started: match look(pid) {
                Seen::Runs(since) => since,
                Seen::Ended | Seen::Nothing => 0,
            },
        }
    }

    /// Whether it lives.
    #[must_use]
    pub fn life(&self) -> Life {
        let is_seen = !self.boot.is_empty()
            && !self.namespace.is_empty()
            && boot().as_deref() == Some(self.boot.as_str())
            && namespace().as_deref() == Some(self.namespace.as_str());
        if !is_seen {
            return Life::Elsewhere;
        }
        // First, so that one that ends in between is seen as it is.
        let seen = look(self.pid);
        judge(seen, self.started, || is_there(self.pid))
    }
}

/// What `/proc` tells of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// When it started.
    Runs(u64),
    /// Only what is left of one that has ended.
    Ended,
    /// Nothing: there is none, or it is hidden (`hidepid`, systemd's `ProtectProc`).
    Nothing,
}

/// Whether the process that started then lives; `is_there`: whether the kernel has one of its
/// number, which may be another one.
fn judge(seen: Seen, started: u64, is_there: impl FnOnce() -> bool) -> Life {
    match seen {
        Seen::Runs(since) if since == started => Life::Alive,
        Seen::Nothing if is_there() => Life::Elsewhere,
        Seen::Runs(_) | Seen::Ended | Seen::Nothing => Life::Dead,
    }
}

/// Whether the kernel has a process of that number, of whichever user.
fn is_there(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

fn boot() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

fn namespace() -> Option<String> {
    let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
    link.to_str().map(str::to_owned)
}

fn look(pid: u32) -> Seen {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.ok()
        .and_then(|stat| parse(&stat))
        .unwrap_or(Seen::Nothing)
}

fn parse(stat: &str) -> Option<Seen> {
    // The name, in parentheses, may hold anything. Behind it: the state, then numbers.
    let (_, behind) = stat.rsplit_once(')')?;
    let mut fields = behind.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return Some(Seen::Ended);
    }
    // Field 22 of proc(5); the state is the third.
    fields.nth(18)?.parse().ok().map(Seen::Runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_another_start_of_it_does_not() {
        let here = Owner::here();
        assert_eq!(here.life(), Life::Alive);
        let before = Owner {
            started: here.started - 1,
            ..here.clone()
        };
        assert_eq!(before.life(), Life::Dead);
    }

    #[test]
    fn a_child_that_has_ended_is_dead_before_and_after_it_is_awaited() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let Seen::Runs(started) = look(child.id()) else {
            panic!("it runs");
        };
        let owner = Owner {
            pid: child.id(),
            started,
            ..Owner::here()
        };
        assert_eq!(owner.life(), Life::Alive);
        drop(child.stdin.take());
        // Not awaited yet: a zombie once it has ended.
        let ended = rustix::process::waitid(
            rustix::process::WaitId::Pid(rustix::process::Pid::from_child(&child)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        );
        ended.unwrap();
        assert_eq!(owner.life(), Life::Dead);
        child.wait().unwrap();
        assert_eq!(owner.life(), Life::Dead);
    }

    #[test]
    fn one_that_is_hidden_is_not_dead() {
        let there = || true;
        assert_eq!(judge(Seen::Nothing, 7, there), Life::Elsewhere);
        assert_eq!(judge(Seen::Nothing, 7, || false), Life::Dead);
        assert_eq!(judge(Seen::Runs(7), 7, there), Life::Alive);
        // Its number is another one's.
        assert_eq!(judge(Seen::Runs(8), 7, there), Life::Dead);
        assert_eq!(judge(Seen::Ended, 7, there), Life::Dead);
        assert_eq!(parse("1 (a) b) S 1"), None);
    }

    #[test]
    fn the_kernel_tells_who_is_there_also_of_others() {
        for (pid, there) in [
            (std::process::id(), true),
            (1, true),
            (0, false),
            (u32::MAX, false),
        ] {
            assert_eq!(is_there(pid), there, "{pid}");
        }
    }

    #[test]
    fn nobody_can_tell_of_another_kernel_or_namespace() {
        for owner in [
            Owner {
                boot: "other".into(),
                ..Owner::here()
            },
            Owner {
                namespace: "pid:[1]".into(),
                ..Owner::here()
            },
            Owner {
                boot: String::new(),
                ..Owner::here()
            },
        ] {
            assert_eq!(owner.life(), Life::Elsewhere);
        }
    }
}
