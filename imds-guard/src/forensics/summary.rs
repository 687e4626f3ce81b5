//! What logs add up to, in bounded memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Coverage, Identity, Lifecycle, Line,
    line::{Caller as LineCaller, text},
};
use crate::policy::{Imds, Verdict, caller::Via};

/// Callers that are told apart; the others are one.
const MOST_CALLERS: usize = 20_000;
/// What is remembered of each caller: names beyond these are counted as `(others)`. Paths of each kind have
/// their own, so that nobody can hide which credentials they took behind many other paths.
const MOST_PATHS: usize = 64;
const MOST_HOSTS: usize = 10_000;
const MOST_NAMES: usize = 16;
const OTHERS: &str = "(others)";
/// All these names, of all callers together.
const MOST_NAMES_IN_ALL: usize = 2_000_000;
const UNAUTHORIZED: u16 = 401;
/// Hours of the timeline: more than four years.
const MOST_HOURS: usize = 40_000;

/// Calls by version, and what became of those without a session token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Calls {
    /// IMDSv1.
    pub v1: u64,
    /// IMDSv1 that was refused, by the guard or the service: nobody gets anything from these.
    pub v1_denied: u64,
    /// IMDSv1 that the guard carried over: the service was asked with a session token.
    #[serde(default)]
    pub v1_upgraded: u64,
    /// IMDSv1 of callers whose token request was refused: they would have spoken IMDSv2.
    pub v1_fallback: u64,
    /// IMDSv2.
    pub v2: u64,
    /// For session tokens.
    pub token: u64,
    /// For session tokens, and refused.
    pub token_denied: u64,
}

impl Calls {
    /// All of them.
    #[must_use]
    pub const fn all(&self) -> u64 {
        self.v1 + self.v2 + self.token
    }

    /// Calls without a session token that the service answered: these would fail without IMDSv1.
    #[must_use]
    pub const fn needed_v1(&self) -> u64 {
        self.v1 - self.v1_denied - self.v1_upgraded
    }

    fn add(&mut self, line: &Line<'_>, calls: u64) {
        // The service itself refuses with 401 where it wants tokens (HttpTokens=required).
        let is_denied = line.verdict == Some(Verdict::Deny)
            || (line.status == UNAUTHORIZED && line.verdict != Some(Verdict::Upgrade));
        match line.imds {
            Some(Imds::V1) => {
                self.v1 += calls;
                if is_denied {
                    self.v1_denied += calls;
                } else if line.verdict == Some(Verdict::Upgrade) {
                    self.v1_upgraded += calls;
                }
                self.v1_fallback += if line.fallback { calls } else { 0 };
            }
            Some(Imds::V2) => self.v2 += calls,
            Some(Imds::Token) => {
                self.token += calls;
                self.token_denied += if is_denied { calls } else { 0 };
            }
            None => {}
        }
    }

    fn merge(&mut self, other: Self) {
        self.v1 += other.v1;
        self.v1_denied += other.v1_denied;
        self.v1_upgraded += other.v1_upgraded;
        self.v1_fallback += other.v1_fallback;
        self.v2 += other.v2;
        self.token += other.token;
        self.token_denied += other.token_denied;
    }
}

/// What kind of thing a path gives, the worst first.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Credentials of a role.
    Credentials,
    /// User data, where secrets often are.
    UserData,
    /// The signed identity document, with which instances prove who they are.
    Identity,
    /// Anything else.
    Other,
}

impl Wanted {
    /// What this path gives.
    #[must_use]
    pub fn of(path: &str) -> Self {
        let path = path.to_ascii_lowercase();
        if path.contains("security-credentials") || path.contains("identity-credentials") {
            Self::Credentials
        } else if path.contains("user-data") {
            Self::UserData
        } else if path.contains("instance-identity") {
            Self::Identity
        } else {
            Self::Other
        }
    }
}

/// What is known of one caller. Paths, user agents and parents are those of its IMDSv1 calls.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Its calls.
    pub calls: Calls,
    /// The first and last IMDSv1 call (RFC 3339, UTC); empty without one.
    pub first: String,
    /// See `first`.
    pub last: String,
    /// IMDSv1 calls by what the path gives, and by path.
    pub paths: BTreeMap<Wanted, HashMap<String, u64>>,
    /// IMDSv1 calls by host.
    pub hosts: HashMap<String, u64>,
    /// IMDSv1 calls by user agent.
    pub user_agents: HashMap<String, u64>,
    /// IMDSv1 calls by the program that started the caller.
    pub parents: HashMap<String, u64>,
    /// How it comes to run.
    pub via: BTreeSet<String>,
    /// Rules that let it.
    pub rules: BTreeSet<String>,
}

