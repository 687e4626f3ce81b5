//! Was every host watched all the time? Only then does a log without IMDSv1 prove something.

use std::collections::{BTreeMap, HashMap};

use jiff::{Timestamp, civil::Date, tz::TimeZone};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Lifecycle, Line};
use crate::{
    policy::Verdict,
    record::{ALIVE, Unwatched},
};

/// Minutes without any event after which nobody is taken to have watched.
const SILENCE: i64 = (ALIVE.as_secs() as i64 / 60) * 2 + 5;
/// Starts, stops and the like that are remembered for each host.
const MOST_TURNS: usize = 200_000;
/// Minutes that are told apart: ten years.
const MOST_MINUTES: i64 = 10 * 366 * 24 * 60;

/// When which host was watched.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    hosts: HashMap<String, Host>,
    /// The day that was asked for last, and its first minute.
    day: (String, i64),
}

#[derive(Clone, Debug, Default)]
struct Host {
    /// Minutes since 1970 with an event, as bits, from the first word's number on.
    heard: BTreeMap<i64, u64>,
    turns: Vec<Turn>,
    /// The last turn before the time that is looked at.
    before: Option<Turn>,
    /// When a packet was last seen going past; the next turn counts it.
    last_packet: String,
    /// There were more turns than are remembered.
    has_more: bool,
}

/// A point in the life of a guard.
#[derive(Clone, Debug)]
struct Turn {
    time: String,
    minute: i64,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Started {
        adopted: bool,
        took_over_from: Option<u32>,
        counts: Seen,
    },
    Alive(State),
    Stopped(State),
    Lost(u64),
}

/// What a guard says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    pid: u32,
    seen: Seen,
    unwatched: Vec<Unwatched>,
}

/// What kernel programs have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    redirected: u64,
    /// Connections and packets that no guard has judged.
    past: u64,
}

/// How one host was watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostCoverage {
    /// Its name.
    pub host: String,
    /// When it was not, or not wholly; empty if it always was.
    pub gaps: Vec<Gap>,
}

/// A time in which something may have been missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Gap {
    /// Since when (RFC 3339, UTC).
    pub from: String,
    /// Until when.
    pub to: String,
    /// What happened.
    pub why: String,
}

impl Coverage {
    /// Takes an event into account, in any order.
    pub(super) fn add(&mut self, host: &str, line: &Line<'_>) {
        let Some(minute) = self.minute(&line.time) else {
            return;
        };
        let host = self.host(host);
        // The last of a line that stands for many is when it was written.
        *host.heard.entry(minute.div_euclid(64)).or_default() |= 1 << minute.rem_euclid(64);
        if line.event == Lifecycle::Packet && line.verdict == Some(Verdict::Audit) {
            host.note_packet(&line.time);
        }
        let Some(what) = What::of(line) else { return };
        if host.turns.len() == MOST_TURNS {
            host.has_more = true;
            return;
        }
        let time = line.time.to_string();
        host.turns.push(Turn { time, minute, what });
    }

    /// Takes an event of before into account: was the host watched then?
    pub(super) fn before(&mut self, host: &str, line: &Line<'_>) {
        let Some(what) = What::of(line) else { return };
        let Some(minute) = self.minute(&line.time) else {
            return;
        };
        let time = line.time.to_string();
        self.host(host).precede(Turn { time, minute, what });
    }

    /// Takes what another thread has read.
    pub(super) fn merge(&mut self, other: Self) {
        for (name, theirs) in other.hosts {
            let host = self.host(&name);
            for (word, bits) in theirs.heard {
                *host.heard.entry(word).or_default() |= bits;
            }
            host.turns.extend(theirs.turns);
            host.has_more |= theirs.has_more;
            host.note_packet(&theirs.last_packet);
            if let Some(turn) = theirs.before {
                host.precede(turn);
            }
        }
    }

