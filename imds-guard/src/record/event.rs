//! The event schema: documented in `docs/events.md`, published as `docs/events.schema.json`.
//!
//! Fields are only ever added; a change of meaning raises [`SCHEMA_VERSION`].

use std::{net::IpAddr, sync::Arc, time::Duration};

use imds_guard_common::flow::Family;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::{Caller, Imds, Malformed, Mode, Reason, Verdict, caller::Sender};

/// How often the guard says that it is there.
pub const ALIVE: Duration = Duration::from_secs(600);

/// Version of the schema, in every event.
pub const SCHEMA_VERSION: u32 = 1;

/// One line of the event log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Version of this schema.
    pub schema: u32,
    /// When it happened (RFC 3339, UTC, microseconds).
    pub time: String,
    /// Where it happened.
    #[serde(flatten)]
    pub host: Host,
    /// What happened.
    #[serde(flatten)]
    pub kind: Kind,
    /// Its place in a chain of events, if the log is chained.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chain: Option<Chain>,
}

/// The host that an event comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// Its name; on EC2 that of its private address, which several networks can have.
    #[serde(rename = "host")]
    pub name: String,
    /// Id of the EC2 instance, where its firmware tells it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub instance: Option<String>,
}

impl From<&str> for Host {
    fn from(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            instance: None,
        }
    }
}

/// The place of an event in a chain, which shows what was altered, taken out or moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Chain {
    /// Its number, one more than that of the line before.
    pub seq: u64,
    /// SHA-256 of the line before, without its line end; zeros for the first.
    pub prev: String,
}

/// What happened, named by the field `event`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Kind {
    /// A request was judged.
    Request(Box<Request>),
    /// A connection was closed before any request was read.
    ConnectionRefused(RefusedConnection),
    /// A packet for a metadata endpoint went around the redirect.
    Packet(Packet),
    /// Events were lost because they came faster than they could be written.
    EventsLost {
        /// How many, since the last event before this one.
        count: u64,
    },
    /// What is in force was changed, or was to be.
    Policy(PolicyChange),
    /// A rule's time is over.
    RuleExpired(RuleExpired),
    /// The guard is there. Comes every [`ALIVE`], so that a log without requests shows whether nobody
    /// called or nobody watched.
    Alive(Stopped),
    /// The guard began to watch.
    Started(Started),
    /// The guard ceased to watch.
    Stopped(Stopped),
}

/// One request, what became of it, and who made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Request {
    /// What became of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// What was wrong with it, if it could not be judged.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub malformed: Option<Malformed>,
    /// The rule that applied to the caller, if one did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rule: Option<String>,
    /// The mode that was in force.
    pub mode: Mode,
    /// IMDSv1, IMDSv2, or a request for a session token; missing if it could not be judged.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub imds: Option<Imds>,
    /// IMDSv1 that the same process asks for within a minute after its request for a session token was
    /// refused: it would have spoken IMDSv2.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub fallback: bool,
    /// The HTTP method.
    pub method: String,
    /// The path as sent, without its query; cut at 512 bytes.
    pub path: String,
    /// What the client says it is; cut at 256 bytes. It can say anything.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user_agent: Option<String>,
    /// The HTTP status of the answer; for one that was never given, what it would have been.
    pub status: u16,
    /// Who gave it.
    pub answered_by: AnsweredBy,
    /// Why the metadata service did not answer; the client got 502 or 504.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub upstream_failure: Option<UpstreamFailure>,
    /// Which metadata address the client asked for.
    pub endpoint: Endpoint,
    /// Network hops between the caller and the guard.
    pub hops: u8,
    /// Who asked.
    pub caller: Arc<Caller>,
    /// How long it took.
    pub latency_us: Latency,
    /// Calls that this line stands for in place of lines of their own; without it, it is one call.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub folded: Option<Folded>,
}

impl Request {
    /// How many calls this line stands for.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.folded.as_ref().map_or(1, |folded| folded.count)
    }
}

/// Calls like an earlier one: of the same process, and alike in all but their latency, which is that of
/// the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Folded {
    /// How many, beside the one that has a line of its own.
    pub count: u64,
    /// When the first of them was made (RFC 3339, UTC).
    pub first: String,
    /// When the last of them was made.
    pub last: String,
}