/// What logs add up to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Only from this time on, as in events.
    since: String,
    /// Lines that are events.
    pub events: u64,
    /// Lines that are none.
    pub skipped: u64,
    /// All calls.
    pub calls: Calls,
    /// Callers by who they are.
    callers: HashMap<String, (Identity, Caller)>,
    /// Calls by hour, as `2026-11-24T12`.
    pub hours: BTreeMap<String, Calls>,
    /// Whether hosts were watched all the time.
    pub coverage: Coverage,
    /// The first and last event.
    pub first: String,
    /// See `first`.
    pub last: String,
    /// Kept for what is looked up for each line.
    host: String,
    key: String,
    /// How many more names may be remembered.
    room: Room,
}

/// How many more names may be remembered, of all callers together.
#[derive(Clone, Debug)]
struct Room(usize);

impl Default for Room {
    fn default() -> Self {
        Self(MOST_NAMES_IN_ALL)
    }
}

impl Summary {
    /// Of events from this time on (RFC 3339, UTC, as in events); empty is all.
    #[must_use]
    pub fn since(since: &str) -> Self {
        Self {
            since: since.to_owned(),
            ..Self::default()
        }
    }

    /// Takes a line into account.
    pub(super) fn add(&mut self, line: &Line<'_>) {
        let time: &str = &line.time;
        line.name_host(&mut self.host);
        if time < self.since.as_str() {
            self.coverage.before(&self.host, line);
            return;
        }
        self.events += 1;
        widen(&mut self.first, &mut self.last, time);
        self.coverage.add(&self.host, line);
        if line.event != Lifecycle::Request {
            return;
        }
        let count = line.folded.as_ref().map_or(1, |folded| folded.count);
        self.calls.add(line, count);
        self.add_to_timeline(line, count);
        let Some(from) = &line.caller else { return };
        Identity::key(from, &mut self.key);
        let caller = match self.callers.get_mut(&self.key) {
            Some((_, caller)) => caller,
            None => new(&mut self.callers, &self.key, from),
        };
        caller.add(line, from, &self.host, count, &mut self.room);
    }

    /// Counts a line that is no event.
    pub(super) fn skip(&mut self) {
        self.skipped += 1;
    }

    /// The callers that used IMDSv1 and were answered, those with most calls first; then those that were
    /// refused.
    #[must_use]
    pub fn v1_callers(&self) -> Vec<(&Identity, &Caller)> {
        let all = self.callers.values();
        let mut callers: Vec<_> = all
            .filter(|(_, caller)| caller.calls.v1 > 0)
            .map(|(identity, caller)| (identity, caller))
            .collect();
        callers.sort_by_key(|(identity, caller)| {
            let calls = &caller.calls;
            (
                std::cmp::Reverse(calls.needed_v1()),
                std::cmp::Reverse(calls.v1),
                *identity,
            )
        });
        callers
    }

    /// How many callers there are in all.
    #[must_use]
    pub fn caller_count(&self) -> usize {
        self.callers.len()
    }

    /// Takes what another thread has read.
    pub(super) fn merge(&mut self, other: Self) {
        self.events += other.events;
        self.skipped += other.skipped;
        self.calls.merge(other.calls);
        for (hour, calls) in other.hours {
            self.hours.entry(hour).or_default().merge(calls);
        }
        self.coverage.merge(other.coverage);
        for time in [&other.first, &other.last] {
            if !time.is_empty() {
                widen(&mut self.first, &mut self.last, time);
            }
        }
        for (key, (identity, caller)) in other.callers {
            let has_room = self.callers.len() < MOST_CALLERS || self.callers.contains_key(&key);
            let (key, identity) = match has_room {
                true => (key, identity),
                false => (OTHERS.into(), others()),
            };
            let (_, known) = self
                .callers
                .entry(key)
                .or_insert_with(|| (identity, Caller::default()));
            known.merge(caller, &mut self.room);
        }
    }

