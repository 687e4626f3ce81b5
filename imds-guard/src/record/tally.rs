//! What has happened lately, in numbers, for those who ask.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Layer, Metrics, Packet, RefusedConnection, Request};
use crate::policy::{Caller, Imds, Verdict};

/// How far back callers are counted: so many periods of so long.
const PERIODS: usize = 60;
const PERIOD: Duration = Duration::from_secs(60);
/// Callers that are told apart within a period; the others are one.
const CALLERS: usize = 256;
/// What the others are called.
const OTHERS: &str = "(others)";

/// Numbers since the start, and callers of the last hour.
pub struct Tally {
    since: Instant,
    numbers: Mutex<Numbers>,
    metrics: Metrics,
}

#[derive(Default)]
struct Numbers {
    totals: Totals,
    rules: HashMap<Arc<str>, u64>,
    /// The last periods, each in the place of its number.
    periods: Vec<Period>,
}

#[derive(Clone, Default)]
struct Period {
    number: u64,
    callers: HashMap<String, ByVersion>,
}

/// Numbers since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Totals {
    /// Requests by version of the protocol.
    pub requests: ByVersion,
    /// Requests that were refused.
    pub denied: u64,
    /// Requests that were forwarded and marked.
    pub audited: u64,
    /// Packets that the backstop dropped.
    pub backstop_dropped: u64,
    /// Packets that the perimeter dropped.
    pub perimeter_dropped: u64,
}

/// Requests by version of the protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ByVersion {
    /// IMDSv1.
    pub v1: u64,
    /// IMDSv2.
    pub v2: u64,
    /// For session tokens.
    pub token: u64,
}

impl ByVersion {
    fn add(&mut self, imds: Imds) {
        match imds {
            Imds::V1 => self.v1 += 1,
            Imds::V2 => self.v2 += 1,
            Imds::Token => self.token += 1,
        }
    }
}

/// What a caller runs: its program, or a script under an interpreter.
#[must_use]
pub fn program(caller: &Caller) -> String {
    let program = caller.exe.as_deref().unwrap_or(&caller.comm);
    match &caller.script {
        Some(script) => {
            let interpreter = program.rsplit('/').next().unwrap_or(program);
            format!("{script} under {interpreter}")
        }
        None => program.to_owned(),
    }
}

/// What a caller is counted as: its program, and where it runs.
#[must_use]
pub fn label(caller: &Caller) -> String {
    let program = program(caller);
    let image = caller.container.as_ref().and_then(|it| it.image.as_deref());
    let place = image
        .or(caller
            .container_id
            .as_deref()
            .map(|id| &id[..id.floor_char_boundary(12)]))
        .or(caller.systemd_unit.as_deref())
        .or(caller.user.as_deref());
    match place {
        Some(place) => format!("{program} ({place})"),
        None => program,
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            numbers: Mutex::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Tally {
    /// Counts a request.
    pub fn request(&self, request: &Request, rule: Option<&Arc<str>>) {
        self.metrics.request(request);
        let number = self.since.elapsed().as_secs() / PERIOD.as_secs();
        let mut numbers = self.numbers();
        match request.verdict {
            Verdict::Deny => numbers.totals.denied += 1,
            Verdict::Audit => numbers.totals.audited += 1,
            Verdict::Allow | Verdict::Upgrade => {}
        }
        if let Some(rule) = rule {
            *numbers.rules.entry(Arc::clone(rule)).or_default() += 1;
        }
        let Some(imds) = request.imds else { return };
        numbers.totals.requests.add(imds);
        numbers.period(number).count(label(&request.caller), imds);
    }

    /// Counts a connection that was closed before any request.
    pub fn refused(&self, refused: &RefusedConnection) {
        self.metrics.refused(refused);
    }

    /// What Prometheus is told.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Counts packets.
    pub fn packet(&self, packet: &Packet) {
        if packet.verdict == Verdict::Deny {
            let totals = &mut self.numbers().totals;
            *match packet.layer {
                Layer::Backstop => &mut totals.backstop_dropped,
                Layer::Perimeter => &mut totals.perimeter_dropped,
            } += 1 + packet.unreported;
        }
    }

    /// Numbers since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.numbers().totals
    }

    /// How long ago that was.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.since.elapsed()
    }

    /// How often each rule has matched.
    #[must_use]
    pub fn rule_hits(&self) -> BTreeMap<String, u64> {
        let numbers = self.numbers();
        let hits = numbers.rules.iter();
        hits.map(|(rule, hits)| (rule.to_string(), *hits)).collect()
    }

    /// The callers of the last hour.
    #[must_use]
    pub fn callers(&self) -> BTreeMap<String, ByVersion> {
        let oldest =
            (self.since.elapsed().as_secs() / PERIOD.as_secs()).saturating_sub(PERIODS as u64 - 1);
        let mut callers = BTreeMap::<String, ByVersion>::new();
        for period in self
            .numbers()
            .periods
            .iter()
            .filter(|it| it.number >= oldest)
        {
            for (label, count) in &period.callers {
                let sum = callers.entry(label.clone()).or_default();
                sum.v1 += count.v1;
                sum.v2 += count.v2;
                sum.token += count.token;
            }
        }
        callers
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Period {
    fn count(&mut self, label: String, imds: Imds) {
        let has_room = self.callers.len() < CALLERS || self.callers.contains_key(&label);
        let label = if has_room { label } else { OTHERS.into() };
        self.callers.entry(label).or_default().add(imds);
    }
}

impl Numbers {
    fn period(&mut self, number: u64) -> &mut Period {
        self.periods.resize(PERIODS, Period::default());
        let period = &mut self.periods[number as usize % PERIODS];
        if period.number != number {
            *period = Period {
                number,
                ..Period::default()
            };
        }
        period
    }
}
