//! What the guard is told to do: by files, the environment and the command line.

mod example;
mod files;
mod keys;
mod layers;
mod outputs;
mod place;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    path::PathBuf,
    time::Duration,
};

use clap::ValueEnum;
use imds_guard_common::control;

pub use example::{example, schema};
pub use files::{CONFIG_FILE, drop_ins};
pub use keys::{KernelLog, Keys};
pub use layers::{Configuration, Layers, Origin};
pub use outputs::{MetricsAt, OutputSettings};
pub use place::{Place, Wrong};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    identify::{CommandLines, workload},
    policy::{Mode, Policy},
};

/// The metadata service's IPv4 address (EC2 User Guide, "Access instance metadata").
pub const IMDS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The metadata service's IPv6 address, on instances where it is enabled.
pub const IMDS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The metadata service's port.
pub const IMDS_PORT: u16 = 80;
/// The guard's own link-local IPv4 address.
pub const LISTENER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 171, 254);
/// The guard's own IPv6 address, beside the service's.
pub const LISTENER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0xa9fe, 0xabfe);
/// The listeners' port. Not 80, which a web server may hold on all addresses; below 1024, so that no
/// user without privileges can take it while the guard restarts; below 512, where RPC and NFS clients
/// do not look for source ports (rresvport(3), bindresvport(3)).
pub const LISTENER_PORT: u16 = 254;

/// Where the guard keeps what it needs until the machine is switched off: memory, for root alone.
pub const RUN_DIR: &str = "/run/imds-guard";

/// One address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// For IPv4, and IPv4-mapped IPv6.
    pub v4: SocketAddrV4,
    /// For IPv6.
    pub v6: SocketAddrV6,
}

impl Pair {
    /// Two addresses on one port.
    #[must_use]
    pub const fn new(v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> Self {
        Self {
            v4: SocketAddrV4::new(v4, port),
            v6: SocketAddrV6::new(v6, port, 0, 0),
        }
    }

    /// Replaces the addresses that are given: at most one of each family.
    ///
    /// # Errors
    /// Two of one family, or an unspecified address.
    pub fn with(mut self, given: &[SocketAddr], option: &'static str) -> Result<Self, Wrong> {
        let (mut v4, mut v6) = (0, 0);
        for address in given {
            if address.ip().to_canonical().is_unspecified() {
                return Err(Wrong::new(
                    [option],
                    format!("{option} {address}: give the address itself, not \"all addresses\""),
                ));
            }
            match address {
                SocketAddr::V4(address) => (self.v4, v4) = (*address, v4 + 1),
                SocketAddr::V6(address) => (self.v6, v6) = (*address, v6 + 1),
            }
        }
        if v4 > 1 || v6 > 1 {
            return Err(Wrong::new(
                [option],
                format!(
                    "{option} is given twice for one address family: give at most one IPv4 and one IPv6 address"
                ),
            ));
        }
        Ok(self)
    }

    /// Both, IPv4 first.
    #[must_use]
    pub fn both(&self) -> [SocketAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Where requests are forwarded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstreams {
    /// For requests to the IPv4 endpoint.
    pub v4: SocketAddr,
    /// For requests to the IPv6 endpoint.
    pub v6: SocketAddr,
}

impl Upstreams {
    /// The endpoints themselves unless given; one given address serves both families.
    ///
    /// # Errors
    /// As [`Pair::with`].
    pub fn resolve(endpoints: Pair, given: &[SocketAddr]) -> Result<Self, Wrong> {
        if let [only] = given {
            endpoints.with(given, "upstream")?;
            return Ok(Self {
                v4: *only,
                v6: *only,
            });
        }
        let [v4, v6] = endpoints.with(given, "upstream")?.both();
        Ok(Self { v4, v6 })
    }
}

/// What becomes of connections while no daemon is there to decide: after a crash, and after a stop that
/// leaves the kernel programs in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// They are refused.
    Closed,
    /// They go straight to the metadata service.
    Open,
}

impl OnFailure {
    /// Closed where requests are judged, open where they are only watched.
    #[must_use]
    pub const fn of(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Closed,
            Mode::Audit => Self::Open,
        }
    }
}

impl From<OnFailure> for control::OnFailure {
    fn from(on_failure: OnFailure) -> Self {
        match on_failure {
            OnFailure::Closed => Self::Closed,
            OnFailure::Open => Self::Open,
        }
    }
}

/// What becomes of the kernel programs when the daemon is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They stay, and follow [`OnFailure`] until the next daemon takes over.
    Keep,
    /// They go.
    Detach,
}

