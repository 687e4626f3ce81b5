//! `imds-guard events`.

use std::{io, process::ExitCode};

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;

use super::{
    history::{Source, since},
    verify,
};
use crate::{
    control::{Client, Request as Ask},
    failure::Failure,
    policy::{Imds, Verdict},
    record::{Event, Kind, Request, escaped, words},
};

/// For `--help`.
pub const ABOUT: &str = "\
Shows events: those that were written since some time (--since), those that happen (--follow), or both. \
Without either, those of the last hour.";

/// Arguments of `imds-guard events`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Action>,

    /// Show events as they happen, until interrupted
    #[arg(long, short)]
    follow: bool,

    /// Begin so long ago, as in 30m, 1h or 14d
    #[arg(long, value_name = "DURATION", value_parser = since)]
    since: Option<Timestamp>,

    /// Only requests with this verdict
    #[arg(long, value_enum)]
    verdict: Option<Became>,

    /// Only requests in this version: v1, v2, or token for requests of session tokens
    #[arg(long, value_enum)]
    imds: Option<Imds>,

    /// Only requests of this user, by name or number
    #[arg(long)]
    user: Option<String>,

    /// Only requests of this program
    #[arg(long, value_name = "PATH")]
    exe: Option<String>,

    /// Only requests that this rule has decided
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,

    /// Print them as they are recorded, a line of JSON each
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    source: Source,
}

#[derive(Subcommand)]
enum Action {
    /// Check the chain of an event log (events-chain), and name the first line that does not belong
    #[command(long_about = verify::ABOUT)]
    Verify(verify::Arguments),
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Became {
    /// Forwarded
    #[value(alias = "allow")]
    Allowed,
    /// Forwarded, and marked
    #[value(alias = "audit")]
    Audited,
    /// Carried over from IMDSv1
    #[value(alias = "upgrade")]
    Upgraded,
    /// Refused
    #[value(alias = "deny")]
    Denied,
}

/// Shows them.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if let Some(Action::Verify(arguments)) = &arguments.command {
        return verify::main(arguments);
    }
    let mut live = match arguments.follow {
        // Before the file is read, so that nothing is missed in between.
        true => Some(listen(arguments)?),
        false => None,
    };
    let mut out = io::stdout().lock();
    let mut gone = Ok(());
    if arguments.since.is_some() || live.is_none() {
        let begin = arguments.since.or_else(|| since("1h").ok());
        arguments.source.read(begin, |line, event| {
            if gone.is_ok() && arguments.shows(&event) {
                gone = show(&mut out, arguments.json, line, &event);
            }
        })?;
    }
    while let Some(client) = &mut live
        && gone.is_ok()
        && let Some(line) = client.line()?
    {
        match serde_json::from_str::<Event>(&line) {
            Ok(event) if arguments.shows(&event) => {
                gone = show(&mut out, arguments.json, line.trim_end(), &event);
            }
            Ok(_) => {}
            Err(_) => log::warn!("some events came too fast to be shown: {}", line.trim_end()),
        }
    }
    match gone {
        // As with `head`.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::from(error).into())
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn listen(arguments: &Arguments) -> Result<Client, Failure> {
    let mut client = Client::required(&arguments.source.run_dir)?;
    let _empty: serde_json::Value = client.ask(Ask::Events)?;
    Ok(client)
}

impl Arguments {
    fn shows(&self, event: &Event) -> bool {
        let selects = self.verdict.is_some()
            || self.imds.is_some()
            || self.user.is_some()
            || self.exe.is_some()
            || self.rule.is_some();
        match &event.kind {
            Kind::Request(request) => self.selects(request),
            _ => !selects,
        }
    }

    fn selects(&self, request: &Request) -> bool {
        let caller = &request.caller;
        let verdict = match request.verdict {
            Verdict::Allow => Became::Allowed,
            Verdict::Audit => Became::Audited,
            Verdict::Upgrade => Became::Upgraded,
            Verdict::Deny => Became::Denied,
        };
        self.verdict.is_none_or(|wanted| wanted == verdict)
            && self.imds.is_none_or(|wanted| request.imds == Some(wanted))
            && (self.user.as_ref()).is_none_or(|wanted| {
                caller.user.as_ref() == Some(wanted) || caller.uid.to_string() == *wanted
            })
            && (self.exe.as_ref()).is_none_or(|wanted| caller.exe.as_ref() == Some(wanted))
            && (self.rule.as_ref()).is_none_or(|wanted| request.rule.as_ref() == Some(wanted))
    }
}

fn show(out: &mut impl io::Write, json: bool, line: &str, event: &Event) -> io::Result<()> {
    if json {
        // It may come from a file that others have written.
        writeln!(out, "{}", escaped(line.to_owned()))?;
    } else {
        writeln!(out, "{}", words(event))?;
    }
    out.flush()
}
