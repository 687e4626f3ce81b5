//! What was seen since the screen was opened.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::{
    policy::{Imds, Verdict},
    record::{Event, Kind, label, words},
};

/// Callers that are kept; of more, those that have been silent for longest go.
const MOST_CALLERS: usize = 1000;
/// Refusals that are kept.
const MOST_REFUSALS: usize = 50;
/// Over how long a rate is measured.
const WINDOW: Duration = Duration::from_secs(5);

/// Callers and refusals.
pub struct Seen {
    /// How callers are sorted.
    pub order: Order,
    /// Events that came too fast.
    pub missed: u64,
    callers: HashMap<String, Row>,
    refusals: VecDeque<String>,
    since: Instant,
    window: Instant,
}

/// How callers are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    V1,
    Rate,
    Denied,
    Name,
}

/// One caller.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub v1: u64,
    pub v2: u64,
    pub token: u64,
    /// Let through, but not because it is IMDSv2 as it should be: in audit mode, or carried over by a rule.
    pub marked: u64,
    pub denied: u64,
    /// Calls a second.
    pub rate: f64,
    recent: u64,
    last: Instant,
}

impl Seen {
    pub fn new(now: Instant) -> Self {
        Self {
            order: Order::V1,
            missed: 0,
            callers: HashMap::new(),
            refusals: VecDeque::new(),
            since: now,
            window: now,
        }
    }

    /// Takes an event into account.
    pub fn add(&mut self, event: &Event, now: Instant) {
        let is_refusal = match &event.kind {
            Kind::Request(request) => request.verdict == Verdict::Deny,
            Kind::Packet(_) | Kind::ConnectionRefused(_) => true,
            _ => false,
        };
        if is_refusal {
            self.refusals.push_front(words(event));
            self.refusals.truncate(MOST_REFUSALS);
        }
        let Kind::Request(request) = &event.kind else {
            return;
        };
        let name = label(&request.caller);
        if self.callers.len() >= MOST_CALLERS && !self.callers.contains_key(&name) {
            self.forget_one();
        }
        let row = self.callers.entry(name.clone()).or_insert_with(|| Row {
            name,
            v1: 0,
            v2: 0,
            token: 0,
            marked: 0,
            denied: 0,
            rate: 0.0,
            recent: 0,
            last: now,
        });
        match request.imds {
            Some(Imds::V1) => row.v1 += 1,
            Some(Imds::V2) => row.v2 += 1,
            Some(Imds::Token) => row.token += 1,
            None => {}
        }
        match request.verdict {
            Verdict::Allow => {}
            Verdict::Audit | Verdict::Upgrade => row.marked += 1,
            Verdict::Deny => row.denied += 1,
        }
        row.recent += 1;
        row.last = now;
    }

    /// Measures rates anew, once there is enough to measure.
    pub fn age(&mut self, now: Instant) {
        let passed = now.duration_since(self.window);
        let is_young = self.since == self.window;
        if passed < WINDOW && !is_young || passed.is_zero() {
            return;
        }
        for row in self.callers.values_mut() {
            row.rate = row.recent as f64 / passed.as_secs_f64();
            if passed >= WINDOW {
                row.recent = 0;
            }
        }
        if passed >= WINDOW {
            self.window = now;
        }
    }

    /// The callers, as they are to be shown.
    pub fn rows(&self) -> Vec<&Row> {
        let mut rows: Vec<_> = self.callers.values().collect();
        rows.sort_by(|one, other| {
            let by = match self.order {
                Order::V1 => other.v1.cmp(&one.v1),
                Order::Rate => other.rate.total_cmp(&one.rate),
                Order::Denied => other.denied.cmp(&one.denied),
                Order::Name => std::cmp::Ordering::Equal,
            };
            by.then_with(|| one.name.cmp(&other.name))
        });
        rows
    }

    /// The last refusals, the latest first.
    pub fn refusals(&self) -> impl Iterator<Item = &str> {
        self.refusals.iter().map(String::as_str)
    }

    fn forget_one(&mut self) {
        let oldest = self.callers.values().min_by_key(|row| row.last);
        if let Some(name) = oldest.map(|row| row.name.clone()) {
            self.callers.remove(&name);
        }
    }
}
