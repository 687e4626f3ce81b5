//! A report, in the form that its reader wants.

mod chart;
mod csv;
mod html;
mod markdown;
mod table;

use std::collections::{BTreeMap, HashMap};

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Advice, Calls, Identity, Summary, Wanted, advise};
use crate::record::{obeyed, to_json_pretty};

/// What a report looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// For a terminal
    Table,
    /// For programs
    Json,
    /// For spreadsheets
    Csv,
    /// One file, with charts
    Html,
    /// For tickets and wikis
    Md,
}

/// A report: what a summary comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The first and last event (RFC 3339, UTC).
    pub from: String,
    /// See `from`.
    pub to: String,
    /// Events that were read.
    pub events: u64,
    /// Lines that are no events.
    pub skipped: u64,
    /// Hosts that wrote them.
    pub hosts: usize,
    /// All calls.
    pub calls: Calls,
    /// Callers in all, also those of IMDSv2 alone.
    pub callers: usize,
    /// Those that used IMDSv1, those with most calls that were answered first.
    pub v1_callers: Vec<Row>,
    /// Calls by hour or day.
    pub timeline: Vec<Period>,
}

/// A caller that used IMDSv1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// Who it is.
    #[serde(flatten)]
    pub identity: Identity,
    /// Its calls.
    pub calls: Calls,
    /// The first and last IMDSv1 call (RFC 3339, UTC).
    pub first: String,
    /// See `first`.
    pub last: String,
    /// What it asked for, the worst first.
    pub paths: Vec<Path>,
    /// IMDSv1 calls by host, most first.
    pub hosts: Vec<Count>,
    /// By user agent.
    pub user_agents: Vec<Count>,
    /// By the program that started it.
    pub parents: Vec<Count>,
    /// How it comes to run: cron, ssh, sudo, timer.
    pub via: Vec<String>,
    /// Rules that let it.
    pub rules: Vec<String>,
    /// What to do.
    pub advice: Advice,
}

/// A path, and how often it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Path {
    /// The path, as sent.
    pub path: String,
    /// What it gives.
    pub wanted: Wanted,
    /// IMDSv1 calls.
    pub calls: u64,
}

/// A name, and how often it came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Count {
    /// The name.
    pub name: String,
    /// IMDSv1 calls.
    pub calls: u64,
}

/// Calls of an hour or a day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Period {
    /// When it begins: `2026-11-24` or `2026-11-24T12`.
    pub begin: String,
    /// IMDSv1.
    pub v1: u64,
    /// IMDSv2, and requests for tokens.
    pub v2: u64,
}

/// Hours after which days are shown.
const MOST_HOURS: usize = 72;

impl Report {
    /// What a summary comes to.
    #[must_use]
    pub fn of(summary: &Summary) -> Self {
        let row = |(identity, caller): (&Identity, &super::Caller)| {
            let user_agents = counts(&caller.user_agents);
            let is_fallback = caller.calls.v1_fallback * 2 > caller.calls.v1;
            Row {
                identity: identity.clone(),
                calls: caller.calls,
                first: caller.first.clone(),
                last: caller.last.clone(),
                paths: paths(&caller.paths),
                hosts: counts(&caller.hosts),
                advice: advise(user_agents.iter().map(|it| it.name.as_str()), is_fallback),
                user_agents,
                parents: counts(&caller.parents),
                via: caller.via.iter().cloned().collect(),
                rules: caller.rules.iter().cloned().collect(),
            }
        };
        Self {
            from: summary.first.clone(),
            to: summary.last.clone(),
            events: summary.events,
            skipped: summary.skipped,
            hosts: summary.coverage.hosts(),
            calls: summary.calls,
            callers: summary.caller_count(),
            v1_callers: summary.v1_callers().into_iter().map(row).collect(),
            timeline: timeline(summary),
        }
    }

    /// The report in some form.
    ///
    /// # Errors
    /// It cannot be written in that form.
    pub fn render(&self, form: Form) -> anyhow::Result<String> {
        match form {
            Form::Table => Ok(table::table(self)),
            Form::Json => Ok(to_json_pretty(self)? + "\n"),
            Form::Csv => csv::csv(self),
            Form::Html => Ok(html::html(self)),
            Form::Md => Ok(markdown::markdown(self)),
        }
    }
}

fn counts(names: &HashMap<String, u64>) -> Vec<Count> {
    let count = |(name, calls): (&String, &u64)| Count {
        name: name.clone(),
        calls: *calls,
    };
    let mut counts: Vec<_> = names.iter().map(count).collect();
    counts.sort_by(|one, other| (other.calls, &one.name).cmp(&(one.calls, &other.name)));
    counts
}

fn paths(paths: &BTreeMap<Wanted, HashMap<String, u64>>) -> Vec<Path> {
    let of_kind = |(wanted, paths): (&Wanted, &HashMap<String, u64>)| {
        let wanted = *wanted;
        let path = move |Count { name, calls }| Path {
            path: name,
            wanted,
            calls,
        };
        counts(paths).into_iter().map(path).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_kind).collect()
}

fn timeline(summary: &Summary) -> Vec<Period> {
    let length = if summary.hours.len() > MOST_HOURS {
        10
    } else {
        13
    };
    let mut periods: Vec<Period> = Vec::new();
    for (hour, calls) in &summary.hours {
        let begin = hour.get(..length).unwrap_or(hour);
        let is_same = periods.last().is_some_and(|period| period.begin == begin);
        if !is_same {
            periods.push(Period {
                begin: begin.to_owned(),
                v1: 0,
                v2: 0,
            });
        }
        if let Some(period) = periods.last_mut() {
            period.v1 += calls.v1;
            period.v2 += calls.v2 + calls.token;
        }
    }
    periods
}

/// Text that callers may have chosen, for a terminal or a page: control characters, and characters that
/// change the direction of text or begin a line, are shown as codes.
#[must_use]
pub fn plain(text: &str) -> String {
    let is_plain = |it: char| !it.is_control() && !obeyed(it);
    let mut plain = String::with_capacity(text.len());
    for it in text.chars() {
        match is_plain(it) {
            true => plain.push(it),
            false => plain.extend(it.escape_default()),
        }
    }
    plain
}

/// A number with separators: `12,345`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A time without fractions of a second.
fn short(time: &str) -> String {
    match time.get(..16) {
        Some(short) => short.replace('T', " "),
        None => time.to_owned(),
    }
}
