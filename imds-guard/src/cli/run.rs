//! `imds-guard run`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args, value_parser};
use log::LevelFilter;

use crate::{
    config::{
        IMDS_PORT, IMDS_V4, IMDS_V6, LISTENER_PORT, LISTENER_V4, LISTENER_V6, Limits, OnFailure,
        OnStop, Pair, RUN_DIR, Settings, Uplinks, Upstreams,
    },
    failure::Failure,
    identify::CommandLines,
    kernel::PINS,
    policy::{Binding, HopLimitAction, Mode, Policy},
    rules, service,
};

/// For `--help`.
pub const ABOUT: &str = "\
Watches this host until SIGTERM or SIGINT.

Every TCP connection that a process makes to the metadata service is turned to imds-guard, in all \
containers, too. Each request becomes one line of JSON (docs/events.md). Messages about the guard \
itself go to standard error; RUST_LOG=debug shows more of them.

When the guard is killed, its kernel programs stay in place and follow --on-failure. On SIGTERM they \
stay or go as --on-stop says; `imds-guard detach` removes them at any time.

Start with --mode audit, which only records; switch to --mode enforce when no event has \
\"imds\":\"v1\" any more.";

/// Arguments of `imds-guard run`.
#[derive(Args)]
pub struct Arguments {
    /// audit: forward everything and record it; enforce: refuse requests without a session token
    #[arg(long, value_enum, default_value_t = Mode::Audit)]
    mode: Mode,

    /// Network hops that a session token may travel, as the instance's HttpPutResponseHopLimit: 1
    /// for the host alone, 2 for containers with their own network, too. Refused in enforce mode,
    /// marked in audit mode.
    #[arg(long, value_name = "1-64", default_value_t = 1, value_parser = value_parser!(u8).range(1..=64))]
    hop_limit: u8,

    /// What becomes of requests for a session token from further away, in enforce mode: reject answers them
    /// with 403 at once; drop never answers them, as on EC2, where clients wait until they give up
    #[arg(long, value_enum, default_value_t)]
    hop_limit_action: HopLimitAction,

    /// Where a session token is valid: everywhere (off), or in the network namespace, container or cgroup
    /// that it was fetched in. Elsewhere it is refused with 401, so that clients fetch one of their own
    /// [default: container in enforce mode, off in audit mode]
    #[arg(long, value_enum)]
    token_binding: Option<Binding>,

    /// File of rules (TOML): exceptions for some callers
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,

    /// Say in a header, X-Imds-Guard, why the guard has answered in place of the service
    #[arg(long)]
    mark_answers: bool,

    /// Cgroup v2 directory whose processes are watched [default: the root, every process]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// The guard's own address, one for each family, both with the same port
    /// [default: 169.254.171.254:254 and [fd00:ec2::a9fe:abfe]:254]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,

    /// Network interface that carries the guard's addresses
    #[arg(long, value_name = "NAME", default_value = "lo")]
    link: String,

    /// Network interface through which the host is connected, guarded against packets of virtual
    /// machines, packet sockets and the like; may be repeated
    /// [default: every network card of the machine, also those that come later]
    #[arg(long, value_name = "NAME")]
    uplink: Vec<String>,

    /// Leave packets on the uplinks alone
    #[arg(long, conflicts_with = "uplink")]
    no_perimeter: bool,

    /// Leave packets alone that processes send to the metadata service past the redirect
    #[arg(long)]
    no_backstop: bool,

    /// What becomes of connections when the guard has been killed, or was stopped and its kernel programs
    /// stay: within a second they are refused, or go straight to the metadata service
    /// [default: closed in enforce mode, open in audit mode]
    #[arg(long, value_enum)]
    on_failure: Option<OnFailure>,

    /// What becomes of the kernel programs on SIGTERM: they are kept for the next start, or go
    /// [default: keep in enforce mode, detach in audit mode]
    #[arg(long, value_enum)]
    on_stop: Option<OnStop>,

    /// Take over from an imds-guard that is running: it hands over its listeners, finishes what it has
    /// begun, and ends
    #[arg(long)]
    replace: bool,

    /// Where the kernel programs and maps are pinned
    #[arg(long, value_name = "PATH", default_value = PINS)]
    pins: PathBuf,

    /// Where the keys of session tokens are kept until the machine is switched off
    #[arg(long, value_name = "PATH", default_value = RUN_DIR)]
    run_dir: PathBuf,

    /// Metadata address that clients ask for, one for each family
    /// [default: 169.254.169.254:80 and [fd00:ec2::254]:80]
    #[arg(long, value_name = "ADDRESS:PORT")]
    endpoint: Vec<SocketAddr>,

    /// Where requests are forwarded to, one for each family [default: the endpoints]
    #[arg(long, value_name = "ADDRESS:PORT")]
    upstream: Vec<SocketAddr>,

    /// File that events are appended to [default: standard output]
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,

    /// How much of the callers' command lines is recorded
    #[arg(long, value_enum, default_value_t = CommandLines::Redacted)]
    command_lines: CommandLines,

    /// Client connections served at once; more wait
    #[arg(long, value_name = "1-4000", default_value_t = 1024, value_parser = value_parser!(u16).range(1..=4000))]
    max_connections: u16,

    /// Messages of the kernel programs: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value_t = LevelFilter::Off)]
    kernel_log: LevelFilter,
}

impl Arguments {
    fn settings(&self) -> Result<Settings, Failure> {
        let endpoints =
            Pair::new(IMDS_V4, IMDS_V6, IMDS_PORT).with(&self.endpoint, "--endpoint")?;
        Ok(Settings {
            policy: Policy {
                mode: self.mode,
                hop_limit: self.hop_limit,
                hop_limit_action: self.hop_limit_action,
                token_binding: self.token_binding.unwrap_or(default_binding(self.mode)),
                rules: self.rules.as_deref().map_or(Ok(Vec::new()), rules::read)?,
            },
            cgroup: self.cgroup.clone(),
            endpoints,
            listeners: Pair::new(LISTENER_V4, LISTENER_V6, LISTENER_PORT)
                .with(&self.listen, "--listen")?,
            link: self.link.clone(),
            uplinks: match (self.no_perimeter, self.uplink.is_empty()) {
                (true, _) => Uplinks::None,
                (false, true) => Uplinks::Physical,
                (false, false) => Uplinks::Named(self.uplink.clone()),
            },
            backstop: !self.no_backstop,
            on_failure: self.on_failure.unwrap_or(OnFailure::of(self.mode)),
            on_stop: self.on_stop.unwrap_or(OnStop::of(self.mode)),
            pins: self.pins.clone(),
            replace: self.replace,
            upstreams: Upstreams::resolve(endpoints, &self.upstream)?,
            events: self.events.clone(),
            run_dir: self.run_dir.clone(),
            marks_answers: self.mark_answers,
            command_lines: self.command_lines,
            kernel_log: self.kernel_log,
            limits: Limits::for_connections(self.max_connections.into()),
        })
    }
}

/// In audit mode nobody notices that the guard is there, or that it leaves.
const fn default_binding(mode: Mode) -> Binding {
    match mode {
        Mode::Audit => Binding::Off,
        Mode::Enforce => Binding::Container,
    }
}

/// Runs the guard.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    service::run(&arguments.settings()?)?;
    Ok(ExitCode::SUCCESS)
}
