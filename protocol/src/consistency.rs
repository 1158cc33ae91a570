//! What a point in time is consistent with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Code;

/// What a point in time is to be consistent with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Consistency {
    /// What is on the disks, as after a loss of power.
    Crash {},
    /// File systems that are frozen by the guest agent, after its hooks for applications.
    Agent {
        /// The agent's socket, in the forms of a monitor's: `unix:/path`, `tcp:host:port`, ...
        socket: String,
        /// What becomes of a backup whose guest cannot be frozen.
        #[serde(default)]
        policy: Policy,
        /// How long file systems may be frozen, and how long the agent may take to answer: 100
        /// to 60000; absent: 10000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
    },
    /// As `crash`; the VM is paused meanwhile.
    Pause {},
}

/// What becomes of a backup whose guest cannot be frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// It fails.
    #[default]
    Require,
    /// It goes on as `crash`, and says why.
    Try,
}

/// What a point in time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConsistencyKind {
    /// Consistent as after a loss of power.
    Crash,
    /// All file systems were frozen.
    Agent,
    /// The VM was paused.
    Pause,
}

/// What a point in time is consistent with, and what that has cost the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reached {
    /// What it is.
    pub kind: ConsistencyKind,
    /// How long file systems were frozen, at most: from before the freeze until after the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// How long the VM was paused, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
    /// `agent`: how many file systems were frozen. 0: the guest has none that can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystems: Option<u64>,
    /// Why it is `crash` although `agent` was tried: what the error would have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Code>,
    /// The reason, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
