//! CloudWatch's embedded metric format (CloudWatch User Guide, "Specification: Embedded metric
//! format"): the agent, or the console of a container, makes metrics of such lines.
//!
//! AWS's own `MetadataNoToken` counts for an instance; this one tells the process, too.

use std::collections::HashSet;

use jiff::Timestamp;
use serde_json::json;

use crate::{
    policy::{Imds, Verdict},
    record::{Event, Kind, escaped, label},
};

/// Processes that get a metric of their own. Each costs money, and callers choose their names.
const MOST_PROCESSES: usize = 200;
/// What all others are called.
const OTHER: &str = "other";
/// Longest value of a dimension, in bytes (CloudWatch takes 1024 characters).
const LONGEST: usize = 256;
const NAMESPACE: &str = "imds-guard";

/// Writes metrics of requests without a session token.
#[derive(Default)]
pub struct Emf {
    processes: HashSet<String>,
}

impl Emf {
    pub fn write(&mut self, event: &Event, out: &mut Vec<u8>) {
        let Kind::Request(request) = &event.kind else {
            return;
        };
        if request.imds != Some(Imds::V1) {
            return;
        }
        let time = event.time.parse::<Timestamp>().unwrap_or_default();
        let calls = request.calls();
        let refused = if request.verdict == Verdict::Deny {
            calls
        } else {
            0
        };
        let line = json!({
            "_aws": {
                "Timestamp": time.as_millisecond(),
                "CloudWatchMetrics": [{
                    "Namespace": NAMESPACE,
                    "Dimensions": [["Host", "Process"], ["Process"], ["Host"]],
                    "Metrics": [
                        {"Name": "MetadataNoToken", "Unit": "Count"},
                        {"Name": "MetadataNoTokenRejected", "Unit": "Count"},
                    ],
                }],
            },
            "Host": dimension(&event.host.name),
            "Process": self.process(dimension(&label(&request.caller))),
            "MetadataNoToken": calls,
            "MetadataNoTokenRejected": refused,
            "Path": request.path,
            "UserAgent": request.user_agent,
            "Verdict": request.verdict,
        });
        out.extend_from_slice(escaped(line.to_string()).as_bytes());
        out.push(b'\n');
    }

    fn process(&mut self, name: String) -> String {
        let has_room = self.processes.len() < MOST_PROCESSES;
        if !has_room && !self.processes.contains(&name) {
            return OTHER.into();
        }
        self.processes.insert(name.clone());
        name
    }
}

/// A value that CloudWatch takes: ASCII without control characters, not empty, not begun with a colon.
fn dimension(text: &str) -> String {
    let plain = |it: char| {
        if it.is_ascii_graphic() || it == ' ' {
            it
        } else {
            '?'
        }
    };
    let text: String = text.chars().map(plain).take(LONGEST).collect();
    match text.trim().trim_start_matches(':') {
        "" => "unknown".into(),
        text => text.to_owned(),
    }
}
