//! Where a session token is valid.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Caller, Mode};

/// How widely a session token may be used. The service itself takes a token from anybody on the
/// instance. Each is narrower than the one before.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Binding {
    /// Anywhere: tokens are handed out as the service gives them.
    Off,
    /// In the network namespace that it was issued in.
    Netns,
    /// In the container that it was issued in, and there in the same network namespace; outside of
    /// containers in the network namespace.
    Container,
    /// In the cgroup that it was issued in.
    Cgroup,
}

impl Binding {
    /// In audit mode nobody notices that the guard is there, or that it leaves.
    #[must_use]
    pub const fn of(mode: Mode) -> Self {
        match mode {
            Mode::Audit => Self::Off,
            Mode::Enforce => Self::Container,
        }
    }

    /// What a caller shares with those that can use its token; `None` if that is everybody.
    #[must_use]
    pub fn scope(self, caller: &Caller) -> Option<String> {
        let netns = caller.netns_cookie;
        match self {
            Self::Off => None,
            Self::Netns => Some(format!("netns {netns}")),
            Self::Container => Some(match &caller.container_id {
                Some(id) => format!("container {id} netns {netns}"),
                None => format!("netns {netns}"),
            }),
            Self::Cgroup => Some(format!("cgroup {} netns {netns}", caller.cgroup_id)),
        }
    }
}
