//! Descriptors that the host has started the plugin with, for `fd:N`.

use std::collections::BTreeSet;
use std::os::fd::{OwnedFd, RawFd};

use qemu_fleece_protocol::{Code, WireError};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// Those that were open before the plugin opened any of its own: only these may be named.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inherited {
    known: BTreeSet<RawFd>,
}

impl Inherited {
    /// To be called first of all.
    pub(crate) fn at_start() -> std::io::Result<Self> {
        let mut known = BTreeSet::new();
        for entry in std::fs::read_dir("/proc/self/fd")? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.parse::<RawFd>().ok());
            known.extend(number.filter(|number| *number > 2));
        }
        // The one that has just read the directory is among them, and closed by now.
        known.retain(|number| std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok());
        Ok(Self { known })
    }

    /// A copy of descriptor N, where `text` is `fd:N`; `None`: it is something else.
    pub(crate) fn copy(&self, text: &str) -> Result<Option<OwnedFd>, WireError> {
        let Some(number) = text.strip_prefix("fd:") else {
            return Ok(None);
        };
        let invalid = |why: String| WireError::new(Code::InvalidParams, why);
        let number = number.parse::<RawFd>().ok();
        let Some(number) = number.filter(|number| self.known.contains(number)) else {
            return Err(invalid(format!(
                "{text:?} is no descriptor that the plugin was started with"
            )));
        };
        // Of our own process: the only way to a number's descriptor without `unsafe`.
        let copied = pidfd_open(getpid(), PidfdFlags::empty())
            .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()));
        copied
            .map(Some)
            .map_err(|error| invalid(format!("{text:?} cannot be copied: {error}")))
    }
}
