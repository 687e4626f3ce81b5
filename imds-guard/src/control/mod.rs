//! The control socket: how the guard is asked and told while it runs, see `docs/control-api.md`.
//!
//! One line of JSON asks, one line answers, over a Unix socket that only root can open.

mod client;
mod explain;
mod server;

use std::{collections::BTreeMap, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub use client::Client;
pub use explain::{Question, explain};
pub use server::{Desk, Server};

use crate::{
    policy::{Mode, RuleAction},
    record::{By, ByVersion, Counts, Totals},
};

/// Version of the protocol, in every line. Fields are only ever added; a change of meaning raises it.
pub const VERSION: u32 = 1;
/// Name of the socket, beside the keys of session tokens.
pub const SOCKET: &str = "control.sock";
/// Longest line that asks, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

/// A line that asks.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Call {
    /// Version of the protocol.
    pub v: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What can be asked, named by the field `do`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// What is in force, and what has happened: a [`Status`].
    Status,
    /// Events as they happen: an empty object, and then each event as a line of its own until the
    /// caller hangs up. `{"missed": N}` stands for events that came too fast.
    Events,
    /// Reads the configuration again: a [`Changed`].
    Reload,
    /// Switches the mode: a [`Changed`].
    Mode {
        /// The mode; without it, the one that is configured.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        mode: Option<Mode>,
        /// For so long; without it, until the guard ends.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        for_seconds: Option<u64>,
    },
    /// How a request would be judged: an [`Explanation`](crate::policy::Explanation).
    Explain(Box<Question>),
    /// Finishes what was begun, and ends, as on SIGTERM: an empty object.
    Drain,
}

/// A line that answers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Reply {
    /// Version of the protocol.
    pub v: u32,
    /// The answer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ok: Option<serde_json::Value>,
    /// Why there is none, in words.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// What is in force, and what has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Version of imds-guard.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// For how long it has been there.
    pub uptime_seconds: u64,
    /// The mode that is in force.
    pub mode: Mode,
    /// What the configuration says.
    #[serde(flatten)]
    pub standing: Standing,
    /// The rules, in their order.
    pub rules: Vec<RuleStatus>,
    /// Callers of the last hour.
    pub callers: BTreeMap<String, ByVersion>,
    /// Numbers since the guard was started.
    pub totals: Totals,
    /// What the kernel programs have counted since they were first attached.
    pub counts: Counts,
    /// Events lost since the guard was started: those that came too fast for all outputs, and those that
    /// the event log could not take.
    pub events_lost: u64,
    /// Events that one output has lost by itself, by the key that names it.
    #[serde(default)]
    pub lost_by_output: BTreeMap<String, u64>,
    /// Old files of events that were removed to make room, by the same keys.
    #[serde(default)]
    pub removed_by_output: BTreeMap<String, RemovedFiles>,
}

/// Files of events that were removed since the guard was started, as all would be too large, or the
/// disk was full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemovedFiles {
    /// How many.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// What the configuration says, as far as it is not in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Standing {
    /// The mode that is configured.
    pub configured_mode: Mode,
    /// Until when another one is in force (RFC 3339, UTC); missing if there is none, or no end.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mode_until: Option<String>,
    /// The files that were read.
    pub files: Vec<String>,
    /// What was wrong when they were last read; what is in force is from before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rejected: Option<String>,
    /// Keys that were changed, but take effect only when the guard is started again.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub needs_restart: Vec<String>,
    /// The file that events are written to; missing if that is standard output.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub events: Option<String>,
}

/// A rule, and how often it has matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuleStatus {
    /// Its name.
    pub name: String,
    /// What it does; missing if it leaves that to the mode.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub action: Option<RuleAction>,
    /// Who answers for it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub owner: Option<String>,
    /// Until when it holds, as written.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<String>,
    /// Whether that is over.
    pub expired: bool,
    /// Requests that it has decided since the guard was started.
    pub hits: u64,
}

/// What is in force after a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// The mode.
    pub mode: Mode,
    /// Until when (RFC 3339, UTC), if it returns by itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until: Option<String>,
    /// How many rules there are.
    pub rules: usize,
    /// Keys that were changed, but take effect only when the guard is started again.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub needs_restart: Vec<String>,
}

/// What the main loop is to do.
pub struct Order {
    /// What.
    pub what: What,
    /// Who wants it.
    pub by: By,
    /// Where the outcome goes.
    pub reply: oneshot::Sender<Result<serde_json::Value, String>>,
}

/// What the main loop can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Read the configuration again.
    Reload,
    /// Switch the mode, or return to the one that is configured.
    Mode(Option<Mode>, Option<Duration>),
    /// End.
    Drain,
}
