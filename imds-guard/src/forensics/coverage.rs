//! Was every host watched all the time? Only then does a log without IMDSv1 prove something.

use std::collections::{BTreeMap, HashMap};

use jiff::{Timestamp, civil::Date, tz::TimeZone};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Lifecycle, Line};
use crate::record::ALIVE;

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
}

/// A point in the life of a guard.
#[derive(Clone, Debug)]
struct Turn {
    time: String,
    minute: i64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Started { adopted: bool, counts: Seen },
    Alive(Seen),
    Stopped(Seen),
    Lost(u64),
}

/// What kernel programs have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    redirected: u64,
    past: u64,
    unattended: u64,
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
    pub(super) fn add(&mut self, line: &Line<'_>) {
        let Some(minute) = self.minute(line.time.as_str()) else {
            return;
        };
        let host = self.host(line.host.as_str());
        // The last of a line that stands for many is when it was written.
        *host.heard.entry(minute.div_euclid(64)).or_default() |= 1 << minute.rem_euclid(64);
        if let Some(what) = What::of(line)
            && host.turns.len() < MOST_TURNS
        {
            let time = line.time.as_str().to_owned();
            host.turns.push(Turn { time, minute, what });
        }
    }

    /// Takes an event of before into account: was the host watched then?
    pub(super) fn before(&mut self, line: &Line<'_>) {
        let Some(what) = What::of(line) else { return };
        let Some(minute) = self.minute(line.time.as_str()) else {
            return;
        };
        let time = line.time.as_str().to_owned();
        self.host(line.host.as_str())
            .precede(Turn { time, minute, what });
    }

    /// Takes what another thread has read.
    pub(super) fn merge(&mut self, other: Self) {
        for (name, theirs) in other.hosts {
            let host = self.host(&name);
            for (word, bits) in theirs.heard {
                *host.heard.entry(word).or_default() |= bits;
            }
            host.turns.extend(theirs.turns);
            if let Some(turn) = theirs.before {
                host.precede(turn);
            }
        }
    }

    /// How many hosts there are.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// How each host was watched from one time to another. `elastic`: hosts come and go, so that the time
    /// before the first event and after the last one of a host is none of its.
    #[must_use]
    pub fn judge(&self, from: Timestamp, to: Timestamp, elastic: bool) -> Vec<HostCoverage> {
        let mut hosts: Vec<_> = self
            .hosts
            .iter()
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
        let seen = || Seen {
            redirected: line.redirected,
            past: line.bypassed + line.packets_passed,
            unattended: line.unattended_bypassed,
        };
        match line.event {
            Lifecycle::Started => {
                let counts = line.counts.unwrap_or_default();
                Some(Self::Started {
                    adopted: line.adopted,
                    counts: Seen {
                        redirected: counts.redirected,
                        past: counts.bypassed + counts.packets_passed,
                        unattended: counts.unattended_bypassed,
                    },
                })
            }
            Lifecycle::Alive => Some(Self::Alive(seen())),
            Lifecycle::Stopped => Some(Self::Stopped(seen())),
            Lifecycle::EventsLost => Some(Self::Lost(line.count.unwrap_or(1))),
            _ => None,
        }
    }

    fn seen(&self) -> Option<Seen> {
        match self {
            Self::Started { counts, .. } => Some(*counts),
            Self::Alive(seen) | Self::Stopped(seen) => Some(*seen),
            Self::Lost(_) => None,
        }
    }
}

impl Host {
    fn precede(&mut self, turn: Turn) {
        if self.before.as_ref().is_none_or(|it| it.time < turn.time) {
            self.before = Some(turn);
        }
    }

    fn gaps(&self, from: Timestamp, to: Timestamp, elastic: bool) -> Vec<Gap> {
        let mut gaps = Vec::new();
        let mut turns: Vec<_> = self.turns.iter().collect();
        turns.sort_by(|one, other| one.time.cmp(&other.time));
        self.add_silences(from, to, elastic, &turns, &mut gaps);
        let mut before = self.before.as_ref();
        let mut seen = before.and_then(|turn| turn.what.seen());
        for turn in turns {
            match turn.what {
                What::Started { adopted, counts } => {
                    if let Some(before) = before
                        && let Some(why) = unwatched(before, adopted, counts)
                    {
                        gaps.push(Gap {
                            from: before.time.clone(),
                            to: turn.time.clone(),
                            why,
                        });
                    }
                }
                What::Lost(count) => gaps.push(Gap {
                    from: before.map_or_else(|| turn.time.clone(), |it| it.time.clone()),
                    to: turn.time.clone(),
                    why: format!("{count} events were lost"),
                }),
                What::Alive(now) | What::Stopped(now) => {
                    let past = seen.map_or(now.past, |seen| now.past.saturating_sub(seen.past));
                    if past > 0 {
                        gaps.push(Gap {
                            from: before.map_or_else(|| turn.time.clone(), |it| it.time.clone()),
                            to: turn.time.clone(),
                            why: format!("{past} connections or packets went past the guard"),
                        });
                    }
                }
            }
            if turn.what.seen().is_some() {
                seen = turn.what.seen();
                before = Some(turn);
            }
        }
        gaps.sort_by(|one, other| one.from.cmp(&other.from));
        gaps
    }