    /// How many hosts were heard of.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts.values().filter(|host| host.is_heard()).count()
    }

    /// How each host was watched from one time to another. `elastic`: hosts come and go, so that the time
    /// before the first event and after the last one of a host is none of its, if the guard has said that it
    /// stops.
    #[must_use]
    pub fn judge(&self, from: Timestamp, to: Timestamp, elastic: bool) -> Vec<HostCoverage> {
        let mut hosts: Vec<_> = self
            .hosts
            .iter()
            .filter(|(_, host)| !elastic || host.is_heard())
            .map(|(name, host)| HostCoverage {
                host: name.clone(),
                gaps: host.gaps(from, to, elastic),
            })
            .collect();
        hosts.sort_by(|one, other| one.host.cmp(&other.host));
        hosts
    }

    fn host(&mut self, name: &str) -> &mut Host {
        if !self.hosts.contains_key(name) {
            self.hosts.insert(name.to_owned(), Host::default());
        }
        self.hosts.entry(name.to_owned()).or_default()
    }

    /// Minutes since 1970 of a time as in events.
    fn minute(&mut self, time: &str) -> Option<i64> {
        let (day, clock) = time.split_at_checked(10)?;
        if self.day.0 != day {
            let date: Date = day.parse().ok()?;
            let begin = date.to_zoned(TimeZone::UTC).ok()?.timestamp();
            self.day = (day.to_owned(), begin.as_second().div_euclid(60));
        }
        let number = |at: usize| clock.get(at..at + 2)?.parse::<i64>().ok();
        let minute = self.day.1 + number(1)? * 60 + number(4)?;
        (0..MOST_MINUTES * 10).contains(&minute).then_some(minute)
    }
}

impl What {
    fn of(line: &Line<'_>) -> Option<Self> {
        let state = || State {
            pid: line.pid.unwrap_or_default(),
            seen: Seen {
                redirected: line.redirected,
                past: line.bypassed + line.packets_passed + line.unattended_bypassed,
            },
            unwatched: line.unwatched.clone(),
        };
        match line.event {
            Lifecycle::Started => {
                let counts = line.counts.unwrap_or_default();
                Some(Self::Started {
                    adopted: line.adopted,
                    took_over_from: line.took_over_from,
                    counts: Seen {
                        redirected: counts.redirected,
                        past: counts.bypassed + counts.packets_passed + counts.unattended_bypassed,
                    },
                })
            }
            Lifecycle::Alive => Some(Self::Alive(state())),
            Lifecycle::Stopped => Some(Self::Stopped(state())),
            Lifecycle::EventsLost => Some(Self::Lost(line.count.unwrap_or(1))),
            _ => None,
        }
    }

    fn seen(&self) -> Option<Seen> {
        match self {
            Self::Started { counts, .. } => Some(*counts),
            Self::Alive(state) | Self::Stopped(state) => Some(state.seen),
            Self::Lost(_) => None,
        }
    }
}

/// The gaps of a host, in the making.
#[derive(Default)]
struct Gaps(Vec<Gap>);

impl Gaps {
    /// Adds one; what goes on for the same reason is one.
    fn add(&mut self, from: &str, to: &str, why: String) {
        if let Some(last) = self.0.last_mut()
            && last.why == why
            && last.to == from
        {
            to.clone_into(&mut last.to);
            return;
        }
        self.0.push(Gap {
            from: from.to_owned(),
            to: to.to_owned(),
            why,
        });
    }
}

impl Host {
    fn is_heard(&self) -> bool {
        !self.heard.is_empty()
    }

    fn precede(&mut self, turn: Turn) {
        if self.before.as_ref().is_none_or(|it| it.time < turn.time) {
            self.before = Some(turn);
        }
    }

    fn note_packet(&mut self, time: &str) {
        if time > self.last_packet.as_str() {
            time.clone_into(&mut self.last_packet);
        }
    }

    fn gaps(&self, from: Timestamp, to: Timestamp, elastic: bool) -> Vec<Gap> {
        let mut gaps = Gaps::default();
        let mut turns: Vec<_> = self.turns.iter().collect();
        turns.sort_by(|one, other| one.time.cmp(&other.time));
        self.add_silences(from, to, elastic, &turns, &mut gaps);
        let end = self.add_turns(&turns, &mut gaps);
        if self.has_more {
            let why = format!("there were more than {MOST_TURNS} starts, stops and losses");
            gaps.add(&at(minute(from)), &at(minute(to)), why);
        }
        if self.last_packet.as_str() > end {
            let why = "packets went past the guard".into();
            gaps.add(&self.last_packet, &self.last_packet, why);
        }
        gaps.0.sort_by(|one, other| one.from.cmp(&other.from));
        gaps.0
    }

