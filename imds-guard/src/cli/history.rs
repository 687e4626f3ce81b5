//! Events that were written, read again.

use std::path::{Path, PathBuf};

use clap::Args;
use jiff::Timestamp;

use super::ago;
use crate::{
    config::RUN_DIR,
    control::{Client, Request, Status},
    failure::Failure,
    forensics::Logs,
    record::Event,
};

/// Where events come from.
#[derive(Args)]
pub struct Source {
    /// Read events from these logs, and what was put away beside them [default: the one that the running guard writes]
    #[arg(long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    pub run_dir: PathBuf,
}

/// A point in time, given as how long ago it is.
pub fn since(text: &str) -> Result<Timestamp, String> {
    ago(text)
}

impl Source {
    /// Whether files were named.
    pub fn is_named(&self) -> bool {
        !self.files.is_empty()
    }

    /// Reads all events since a time, in order. Lines that are no events are skipped, and counted.
    ///
    /// # Errors
    /// Nobody knows where events are, or they cannot be read.
    pub fn read(
        &self,
        since: Option<Timestamp>,
        mut tell: impl FnMut(&str, Event),
    ) -> Result<(), Failure> {
        let mut skipped = 0_u64;
        for log in self.logs(since)?.iter() {
            log.each_line(|_, _, line| {
                let text = String::from_utf8_lossy(line);
                match serde_json::from_str::<Event>(&text) {
                    Ok(event) if is_since(&event, since) => tell(&text, event),
                    Ok(_) => {}
                    Err(_) => skipped += 1,
                }
            })
            .map_err(anyhow::Error::from)?;
        }
        if skipped > 0 {
            log::warn!("{skipped} lines are no events, and were skipped");
        }
        Ok(())
    }

    /// The logs, with what was put away since a time.
    pub fn logs(&self, since: Option<Timestamp>) -> Result<Logs, Failure> {
        Ok(Logs::at(&self.paths()?, since).map_err(anyhow::Error::from)?)
    }

    fn paths(&self) -> Result<Vec<PathBuf>, Failure> {
        if self.is_named() {
            return Ok(self.files.clone());
        }
        let status: Status = Client::required(&self.run_dir)?.ask(Request::Status)?;
        match status.standing.events {
            Some(path) => Ok(vec![Path::new(&path).to_owned()]),
            None => Err(Failure::Settings(
                "the running guard writes events to standard output: name a file with --file, or let it \
                 write one with --events"
                    .into(),
            )),
        }
    }
}

fn is_since(event: &Event, since: Option<Timestamp>) -> bool {
    let time = event.time.parse::<Timestamp>();
    since.is_none_or(|since| time.is_ok_and(|time| time >= since))
}