/// Who answered a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AnsweredBy {
    /// The metadata service.
    Service,
    /// The guard itself.
    Guard,
    /// Nobody, as on EC2 beyond the hop limit.
    Nobody,
}

/// Why the metadata service did not answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpstreamFailure {
    /// What kind of failure.
    pub kind: UpstreamFailureKind,
    /// The error in words.
    pub message: String,
}

/// The kind of an upstream failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamFailureKind {
    /// No connection could be made (502).
    Unreachable,
    /// It took too long (504).
    TimedOut,
    /// The answer was cut off, too large or not HTTP (502).
    Broken,
}

/// The form of the metadata address that a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `169.254.169.254`.
    Ipv4,
    /// `fd00:ec2::254`.
    Ipv6,
    /// `::ffff:169.254.169.254`.
    Ipv4Mapped,
}

impl Endpoint {
    /// As in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::Ipv4Mapped => "ipv4_mapped",
        }
    }
}

impl From<Family> for Endpoint {
    fn from(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::Ipv4,
            Family::Ipv6 => Self::Ipv6,
            Family::Ipv4Mapped => Self::Ipv4Mapped,
        }
    }
}

/// Microseconds, by who took them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Latency {
    /// In the guard: naming the caller (on the first request of a connection), reading the
    /// request's body, judging.
    pub guard: u64,
    /// Waiting for the metadata service.
    pub upstream: u64,
}

/// A connection that no caller was published for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RefusedConnection {
    /// Why.
    pub reason: ConnectionRefusal,
    /// Where it came from: address and port.
    pub peer: String,
    /// Who made it, if that is known: process id, user and name, as in a caller.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pid: Option<u32>,
    /// See `pid`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub uid: Option<u32>,
    /// See `pid`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub comm: Option<String>,
}

/// Why a connection was closed before any request was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConnectionRefusal {
    /// It came to the listener itself, not to a metadata address; from this host, or from another one.
    NotRedirected,
    /// The kernel has not kept its first packet, which tells who made it: more connections were half
    /// open than it could remember.
    NoSyn,
    /// Its caller, or its network namespace, has too many already.
    TooMany,
}

impl ConnectionRefusal {
    /// As in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::NoSyn => "no_syn",
            Self::TooMany => "too_many",
        }
    }
}

/// A packet for a metadata endpoint that is not the guard's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Packet {
    /// `deny`: dropped; `audit`: let pass, though enforce mode would have dropped it.
    pub verdict: Verdict,
    /// Which layer saw it.
    pub layer: Layer,
    /// The protocol: `tcp`, `udp` and so on, or its number.
    pub protocol: String,
    /// Which metadata address it was for: `ipv4` or `ipv6`.
    pub endpoint: Endpoint,
    /// Its source address.
    pub source: IpAddr,
    /// Its source port, if it shows.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source_port: Option<u16>,
    /// Its time to live (IPv6: hop limit).
    pub ttl: u8,
    /// The interface through which it was to leave.
    pub interface: String,
    /// The interface through which it had come; missing if this host made it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub came_from: Option<String>,
    /// Who sent it, if a socket of this host did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sender: Option<Sender>,
    /// Packets that this layer saw since the last one before, and that are not reported one by one.
    pub unreported: u64,
}

/// Which layer stopped a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// In the cgroup of the socket that sent it.
    Backstop,
    /// On an uplink of the host.
    Perimeter,
}

/// How the guard was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Started {
    /// Version of imds-guard.
    pub version: String,
    /// The mode.
    pub mode: Mode,
    /// The cgroup whose processes are watched.
    pub cgroup: String,
    /// The listener's addresses.
    pub listeners: Vec<String>,
    /// What happens while the guard is not there: `closed` or `open`.
    pub on_failure: String,
    /// Whether the backstop judges packets.
    pub backstop: bool,
    /// The uplinks that the perimeter guards.
    pub uplinks: Vec<String>,
    /// Whether the kernel programs were there already: an earlier guard had left them, and they have
    /// counted what happened without one.
    #[serde(default)]
    pub adopted: bool,
    /// What they had counted by then.
    #[serde(default)]
    pub counts: Counts,
    /// The guard that it took over from while that was still running, by process id.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub took_over_from: Option<u32>,
}

