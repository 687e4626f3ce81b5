//! Where events and metrics go.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Wrong;
use crate::record::output::{Collector, Rotation, Sync};

/// Standard output, where a file is meant.
const STDOUT: &str = "-";
const MIB: u64 = 1024 * 1024;

/// Where events go, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputSettings {
    /// The event log; `None` is standard output, unless another output goes there.
    pub events: Option<PathBuf>,
    /// For requests in OCSF's form.
    pub ocsf: Option<PathBuf>,
    /// For requests without a session token, as metrics.
    pub emf: Option<PathBuf>,
    /// The socket of journald.
    pub journald: Option<PathBuf>,
    /// The collector of OpenTelemetry logs.
    pub otlp: Option<Collector>,
    /// For how long calls that are alike are folded.
    pub fold: Option<Duration>,
    /// Whether lines of the event log are chained.
    pub chain: bool,
    /// When files are rotated, and how many are kept.
    pub rotation: Rotation,
}

impl Default for OutputSettings {
    fn default() -> Self {
        Self {
            events: None,
            ocsf: None,
            emf: None,
            journald: None,
            otlp: None,
            fold: None,
            chain: false,
            rotation: Rotation {
                size: 64 * MIB,
                age: Duration::from_secs(24 * 3600),
                total: 1024 * MIB,
                sync: Sync::default(),
            },
        }
    }
}

impl OutputSettings {
    /// The file of the event log, if it is one.
    #[must_use]
    pub fn events_file(&self) -> Option<&Path> {
        self.events.as_deref().filter(|path| !is_stdout(path))
    }

    /// What goes to which file, with the names of the keys; `None` is standard output.
    #[must_use]
    pub fn files(&self) -> Vec<(&'static str, Option<&Path>)> {
        let others = [("ocsf", &self.ocsf), ("emf", &self.emf)];
        let has_stdout = others
            .iter()
            .any(|(_, path)| path.as_deref().is_some_and(is_stdout));
        let events = match &self.events {
            Some(path) => Some(("events", path.as_path())),
            None if has_stdout => None,
            None => Some(("events", Path::new(STDOUT))),
        };
        let others = others
            .into_iter()
            .filter_map(|(name, path)| Some((name, path.as_deref()?)));
        events
            .into_iter()
            .chain(others)
            .map(|(name, path)| (name, (!is_stdout(path)).then_some(path)))
            .collect()
    }

    /// Checks what no single key can.
    ///
    /// # Errors
    /// Two outputs in one place, or a chain on a stream.
    pub fn validate(&self) -> Result<(), Wrong> {
        let files = self.files();
        for (at, (name, path)) in files.iter().enumerate() {
            if let Some((other, _)) = files[..at].iter().find(|(_, other)| other == path) {
                // The event log is where most want it.
                return Err(Wrong::new(
                    ["emf", "ocsf"],
                    format!("{other} and {name} go to the same place: choose another one"),
                ));
            }
        }
        if self.chain && self.events_file().is_none() {
            return Err(Wrong::new(
                ["events_chain"],
                "events-chain needs an event log in a file: name one with events".into(),
            ));
        }
        if self.rotation.total < self.rotation.size {
            return Err(Wrong::new(
                ["events_total_mib", "events_file_mib"],
                "events-total-mib is less than events-file-mib: not even one file would fit".into(),
            ));
        }
        Ok(())
    }
}

/// Where metrics are served: never beyond this host, for callers' names are in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsAt {
    /// A loopback address.
    Address(#[schemars(with = "String")] SocketAddr),
    /// A Unix socket, for root alone.
    Socket(PathBuf),
}

impl FromStr for MetricsAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Socket(text.into()));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().to_canonical().is_loopback() => Ok(Self::Address(address)),
            Ok(address) => Err(format!(
                "{address} can be reached from elsewhere, and metrics name callers: use a loopback address \
                 or a Unix socket"
            )),
            Err(_) => Err(format!(
                "\"{text}\" is neither an address and port, as 127.0.0.1:9254, nor the path of a socket"
            )),
        }
    }
}

impl TryFrom<String> for MetricsAt {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MetricsAt> for String {
    fn from(at: MetricsAt) -> Self {
        match at {
            MetricsAt::Address(address) => address.to_string(),
            MetricsAt::Socket(path) => path.display().to_string(),
        }
    }
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new(STDOUT)
}