    fn add_to_timeline(&mut self, line: &Line<'_>, count: u64) {
        // A folded line is counted where it begins: no line stands for more than its window.
        let time = line
            .folded
            .as_ref()
            .map_or(&line.time, |folded| &folded.first);
        let Some(hour) = time.get(..13) else {
            return;
        };
        if let Some(calls) = self.hours.get_mut(hour) {
            calls.add(line, count);
        } else if self.hours.len() < MOST_HOURS {
            self.hours
                .entry(hour.to_owned())
                .or_default()
                .add(line, count);
        }
    }
}

impl Caller {
    fn add(
        &mut self,
        line: &Line<'_>,
        from: &LineCaller<'_>,
        host: &str,
        count: u64,
        room: &mut Room,
    ) {
        self.calls.add(line, count);
        if line.imds != Some(Imds::V1) {
            return;
        }
        widen(&mut self.first, &mut self.last, &line.time);
        let path = text(&line.path).unwrap_or_default();
        let paths = self.paths.entry(Wanted::of(path)).or_default();
        room.tally(paths, path, count, MOST_PATHS);
        room.tally(&mut self.hosts, host, count, MOST_HOSTS);
        if let Some(agent) = text(&line.user_agent) {
            room.tally(&mut self.user_agents, agent, count, MOST_NAMES);
        }
        if let Some(parent) = from.parents.first().and_then(|parent| text(&parent.exe)) {
            room.tally(&mut self.parents, parent, count, MOST_NAMES);
        }
        for via in &from.via {
            let name = match via {
                Via::Cron => "cron",
                Via::Ssh => "ssh",
                Via::Sudo => "sudo",
                Via::Timer => "timer",
            };
            if !self.via.contains(name) {
                self.via.insert(name.into());
            }
        }
        if let Some(rule) = text(&line.rule)
            && !self.rules.contains(rule)
            && self.rules.len() < MOST_NAMES
        {
            self.rules.insert(rule.to_owned());
        }
    }

    fn merge(&mut self, other: Self, room: &mut Room) {
        self.calls.merge(other.calls);
        for time in [&other.first, &other.last] {
            if !time.is_empty() {
                widen(&mut self.first, &mut self.last, time);
            }
        }
        for (wanted, theirs) in other.paths {
            let mine = self.paths.entry(wanted).or_default();
            room.tally_all(mine, theirs, MOST_PATHS);
        }
        for (mine, theirs, most) in [
            (&mut self.hosts, other.hosts, MOST_HOSTS),
            (&mut self.user_agents, other.user_agents, MOST_NAMES),
            (&mut self.parents, other.parents, MOST_NAMES),
        ] {
            room.tally_all(mine, theirs, most);
        }
        self.via.extend(other.via);
        self.rules.extend(other.rules);
    }
}

fn new<'a>(
    callers: &'a mut HashMap<String, (Identity, Caller)>,
    key: &str,
    from: &LineCaller<'_>,
) -> &'a mut Caller {
    let (key, identity) = match callers.len() < MOST_CALLERS {
        true => (key.to_owned(), Identity::of(from)),
        false => (OTHERS.to_owned(), others()),
    };
    let (_, caller) = callers
        .entry(key)
        .or_insert_with(|| (identity, Caller::default()));
    caller
}

fn others() -> Identity {
    Identity {
        program: OTHERS.into(),
        ..Identity::default()
    }
}

impl Room {
    /// Counts a name among so many at most.
    fn tally(&mut self, names: &mut HashMap<String, u64>, name: &str, count: u64, most: usize) {
        if let Some(known) = names.get_mut(name) {
            *known += count;
        } else if names.len() < most && self.0 > 0 {
            self.0 -= 1;
            names.insert(name.to_owned(), count);
        } else {
            *names.entry(OTHERS.to_owned()).or_default() += count;
        }
    }

    fn tally_all(
        &mut self,
        names: &mut HashMap<String, u64>,
        more: HashMap<String, u64>,
        most: usize,
    ) {
        for (name, count) in more {
            self.tally(names, &name, count, most);
        }
    }
}

fn widen(first: &mut String, last: &mut String, time: &str) {
    if first.is_empty() || time < first.as_str() {
        time.clone_into(first);
    }
    if time > last.as_str() {
        time.clone_into(last);
    }
}
