//! What is a gap, and what is none.

use super::*;

/// A log of one host: minutes after midnight, and the rest of the event.
fn gaps(events: &[(i64, &str)], elastic: bool) -> Vec<String> {
    let mut coverage = Coverage::default();
    for (minute, rest) in events {
        let time = Timestamp::from_second(1_790_000_000 / 86_400 * 86_400 + minute * 60).unwrap();
        let text = format!(r#"{{"schema":1,"time":"{time:.6}","host":"h",{rest}}}"#);
        let line: Line<'_> = serde_json::from_str(&text).unwrap();
        if *minute < 0 {
            coverage.before("h", &line);
        } else {
            coverage.add("h", &line);
        }
    }
    let begin = Timestamp::from_second(1_790_000_000 / 86_400 * 86_400).unwrap();
    let end = Timestamp::from_second(begin.as_second() + 3600).unwrap();
    let hosts = coverage.judge(begin, end, elastic);
    hosts[0].gaps.iter().map(|gap| gap.why.clone()).collect()
}

const ALIVE: &str = r#""event":"alive","redirected":5,"unattended_bypassed":1"#;
/// Of kernel programs that were attached anew.
const FRESH: &str = r#""event":"alive","redirected":1"#;
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
        gaps(&[(-5, ALIVE), (5, ALIVE), (15, ALIVE), (50, ALIVE)], false),
        [silent]
    );
    assert_eq!(
        gaps(&[(-5, ALIVE), (40, ALIVE), (50, ALIVE)], false),
        [silent],
        "it began late"
    );
    assert_eq!(
        gaps(&[(-5, ALIVE), (40, ALIVE), (50, ALIVE), (55, STOP)], true),
        [""; 0]
    );
    let detached = r#""event":"started","adopted":false"#;
    assert_eq!(
        gaps(
            &[
                (-5, ALIVE),
                (5, STOP),
                (6, detached),
                (20, FRESH),
                (40, FRESH)
            ],
            false
        ),
        ["no guard was there"]
    );
    let past =
        r#""event":"started","adopted":true,"counts":{"redirected":6,"unattended_bypassed":4}"#;
    assert_eq!(
        gaps(
            &[(-5, ALIVE), (5, STOP), (6, past), (20, ALIVE), (40, ALIVE)],
            false
        ),
        ["3 connections or packets went past while no guard was there"]
    );
    assert_eq!(
        gaps(
            &[
                (-5, ALIVE),
                (5, ALIVE),
                (6, START),
                (20, ALIVE),
                (40, ALIVE)
            ],
            false
        ),
        ["the guard ended without a word: its last events may be missing"]
    );
    let lost = r#""event":"events_lost","count":7"#;
    assert_eq!(
        gaps(&[(-5, ALIVE), (5, ALIVE), (20, lost), (40, ALIVE)], false),
        ["7 events were lost"]
    );
    let around = r#""event":"alive","redirected":9,"unattended_bypassed":1,"bypassed":2"#;
    assert_eq!(
        gaps(
            &[(-5, ALIVE), (5, ALIVE), (20, around), (40, around)],
            false
        ),
        ["2 connections or packets went past the guard"]
    );
}

#[test]
fn a_handover_is_no_gap_and_hides_none() {
    const FIRST: &str = r#""event":"alive","redirected":5,"pid":1"#;
    const TAKES_OVER: &str =
        r#""event":"started","adopted":true,"counts":{"redirected":6},"took_over_from":1"#;
    const FIRST_ENDS: &str = r#""event":"stopped","redirected":6,"pid":1"#;
    const SECOND: &str = r#""event":"alive","redirected":7,"pid":2"#;
    const SECOND_ENDS: &str = r#""event":"stopped","redirected":7,"pid":2"#;
    const AGAIN: &str = r#""event":"started","adopted":true,"counts":{"redirected":7}"#;
    let with = |rest: &[(i64, &str)]| {
        let handover = [(-5, FIRST), (5, FIRST), (15, TAKES_OVER), (16, FIRST_ENDS)];
        gaps(&[&handover, rest].concat(), false)
    };
    assert_eq!(with(&[(35, SECOND), (55, SECOND)]), [""; 0]);
    assert_eq!(with(&[(20, SECOND_ENDS), (55, AGAIN)]), [""; 0]);
    assert_eq!(
        with(&[(20, AGAIN), (40, SECOND)]),
        ["the guard ended without a word: its last events may be missing"],
        "the end of the first is not that of the second"
    );
    let past = r#""event":"stopped","redirected":6,"packets_passed":3,"pid":1"#;
    assert_eq!(
        gaps(
            &[(-5, FIRST), (15, TAKES_OVER), (16, past), (40, SECOND)],
            false
        ),
        ["3 connections or packets went past the guard"]
    );
}

#[test]
fn what_is_not_watched_is_a_gap() {
    let narrow = r#""event":"alive","unwatched":["other_cgroups"]"#;
    assert_eq!(
        gaps(
            &[(-5, narrow), (15, narrow), (35, narrow), (55, narrow)],
            false
        ),
        ["only one cgroup was watched (--cgroup)"],
        "one gap, not three"
    );
    let packet = r#""event":"packet","verdict":"audit""#;
    assert_eq!(
        gaps(
            &[(-5, ALIVE), (20, ALIVE), (40, ALIVE), (45, packet)],
            false
        ),
        ["packets went past the guard"]
    );
    let dropped = r#""event":"packet","verdict":"deny""#;
    assert_eq!(
        gaps(
            &[(-5, ALIVE), (20, ALIVE), (40, ALIVE), (45, dropped)],
            false
        ),
        [""; 0]
    );
}

#[test]
fn hosts_that_come_and_go_say_when_they_go() {
    assert_eq!(gaps(&[(-5, ALIVE), (20, ALIVE), (25, STOP)], true), [""; 0]);
    assert_eq!(
        gaps(&[(20, FRESH), (25, FRESH)], true),
        ["nothing was heard of the guard"]
    );
    let mut coverage = Coverage::default();
    let text = format!(r#"{{"time":"2026-01-01T00:00:00Z","host":"h",{ALIVE}}}"#);
    coverage.before("h", &serde_json::from_str(&text).unwrap());
    assert_eq!(coverage.hosts(), 0, "of before");
}
