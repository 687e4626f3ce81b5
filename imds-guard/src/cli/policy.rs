//! `imds-guard policy`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use jiff::{Timestamp, ToSpan as _, tz::TimeZone};

use super::{
    history::{Source, since},
    suggest::Seen,
};
use crate::failure::Failure;

/// For `--help`.
const ABOUT: &str = "\
Writes the smallest set of rules, as TOML, that would let what was seen keep working in enforce mode. \
Those that speak IMDSv1 get rules with an end, to be reviewed: fill in the owner and the reason, and \
leave out what should not be. Put the rest into /etc/imds-guard/conf.d and try it with `imds-guard config \
check`.";

/// How long exceptions last that are suggested.
const DAYS: i64 = 30;

/// Arguments of `imds-guard policy`.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write rules that let what was seen keep working in enforce mode
    #[command(long_about = ABOUT)]
    Suggest(Suggest),
}

#[derive(Args)]
struct Suggest {
    /// Begin so long ago, as in 30m, 1h or 14d
    #[arg(long, value_name = "DURATION", value_parser = since, default_value = "14d")]
    since: Timestamp,

    #[command(flatten)]
    source: Source,
}

/// Suggests.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let Command::Suggest(suggest) = &arguments.command;
    let mut seen = Seen::default();
    suggest
        .source
        .read(Some(suggest.since), |_, event| seen.add(&event))?;
    let until = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let until = until
        .checked_add(DAYS.days())
        .map_err(anyhow::Error::from)?;
    print!("{}", seen.suggest(until)?);
    Ok(ExitCode::SUCCESS)
}
