//! `imds-guard run`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args, value_parser};
use log::LevelFilter;

use crate::{
    config::{
        IMDS_PORT, IMDS_V4, IMDS_V6, LISTENER_PORT, LISTENER_V4, LISTENER_V6, Limits, Pair,
        Settings, Upstreams,
    },
    failure::Failure,
    identify::CommandLines,
    policy::{Mode, Policy},
    service,
};

/// For `--help`.
pub const ABOUT: &str = "\
Watches this host until SIGTERM or SIGINT.

Every TCP connection that a process makes to the metadata service is turned to imds-guard, in all \
containers, too. Each request becomes one line of JSON (docs/events.md). Messages about the guard \
itself go to standard error; RUST_LOG=debug shows more of them.

When the guard ends, for whatever reason, connections go straight to the metadata service again.

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
            },
            cgroup: self.cgroup.clone(),
            endpoints,
            listeners: Pair::new(LISTENER_V4, LISTENER_V6, LISTENER_PORT)
                .with(&self.listen, "--listen")?,
            link: self.link.clone(),
            upstreams: Upstreams::resolve(endpoints, &self.upstream)?,
            events: self.events.clone(),
            command_lines: self.command_lines,
            kernel_log: self.kernel_log,
            limits: Limits {
                connections: self.max_connections.into(),
                ..Limits::default()
            },
        })
    }
}

/// Runs the guard.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    service::run(&arguments.settings()?)?;
    Ok(ExitCode::SUCCESS)
}