impl OnStop {
    /// Kept where requests are judged, so that a restart leaves no gap.
    #[must_use]
    pub const fn of(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Keep,
            Mode::Audit => Self::Detach,
        }
    }
}

/// The interfaces that the perimeter guards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uplinks {
    /// None: it is switched off.
    None,
    /// Every network card of the machine.
    Physical,
    /// These.
    Named(Vec<String>),
}

/// Bounds on what a client can make the guard hold or wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections served at once; more wait in the listener's backlog.
    pub connections: usize,
    /// Of these, how many from one cgroup, and from one user other than root; more are refused.
    pub connections_per_caller: usize,
    /// Of these, how many from one network namespace other than the guard's; more are refused.
    pub connections_per_netns: usize,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Header fields of a request.
    pub headers: usize,
    /// Bytes of a request's body: the service takes none.
    pub request_body: usize,
    /// Bytes of an answer's body: user data has at most 16 KiB.
    pub response_body: usize,
    /// From the connection, or the end of the answer before, to the end of a request's head.
    pub head_timeout: Duration,
    /// From the end of a request's head to the end of its body.
    pub body_timeout: Duration,
    /// Until a connection to the metadata service is made: long enough for a lost SYN to be sent
    /// again, after a second (RFC 6298).
    pub connect_timeout: Duration,
    /// From a request to the end of its answer from the metadata service.
    pub answer_timeout: Duration,
    /// How long a client may leave sent data unacknowledged.
    pub stalled_timeout: Duration,
    /// How long idle connections to the metadata service are kept.
    pub upstream_idle: Duration,
    /// How long a client that gets no answer, or did not speak HTTP, keeps its connection.
    pub unanswered: Duration,
    /// How long requests in flight may take after SIGTERM.
    pub drain: Duration,
}

impl Limits {
    /// Limits for so many connections, of which one caller can have a quarter, and one network
    /// namespace a half.
    #[must_use]
    pub fn for_connections(connections: usize) -> Self {
        Self {
            connections,
            connections_per_caller: (connections / 4).max(1),
            connections_per_netns: (connections / 2).max(1),
            ..Self::default()
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_caller: 256,
            connections_per_netns: 512,
            head_bytes: 16 * 1024,
            headers: 64,
            request_body: 16 * 1024,
            response_body: 256 * 1024,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            answer_timeout: Duration::from_secs(5),
            stalled_timeout: Duration::from_secs(10),
            upstream_idle: Duration::from_secs(15),
            unanswered: Duration::from_secs(10),
            drain: Duration::from_secs(5),
        }
    }
}

