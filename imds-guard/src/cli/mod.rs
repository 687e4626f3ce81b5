//! The command line: arguments here, one file for each command.

mod demo;
mod detach;
mod doctor;
mod run;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    Run(run::Arguments),
    /// Show what is in force on this host
    #[command(long_about = status::ABOUT)]
    Status(status::Arguments),
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
    let arguments = Arguments::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(LOG_FILTER)).init();
    let done = match arguments.command {
        Command::Run(arguments) => run::main(&arguments),
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
