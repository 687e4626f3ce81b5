//! `imds-guard mode`, `reload` and `drain`: what the running guard is told.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, ValueEnum};

use super::duration;
use crate::{
    config::RUN_DIR,
    control::{Changed, Client, Request},
    failure::Failure,
    policy::Mode,
};

/// For `--help`.
pub const ABOUT: &str = "\
Switches the mode of the guard that is running, for processes and kernel programs alike. The switch is \
recorded, with who did it. With --for, the configured mode returns by itself; without, when the guard is \
started again, or with `imds-guard mode configured`.";

/// For `--help`.
pub const ABOUT_RELOAD: &str = "\
Has the guard that is running read its configuration again. It is checked first: if anything is wrong \
with it, nothing changes, and this says what it is. Requests that are being served end under the rules \
that they were judged by.";

/// Arguments of `imds-guard mode`.
#[derive(Args)]
pub struct Arguments {
    /// The mode
    #[arg(value_enum)]
    mode: Wanted,

    /// For how long, as in 30m, 2h or 1d
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    lasts: Option<Duration>,

    #[command(flatten)]
    guard: ReloadArguments,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Wanted {
    /// Forward everything, and mark what would be refused
    Audit,
    /// Refuse requests without a session token
    Enforce,
    /// As the configuration says
    Configured,
}

/// Which guard.
#[derive(Args)]
pub struct ReloadArguments {
    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    run_dir: PathBuf,
}

/// Switches the mode.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mode = match arguments.mode {
        Wanted::Audit => Some(Mode::Audit),
        Wanted::Enforce => Some(Mode::Enforce),
        Wanted::Configured => None,
    };
    if mode.is_none() && arguments.lasts.is_some() {
        let what = "the configured mode lasts: leave --for out";
        return Err(Failure::Settings(what.into()));
    }
    tell(
        &arguments.guard,
        Request::Mode {
            mode,
            for_seconds: arguments.lasts.map(|lasts| lasts.as_secs().max(1)),
        },
    )
}

/// Has the configuration read again.
pub fn reload(arguments: &ReloadArguments) -> Result<ExitCode, Failure> {
    tell(arguments, Request::Reload)
}

/// Has the guard end.
pub fn drain(arguments: &ReloadArguments) -> Result<ExitCode, Failure> {
    let _empty: serde_json::Value = Client::required(&arguments.run_dir)?.ask(Request::Drain)?;
    println!("it ends when what it has begun is finished");
    Ok(ExitCode::SUCCESS)
}

fn tell(guard: &ReloadArguments, request: Request) -> Result<ExitCode, Failure> {
    let changed: Changed = Client::required(&guard.run_dir)?.ask(request)?;
    let until = changed
        .until
        .map_or(String::new(), |until| format!(" until {until}"));
    println!("{} mode{until}, {} rules", changed.mode, changed.rules);
    if !changed.needs_restart.is_empty() {
        println!(
            "takes effect at the next start: {}",
            changed.needs_restart.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}
