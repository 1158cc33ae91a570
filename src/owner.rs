//! Whose a session is, and whether its process lives.
//!
//! A process is known by the kernel that runs it (`boot`), the namespace that counts it,
//! its number and its start: the four together are never used twice. Whoever shares kernel
//! and namespace with it can tell whether it lives; nobody else can, and must not guess.

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
            started: started(pid).unwrap_or_default(),
        }
    }

    /// Whether it lives.
    #[must_use]
    pub fn life(&self) -> Life {
        let is_seen = !self.boot.is_empty()
            && !self.namespace.is_empty()
            && boot().as_deref() == Some(self.boot.as_str())
            && namespace().as_deref() == Some(self.namespace.as_str());
        match started(self.pid) {
            _ if !is_seen => Life::Elsewhere,
            Some(started) if started == self.started => Life::Alive,
            _ => Life::Dead,
        }
    }
}

fn boot() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

fn namespace() -> Option<String> {
    let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
    link.to_str().map(str::to_owned)
}

/// When a process started; `None`: there is none of that number, or only what is left of
/// one that has ended.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything. Behind it: the state, then numbers.
    let (_, behind) = stat.rsplit_once(')')?;
    let mut fields = behind.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // Field 22 of proc(5); the state is the third.
    fields.nth(18)?.parse().ok()
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
        let owner = Owner {
            pid: child.id(),
            started: started(child.id()).unwrap(),
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