    /// What starts, stops and the like tell. Returns the time of the last that counts what went past.
    fn add_turns<'a>(&'a self, turns: &[&'a Turn], gaps: &mut Gaps) -> &'a str {
        let mut before = self.before.as_ref();
        let mut seen = before.and_then(|turn| turn.what.seen());
        // A guard that was taken over from, and has not stopped yet.
        let mut leaving = None;
        for &turn in turns {
            let since = before.map_or(turn.time.as_str(), |it| it.time.as_str());
            let mut add_past = |now: Seen| {
                let past = now.past.saturating_sub(seen.map_or(0, |seen| seen.past));
                if past > 0 {
                    let why = format!("{past} connections or packets went past the guard");
                    gaps.add(since, &turn.time, why);
                }
            };
            let mut is_leaving = false;
            match &turn.what {
                What::Started {
                    took_over_from: Some(pid),
                    counts,
                    ..
                } => {
                    leaving = Some(*pid);
                    add_past(*counts);
                }
                What::Started {
                    adopted, counts, ..
                } => {
                    if let Some(before) = before
                        && let Some(why) = unwatched(before, *adopted, *counts)
                    {
                        gaps.add(since, &turn.time, why);
                    }
                }
                What::Lost(count) => {
                    gaps.add(since, &turn.time, format!("{count} events were lost"));
                }
                What::Alive(state) | What::Stopped(state) => {
                    is_leaving = leaving == Some(state.pid);
                    add_past(state.seen);
                    for what in &state.unwatched {
                        gaps.add(since, &turn.time, words(*what).into());
                    }
                }
            }
            if let Some(now) = turn.what.seen() {
                seen = Some(now);
                match is_leaving {
                    true => leaving = None,
                    false => before = Some(turn),
                }
            }
        }
        before.map_or("", |turn| turn.time.as_str())
    }

    /// Times in which nothing was heard of the host, and should have been.
    fn add_silences(
        &self,
        from: Timestamp,
        to: Timestamp,
        elastic: bool,
        turns: &[&Turn],
        gaps: &mut Gaps,
    ) {
        let has_stopped =
            matches!(turns.last(), Some(turn) if matches!(turn.what, What::Stopped(_)));
        let mut marks = Vec::new();
        if !elastic {
            marks.push(minute(from));
        }
        marks.extend(self.minutes());
        if !elastic || !has_stopped {
            marks.push(minute(to));
        }
        for pair in marks.windows(2) {
            let (silent_from, silent_to) = (pair[0], pair[1]);
            if silent_to - silent_from <= SILENCE {
                continue;
            }
            // Between a stop and the next start, that start tells.
            let ends_with_start = turns
                .iter()
                .any(|turn| turn.minute == silent_to && matches!(turn.what, What::Started { .. }));
            let begins_with_stop = turns
                .iter()
                .any(|turn| turn.minute == silent_from && matches!(turn.what, What::Stopped(_)));
            if !(ends_with_start && begins_with_stop) {
                let why = "nothing was heard of the guard".into();
                gaps.add(&at(silent_from), &at(silent_to), why);
            }
        }
    }

    fn minutes(&self) -> Vec<i64> {
        let mut minutes = Vec::new();
        for (word, bits) in &self.heard {
            let set = (0..64).filter(|bit| bits & (1 << bit) != 0);
            minutes.extend(set.map(|bit| word * 64 + bit));
        }
        minutes
    }
}

/// Why something may have been missed between one turn and the next start; `None` if nothing was.
fn unwatched(before: &Turn, adopted: bool, counts: Seen) -> Option<String> {
    let What::Stopped(State { seen: then, .. }) = &before.what else {
        return Some("the guard ended without a word: its last events may be missing".into());
    };
    if !adopted || counts.redirected < then.redirected {
        return Some("no guard was there".into());
    }
    match counts.past.saturating_sub(then.past) {
        0 => None,
        count => Some(format!(
            "{count} connections or packets went past while no guard was there"
        )),
    }
}

fn words(unwatched: Unwatched) -> &'static str {
    match unwatched {
        Unwatched::OtherCgroups => "only one cgroup was watched (--cgroup)",
        Unwatched::Backstop => "packets that go around the redirect were not watched (backstop)",
        Unwatched::Perimeter => "packets that are forwarded were not watched (perimeter, uplink)",
    }
}

fn minute(time: Timestamp) -> i64 {
    time.as_second().div_euclid(60)
}

fn at(minute: i64) -> String {
    let time = Timestamp::from_second(minute * 60).unwrap_or_default();
    time.to_string()
}

#[cfg(test)]
mod tests;