/// What the guard was told not to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unwatched {
    /// Processes outside of the cgroup that it was given.
    OtherCgroups,
    /// Packets that go around the redirect (`backstop`).
    Backstop,
    /// Packets that leave through an uplink, as those of virtual machines (`perimeter`).
    Perimeter,
}

/// What is in force from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PolicyChange {
    /// What was done.
    pub change: Change,
    /// Who did it; missing where nobody did, but a file was changed, or time has passed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub by: Option<By>,
    /// The mode, from now on.
    pub mode: Mode,
    /// Until when (RFC 3339, UTC), if it returns by itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until: Option<String>,
    /// How many rules there are.
    pub rules: usize,
    /// What was wrong with a configuration that was not taken.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Keys that were changed, but take effect only when the guard is started again.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub needs_restart: Vec<String>,
}

/// What was done to the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The configuration was read again.
    Reloaded,
    /// The configuration was read again and is invalid: what was in force before still is.
    Rejected,
    /// The mode was switched.
    Mode,
    /// The mode is as configured again.
    ModeReturned,
}

/// Who used the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct By {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Name of the user who logged in, where another one has become root since (sudo, su).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub login: Option<String>,
}

/// A rule that matches nobody any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuleExpired {
    /// Its name.
    pub rule: String,
    /// Who answers for it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub owner: Option<String>,
    /// Until when it was to hold, as it was written.
    pub expires: String,
}

/// What has happened while the guard was running.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stopped {
    /// What the kernel programs did.
    #[serde(flatten)]
    pub counts: Counts,
    /// Events lost over the whole run.
    pub events_lost: u64,
    /// Its process id.
    #[serde(default)]
    pub pid: u32,
    /// What it does not watch; empty on a host that is wholly watched.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub unwatched: Vec<Unwatched>,
}

/// What the kernel programs did since they were first attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Counts {
    /// Connections turned to the guard.
    pub redirected: u64,
    /// The guard's own connections to the metadata service.
    pub exempt: u64,
    /// Connections refused in the kernel because they could not be served: no memory to remember
    /// their caller, no listener for IPv6, or a socket bound to an interface (enforce).
    pub refused: u64,
    /// Connections that went past the guard for the same reasons (audit).
    pub bypassed: u64,
    /// Connections whose caller could not be handed to the guard, and that it refused.
    pub publish_failed: u64,
    /// Connections refused while no guard was there (`--on-failure closed`).
    pub unattended_refused: u64,
    /// Connections that went past while no guard was there (`--on-failure open`).
    pub unattended_bypassed: u64,
    /// Packets that backstop and perimeter dropped.
    pub packets_dropped: u64,
    /// Packets that backstop and perimeter would have dropped in enforce mode.
    pub packets_passed: u64,
}

impl Kind {
    /// The value of the field `event`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Request(_) => "request",
            Self::ConnectionRefused(_) => "connection_refused",
            Self::Packet(_) => "packet",
            Self::EventsLost { .. } => "events_lost",
            Self::Policy(_) => "policy",
            Self::RuleExpired(_) => "rule_expired",
            Self::Alive(_) => "alive",
            Self::Started(_) => "started",
            Self::Stopped(_) => "stopped",
        }
    }
}

impl Event {
    /// An event of now.
    #[must_use]
    pub fn now(host: &Host, kind: Kind) -> Self {
        Self {
            schema: SCHEMA_VERSION,
            time: format!("{:.6}", Timestamp::now()),
            host: host.clone(),
            kind,
            chain: None,
        }
    }

    /// How many calls it stands for; 1 if it is no request.
    #[must_use]
    pub fn calls(&self) -> u64 {
        match &self.kind {
            Kind::Request(request) => request.calls(),
            _ => 1,
        }
    }

    /// The JSON Schema of an event.
    #[must_use]
    pub fn json_schema() -> schemars::Schema {
        schemars::schema_for!(Self)
    }
}
