//! `imds-guard events verify`.

use std::process::ExitCode;

use clap::Args;

use super::history::Source;
use crate::{
    failure::Failure,
    forensics::Log,
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

/// Prints whether the chain holds, of each log.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mut is_known = arguments.last.is_none();
    let mut is_whole = true;
    for log in arguments.source.logs(None)?.iter() {
        is_whole &= verify(log, arguments.last.as_deref(), &mut is_known)?;
    }
    if !is_known {
        let wanted = arguments.last.as_deref().unwrap_or_default();
        println!("the line {wanted} is not there: the log was cut, or made anew");
    }
    Ok(match is_whole && is_known {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Checks one log. Whether a line is in it that must be in one is noted in `is_known`.
fn verify(log: &Log, wanted: Option<&str>, is_known: &mut bool) -> Result<bool, Failure> {
    let mut verified = Verified::default();
    let mut broken = None;
    let (mut before, mut lines) = (0_u64, 0_u64);
    log.each_line(|file, number, line| {
        if broken.is_some() {
            return;
        }
        match verified.add(line) {
            Ok(()) => {
                lines += 1;
                *is_known = *is_known || wanted == name(&verified).as_deref();
            }
            // From before the log was chained.
            Err(Broken::Unchained) if verified.first().is_none() => before += 1,
            Err(why) => broken = Some((file.display().to_string(), number, why)),
        }
    })
    .map_err(anyhow::Error::from)?;
    if let Some((file, number, why)) = broken {
        println!("{file}:{number}: {}", words(&why));
        return Ok(false);
    }
    let (Some(first), Some(last)) = (verified.first(), name(&verified)) else {
        println!("no line is chained: switch it on with events-chain");
        return Ok(false);
    };
    if before > 0 {
        println!("{before} lines come before the chain, and are not checked");
    }
    if first > 0 {
        println!("lines before number {first} were rotated away");
    }
    println!(
        "{lines} lines are as they were written; the last, for which only --last can vouch, is {last}"
    );
    Ok(true)
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
        Broken::Beginning => {
            "the chain does not begin with this line: those before it were altered, or taken out of it".into()
        }
        Broken::AlteredBefore { seq } => format!("line {seq}, before this one, was altered"),
    }
}
