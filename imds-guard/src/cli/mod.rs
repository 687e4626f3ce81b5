//! The command line: arguments here, one file for each command.

mod config;
mod demo;
mod detach;
mod doctor;
mod events;
mod explain;
mod history;
mod mode;
mod policy;
mod ready;
mod report;
mod run;
mod status;
mod suggest;
mod top;
mod verify;

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::failure::EXIT_CODES;

/// What is logged unless RUST_LOG says otherwise. How much the kernel programs say is up to
/// `--kernel-log`.
const LOG_FILTER: &str = "info,imds_guard_ebpf=trace";

#[derive(Parser)]
#[command(
    name = "imds-guard",
    version,
    about = "Guards the EC2 instance metadata service: refuses IMDSv1, names who uses it",
    long_about = "Guards the EC2 instance metadata service (IMDS). Connections to 169.254.169.254:80 and \
                  [fd00:ec2::254]:80 are turned to this process inside the kernel, without any change to \
                  the clients. It names the process behind each request, refuses requests without a \
                  session token (IMDSv1) or just records them, and forwards the rest.",
    after_long_help = EXIT_CODES,
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch this host until SIGTERM
    #[command(long_about = run::ABOUT, after_long_help = EXIT_CODES)]
    Run(Box<run::Arguments>),
    /// Show what is in force on this host
    #[command(long_about = status::ABOUT)]
    Status(status::Arguments),
    /// Show who calls, as it happens
    #[command(long_about = top::ABOUT)]
    Top(top::Arguments),
    /// Show what happens to requests, and what has happened
    #[command(long_about = events::ABOUT)]
    Events(events::Arguments),
    /// Show which rule decides about a request, and why the others do not
    #[command(long_about = explain::ABOUT)]
    Explain(Box<explain::Arguments>),
    /// Switch the mode of the guard that is running, for some time or until it ends
    #[command(long_about = mode::ABOUT)]
    Mode(mode::Arguments),
    /// Have the guard that is running read its configuration again
    #[command(long_about = mode::ABOUT_RELOAD)]
    Reload(mode::ReloadArguments),
    /// Have the guard that is running finish what it has begun, and end
    Drain(mode::ReloadArguments),
    /// Check, show or describe the configuration
    Config(Box<config::Arguments>),
    /// Write rules for what was seen
    Policy(policy::Arguments),
    /// Say who still uses IMDSv1, from event logs
    #[command(long_about = report::ABOUT)]
    Report(report::Arguments),
    /// Say whether IMDSv1 can be switched off, from event logs
    #[command(long_about = ready::ABOUT)]
    Ready(ready::Arguments),
    /// Remove what a guard has left on this host
    #[command(long_about = detach::ABOUT, after_long_help = EXIT_CODES)]
    Detach(detach::Arguments),
    /// Show it at work, without EC2, in throw-away namespaces
    #[command(long_about = demo::ABOUT)]
    Demo(demo::Arguments),
    /// Check whether this host has what imds-guard needs, or a container can reach it
    #[command(long_about = doctor::ABOUT)]
    Doctor(doctor::Arguments),
}

/// Parses the arguments and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(LOG_FILTER)).init();
    let done = match arguments.command {
        Command::Run(arguments) => run::main(&arguments, of_command(&matches)),
        Command::Events(arguments) => events::main(&arguments),
        Command::Explain(arguments) => explain::main(&arguments),
        Command::Mode(arguments) => mode::main(&arguments),
        Command::Reload(arguments) => mode::reload(&arguments),
        Command::Drain(arguments) => mode::drain(&arguments),
        Command::Config(arguments) => config::main(&arguments, of_command(&matches)),
        Command::Policy(arguments) => policy::main(&arguments),
        Command::Ready(arguments) => ready::main(&arguments),
        Command::Top(arguments) => top::main(&arguments),
        Command::Report(arguments) => report::main(&arguments),
        Command::Status(arguments) => status::main(&arguments),
        Command::Detach(arguments) => detach::main(&arguments),
        Command::Demo(arguments) => demo::main(&arguments),
        Command::Doctor(arguments) => doctor::main(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("imds-guard: {failure}");
            failure.exit_code()
        }
    }
}

/// What was given to the innermost command.
fn of_command(matches: &ArgMatches) -> &ArgMatches {
    match matches.subcommand() {
        Some((_, inner)) => of_command(inner),
        None => matches,
    }
}

/// The time that is so long before now, as in `1h`, `14d` or `90m`.
fn ago(text: &str) -> Result<jiff::Timestamp, String> {
    let long = duration(text)?;
    let then = jiff::Timestamp::now().checked_sub(long);
    then.map_err(|_| format!("{text} is too long ago"))
}

/// A duration as in `1h`, `14d` or `90m`.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    // jiff leaves out days, as they have not all the same length; in UTC they have.
    let days = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u32>().ok());
    if let Some(days) = days {
        return Ok(std::time::Duration::from_secs(u64::from(days) * 24 * 3600));
    }
    let parsed: Result<jiff::SignedDuration, _> = text.parse();
    let parsed = parsed
        .ok()
        .and_then(|it| std::time::Duration::try_from(it).ok());
    let parsed = parsed.filter(|it| !it.is_zero());
    parsed.ok_or_else(|| format!("\"{text}\" is no duration: write one as 30m, 2h or 14d"))
}
