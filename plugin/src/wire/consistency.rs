//! How a guest is held still, between the wire's words and the engine's.

use std::time::Duration;

use qemu_fleece_engine::qemu::Address;
use qemu_fleece_engine::quiesce::{Consistency, How, Policy, Released};
use qemu_fleece_protocol::consistency as words;
use qemu_fleece_protocol::{Code, WireError};

/// How long file systems may be frozen unless the host says otherwise: as long as Windows
/// lets them be.
const DEADLINE: Duration = Duration::from_secs(10);

/// Between these in milliseconds.
const DEADLINES: std::ops::RangeInclusive<u64> = 100..=60_000;

pub(crate) fn from_consistency(
    wanted: Option<&words::Consistency>,
) -> Result<Consistency, WireError> {
    match wanted {
        None | Some(words::Consistency::Crash {}) => Ok(Consistency::Crash),
        Some(words::Consistency::Pause {}) => Ok(Consistency::Pause),
        Some(words::Consistency::Agent {
            socket,
            policy,
            deadline_ms,
        }) => {
            if deadline_ms.is_some_and(|ms| !DEADLINES.contains(&ms)) {
                let why = format!(
                    "deadline_ms is {} to {}",
                    DEADLINES.start(),
                    DEADLINES.end()
                );
                return Err(WireError::new(Code::InvalidParams, why));
            }
            let address = Address::parse(socket).map_err(|error| super::unchanged(&error))?;
            Ok(Consistency::Agent {
                address,
                policy: match policy {
                    words::Policy::Require => Policy::Require,
                    words::Policy::Try => Policy::Try,
                },
                deadline: deadline_ms.map_or(DEADLINE, Duration::from_millis),
            })
        }
    }
}

/// `None`: nothing was asked for but what each point in time is.
pub(crate) fn to_reached(released: &Released) -> Option<words::Reached> {
    let held = u64::try_from(released.held.as_millis()).unwrap_or(u64::MAX);
    let kind = match released.how {
        How::Crash if released.why_not.is_none() => return None,
        How::Crash => words::ConsistencyKind::Crash,
        How::Agent => words::ConsistencyKind::Agent,
        How::Pause => words::ConsistencyKind::Pause,
    };
    Some(words::Reached {
        kind,
        frozen_ms: (!released.held.is_zero() && kind != words::ConsistencyKind::Pause)
            .then_some(held),
        paused_ms: (kind == words::ConsistencyKind::Pause).then_some(held),
        filesystems: (kind == words::ConsistencyKind::Agent).then_some(released.filesystems),
        reason: released
            .why_not
            .as_ref()
            .map(|error| super::code(error.kind())),
        message: released.why_not.as_ref().map(|error| error.chain()),
    })
}