/// Everything `imds-guard run` needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The rules.
    pub policy: Policy,
    /// The cgroup whose processes are watched; `None` is the host's root.
    pub cgroup: Option<PathBuf>,
    /// The addresses that clients ask for.
    pub endpoints: Pair,
    /// The guard's own addresses.
    pub listeners: Pair,
    /// The interface that carries them.
    pub link: String,
    /// The interfaces that the perimeter guards.
    pub uplinks: Uplinks,
    /// Whether the backstop judges packets.
    pub backstop: bool,
    /// What happens while no daemon is there; `None` is the mode's own.
    pub on_failure: Option<OnFailure>,
    /// What becomes of the kernel programs at the end; `None` is the mode's own.
    pub on_stop: Option<OnStop>,
    /// Where links and maps are pinned.
    pub pins: PathBuf,
    /// Whether to take over from a daemon that is running.
    pub replace: bool,
    /// Where requests are forwarded to.
    pub upstreams: Upstreams,
    /// Where events go.
    pub outputs: OutputSettings,
    /// Where metrics are served.
    pub metrics: Option<MetricsAt>,
    /// Where the keys of session tokens are kept.
    pub run_dir: PathBuf,
    /// Whether answers of the guard's own say so in a header.
    pub marks_answers: bool,
    /// How much of a command line is recorded.
    pub command_lines: CommandLines,
    /// Least severe message of the kernel programs that is logged.
    pub kernel_log: log::LevelFilter,
    /// Bounds.
    pub limits: Limits,
    /// Who is asked about containers and pods.
    pub workloads: workload::Sources,
}

impl Settings {
    /// What happens while no daemon is there.
    #[must_use]
    pub fn on_failure(&self) -> OnFailure {
        self.on_failure.unwrap_or(OnFailure::of(self.policy.mode))
    }

    /// What becomes of the kernel programs at the end.
    #[must_use]
    pub fn on_stop(&self) -> OnStop {
        self.on_stop.unwrap_or(OnStop::of(self.policy.mode))
    }

    /// Checks what no single option can.
    ///
    /// # Errors
    /// Settings that contradict each other.
    pub fn validate(&self) -> Result<(), Wrong> {
        for (name, pair) in [("listen", self.listeners), ("endpoint", self.endpoints)] {
            if pair.v4.port() != pair.v6.port() {
                return Err(Wrong::new(
                    [name],
                    format!(
                        "{name}: {} and {} must have the same port",
                        pair.v4, pair.v6
                    ),
                ));
            }
            if pair.v4.port() == 0 {
                return Err(Wrong::new([name], format!("{name}: port 0 is none")));
            }
        }
        let endpoints = self.endpoints.both();
        for listener in self.listeners.both() {
            if endpoints
                .iter()
                .any(|endpoint| endpoint.ip() == listener.ip())
            {
                return Err(Wrong::new(
                    ["listen", "endpoint"],
                    format!("listen {listener}: that is the metadata service's own address"),
                ));
            }
            if [self.upstreams.v4, self.upstreams.v6].contains(&listener) {
                return Err(Wrong::new(
                    ["upstream", "listen"],
                    format!("upstream {listener}: that is the guard itself"),
                ));
            }
        }
        if !matches!(
            IpAddr::from(*self.listeners.v6.ip()).to_canonical(),
            IpAddr::V6(_)
        ) {
            return Err(Wrong::new(
                ["listen"],
                format!(
                    "listen {}: an IPv4-mapped address is no IPv6 address",
                    self.listeners.v6
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINTS: Pair = Pair::new(IMDS_V4, IMDS_V6, IMDS_PORT);

    #[test]
    fn upstreams_follow_the_endpoints_unless_given() {
        let v4: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        let v6: SocketAddr = "[::1]:8080".parse().unwrap();
        let resolve = |given: &[SocketAddr]| Upstreams::resolve(ENDPOINTS, given);
        let both = ENDPOINTS.both();
        assert_eq!(
            resolve(&[]).unwrap(),
            Upstreams {
                v4: both[0],
                v6: both[1]
            }
        );
        assert_eq!(resolve(&[v4]).unwrap(), Upstreams { v4, v6: v4 });
        assert_eq!(resolve(&[v6]).unwrap(), Upstreams { v4: v6, v6 });
        assert_eq!(resolve(&[v6, v4]).unwrap(), Upstreams { v4, v6 });
        assert!(resolve(&[v4, v4]).is_err());
        assert!(resolve(&["0.0.0.0:80".parse().unwrap()]).is_err());
    }
}
