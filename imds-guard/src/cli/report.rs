//! `imds-guard report`.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;

use super::history::since;
use crate::{
    config::RUN_DIR,
    control::{Client, Request, Status},
    failure::Failure,
    forensics::{
        Logs, Progress, Summary,
        render::{Form, Report},
    },
};

/// For `--help`.
pub const ABOUT: &str = "\
Says who still uses IMDSv1, from the event logs of one host or many: what runs, where, what it asked for, and \
what to do about it. Callers are told apart by program and unit, image or what their pod belongs to.";

/// Where logs are when nobody says where.
const LOGS: &str = "/var/log/imds-guard";
/// How often the progress bar moves.
const PROGRESS: Duration = Duration::from_millis(100);

/// Arguments of `imds-guard report`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    pub logs: LogArguments,

    /// What the report looks like
    #[arg(long, value_enum, default_value = "table")]
    format: Form,

    /// Write it to a file in place of standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Which logs are read, and from when on.
#[derive(Args)]
pub struct LogArguments {
    /// Event logs, and folders of them, also of many hosts. Logs that were put away (.zst) are read, too
    /// [default: the log of the running guard, or /var/log/imds-guard]
    #[arg(value_name = "FILE|DIRECTORY")]
    files: Vec<PathBuf>,

    /// Begin so long ago, as in 36h or 14d [default: with the first event]
    #[arg(long, value_name = "DURATION", value_parser = since)]
    pub since: Option<Timestamp>,

    /// Threads that read [default: one for each processor]
    #[arg(long, value_name = "NUMBER")]
    threads: Option<usize>,

    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    run_dir: PathBuf,
}

/// Prints a report.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let summary = arguments.logs.read()?;
    let report = Report::of(&summary);
    let text = report.render(arguments.format)?;
    match &arguments.output {
        Some(path) => {
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
        }
        None => match io::stdout().lock().write_all(text.as_bytes()) {
            // As with `head`.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(anyhow::Error::from(error).into());
            }
            _ => {}
        },
    }
    Ok(ExitCode::SUCCESS)
}

impl LogArguments {
    /// Reads the logs, with a progress bar where somebody sees it.
    pub fn read(&self) -> Result<Summary, Failure> {
        self.read_since(self.since)
    }

    /// The same, from some time on.
    pub fn read_since(&self, since: Option<Timestamp>) -> Result<Summary, Failure> {
        let places = self.places()?;
        let logs = Logs::at(&places, since).map_err(anyhow::Error::from)?;
        if logs.is_empty() {
            return Err(Failure::Settings(format!(
                "there are no event logs (*.jsonl, *.jsonl.*.zst) in {}",
                places[0].display()
            )));
        }
        let begin = since.map(|since| format!("{since:.6}"));
        let begin = begin.unwrap_or_default();
        let threads = self
            .threads
            .unwrap_or_else(|| thread::available_parallelism().map_or(2, std::num::NonZero::get));
        let progress = Progress::default();
        let bar = bar(logs.bytes());
        let read = thread::scope(|scope| {
            let reader = thread::Builder::new().spawn_scoped(scope, || {
                crate::forensics::read(&logs, threads, &progress, || Summary::since(&begin))
            });
            let reader = reader.context("a thread cannot be started")?;
            while !bar.is_hidden() && !reader.is_finished() {
                bar.set_position(progress.bytes());
                thread::sleep(PROGRESS);
            }
            match reader.join() {
                Ok(read) => read.map_err(anyhow::Error::from),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        bar.finish_and_clear();
        let summary = read?;
        if summary.skipped > 0 {
            log::warn!("{} lines are no events, and were skipped", summary.skipped);
        }
        Ok(summary)
    }

    fn places(&self) -> Result<Vec<PathBuf>, Failure> {
        if !self.files.is_empty() {
            return Ok(self.files.clone());
        }
        if let Ok(Some(mut guard)) = Client::connect(&self.run_dir) {
            let status: Status = guard.ask(Request::Status)?;
            if let Some(events) = status.standing.events {
                return Ok(vec![events.into()]);
            }
        }
        let default = PathBuf::from(LOGS);
        if !default.is_dir() {
            return Err(Failure::Settings(format!(
                "no guard writes an event log here, and there is no {LOGS}: name files or folders"
            )));
        }
        Ok(vec![default])
    }
}

fn bar(bytes: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = ProgressStyle::with_template(
        "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    bar
}