    /// Times in which nothing was heard of the host, and should have been.
    fn add_silences(
        &self,
        from: Timestamp,
        to: Timestamp,
        elastic: bool,
        turns: &[&Turn],
        gaps: &mut Vec<Gap>,
    ) {
        let heard = self.minutes();
        let minute = |time: Timestamp| time.as_second().div_euclid(60);
        let mut marks = Vec::new();
        if !elastic {
            marks.push(minute(from));
        }
        marks.extend(heard);
        if !elastic {
            marks.push(minute(to));
        }
        for pair in marks.windows(2) {
            let (silent_from, silent_to) = (pair[0], pair[1]);
            // Between a stop and the next start, that start tells.
            let ends_with_start = turns
                .iter()
                .any(|turn| turn.minute == silent_to && matches!(turn.what, What::Started { .. }));
            let begins_with_stop = turns
                .iter()
                .any(|turn| turn.minute == silent_from && matches!(turn.what, What::Stopped(_)));
            if silent_to - silent_from > SILENCE && !(ends_with_start && begins_with_stop) {
                gaps.push(Gap {
                    from: at(silent_from),
                    to: at(silent_to),
                    why: "nothing was heard of the guard".into(),
                });
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
    let What::Stopped(then) = before.what else {
        return Some("the guard ended without a word: its last events may be missing".into());
    };
    if !adopted || counts.redirected < then.redirected {
        return Some("no guard was there".into());
    }
    match counts.unattended - then.unattended.min(counts.unattended) {
        0 => None,
        count => Some(format!(
            "{count} connections went past while no guard was there"
        )),
    }
}

fn at(minute: i64) -> String {
    let time = Timestamp::from_second(minute * 60).unwrap_or_default();
    time.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of one host: minutes after midnight, and the rest of the event.
    fn gaps(events: &[(i64, &str)], elastic: bool) -> Vec<String> {
        let mut coverage = Coverage::default();
        for (minute, rest) in events {
            let time =
                Timestamp::from_second(1_790_000_000 / 86_400 * 86_400 + minute * 60).unwrap();
            let text = format!(r#"{{"schema":1,"time":"{time:.6}","host":"h",{rest}}}"#);
            let line: Line<'_> = serde_json::from_str(&text).unwrap();
            if *minute < 0 {
                coverage.before(&line);
            } else {
                coverage.add(&line);
            }
        }
        let begin = Timestamp::from_second(1_790_000_000 / 86_400 * 86_400).unwrap();
        let end = Timestamp::from_second(begin.as_second() + 3600).unwrap();
        let hosts = coverage.judge(begin, end, elastic);
        hosts[0].gaps.iter().map(|gap| gap.why.clone()).collect()
    }

    const ALIVE: &str = r#""event":"alive","redirected":5"#;
    const STOP: &str = r#""event":"stopped","redirected":5,"unattended_bypassed":1"#;
    const START: &str =
        r#""event":"started","adopted":true,"counts":{"redirected":6,"unattended_bypassed":1}"#;

    #[test]
    fn only_what_nobody_may_have_seen_is_a_gap() {
        let whole = &[
            (-5, ALIVE),
            (5, ALIVE),
            (15, ALIVE),
            (35, ALIVE),
            (55, ALIVE),
        ];
        assert_eq!(gaps(whole, false), [""; 0]);
        let restarted = &[(-5, ALIVE), (5, ALIVE), (15, STOP), (50, START)];
        assert_eq!(
            gaps(restarted, false),
            [""; 0],
            "the kernel programs stayed"
        );
        let silent = "nothing was heard of the guard";
        assert_eq!(
            gaps(&[(5, ALIVE), (15, ALIVE), (50, ALIVE)], false),
            [silent]
        );
        assert_eq!(
            gaps(&[(40, ALIVE), (50, ALIVE)], false),
            [silent],
            "it began late"
        );
        assert_eq!(gaps(&[(40, ALIVE), (50, ALIVE)], true), [""; 0]);
        let detached = r#""event":"started","adopted":false"#;
        assert_eq!(
            gaps(&[(5, STOP), (6, detached), (20, ALIVE), (40, ALIVE)], false),
            ["no guard was there"]
        );
        let past =
            r#""event":"started","adopted":true,"counts":{"redirected":6,"unattended_bypassed":4}"#;
        assert_eq!(
            gaps(&[(5, STOP), (6, past), (20, ALIVE), (40, ALIVE)], false),
            ["3 connections went past while no guard was there"]
        );
        assert_eq!(
            gaps(&[(5, ALIVE), (6, START), (20, ALIVE), (40, ALIVE)], false),
            ["the guard ended without a word: its last events may be missing"]
        );
        let lost = r#""event":"events_lost","count":7"#;
        assert_eq!(
            gaps(&[(5, ALIVE), (20, lost), (40, ALIVE)], false),
            ["7 events were lost"]
        );
        let around = r#""event":"alive","redirected":9,"bypassed":2"#;
        assert_eq!(
            gaps(&[(5, ALIVE), (20, around), (40, around)], false),
            ["2 connections or packets went past the guard"]
        );
    }
}
