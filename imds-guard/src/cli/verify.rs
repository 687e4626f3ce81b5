//! `imds-guard events verify`.

use std::process::ExitCode;

use clap::Args;

use super::history::Source;
use crate::{
    failure::Failure,
    record::output::{Broken, Verified},
};

/// For `--help`.
pub const ABOUT: &str = "\
Checks that no line of a chained event log was altered, taken out, moved or added, across the files that were \
put away. Prints the number and hash of the last line: whoever keeps that elsewhere can say with --last that \
the log has not been cut or made anew since.

Exit code 0 if all is as it was written, 1 if not.";

/// Arguments of `imds-guard events verify`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,

    /// A line that must be in the log, as an earlier run printed it
    #[arg(long, value_name = "NUMBER:HASH")]
    last: Option<String>,
}

/// Prints whether the chain holds.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mut verified = Verified::default();
    let mut broken = None;
    let (mut before, mut lines) = (0_u64, 0_u64);
    let mut is_known = arguments.last.is_none();
    arguments
        .source
        .logs()?
        .each_line(|file, number, line| {
            if broken.is_some() {
                return;
            }
            match verified.add(line) {
                Ok(()) => {
                    lines += 1;
                    is_known = is_known || (arguments.last == name(&verified));
                }
                // From before the log was chained.
                Err(Broken::Unchained) if verified.first().is_none() => before += 1,
                Err(why) => broken = Some((file.display().to_string(), number, why)),
            }
        })
        .map_err(anyhow::Error::from)?;
    if let Some((file, number, why)) = broken {
        println!("{file}:{number}: {}", words(&why));
        return Ok(ExitCode::FAILURE);
    }
    let (Some(first), Some(last)) = (verified.first(), name(&verified)) else {
        println!("no line is chained: switch it on with events-chain");
        return Ok(ExitCode::FAILURE);
    };
    if before > 0 {
        println!("{before} lines come before the chain, and are not checked");
    }
    if first > 0 {
        println!("lines before number {first} were rotated away");
    }
    if !is_known {
        let wanted = arguments.last.as_deref().unwrap_or_default();
        println!("the line {wanted} is not there: the log was cut, or made anew");
        return Ok(ExitCode::FAILURE);
    }
    println!("{lines} lines are as they were written; the last is {last}");
    Ok(ExitCode::SUCCESS)
}

fn name(verified: &Verified) -> Option<String> {
    let (number, hash) = verified.last()?;
    Some(format!("{number}:{hash}"))
}

fn words(broken: &Broken) -> String {
    match broken {
        Broken::Unchained => "this line has no place in the chain: it was added or altered".into(),
        Broken::Missing { from, to } if from == to => {
            format!("line {from} was taken out before this one, or moved")
        }
        Broken::Missing { from, to } => {
            format!("lines {from} to {to} were taken out before this one, or moved")
        }
        Broken::Reordered { seq, expected } => {
            format!("this is line {seq} where {expected} should be: it was moved or doubled")
        }
        Broken::AlteredBefore { seq } => format!("line {seq}, before this one, was altered"),
    }
}
