//! `imds-guard run`.

use std::{path::PathBuf, process::ExitCode};

use clap::{ArgMatches, Args};

use crate::{
    config::{Keys, Layers},
    failure::Failure,
    service,
};

/// For `--help`.
pub const ABOUT: &str = "\
Watches this host until SIGTERM or SIGINT.

Every TCP connection that a process makes to the metadata service is turned to imds-guard, in all \
containers, too. Each request becomes one line of JSON (docs/events.md). Messages about the guard \
itself go to standard error; RUST_LOG=debug shows more of them.

What is not given here comes from the environment (IMDS_GUARD_MODE for --mode and so on), from \
/etc/imds-guard/config.toml and the files in conf.d beside it (docs/configuration.md), or has a default. \
These files are read again when they change, on SIGHUP and by `imds-guard reload`.

When the guard is killed, its kernel programs stay in place and follow --on-failure. On SIGTERM they \
stay or go as --on-stop says; `imds-guard detach` removes them at any time.

Start with --mode audit, which only records; switch to --mode enforce when no event has \
\"imds\":\"v1\" any more, or with the exceptions that `imds-guard policy suggest` writes.";

/// Arguments of `imds-guard run`.
#[derive(Args)]
pub struct Arguments {
    /// Configuration file; those in conf.d beside it are read, too
    /// [default: /etc/imds-guard/config.toml]
    #[arg(long, env = "IMDS_GUARD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// Take over from an imds-guard that is running: it hands over its listeners, finishes what it has
    /// begun, and ends
    #[arg(long)]
    replace: bool,

    #[command(flatten)]
    keys: Keys,
}

/// Runs the guard.
pub fn main(arguments: &Arguments, matches: &ArgMatches) -> Result<ExitCode, Failure> {
    let layers = Layers::new(arguments.config.as_deref(), arguments.keys.clone(), matches);
    service::run(layers, arguments.replace)?;
    Ok(ExitCode::SUCCESS)
}
