//! A line of an event log, as far as forensics need it: nothing is copied that can be borrowed.

use std::{borrow::Cow, ops::Deref};

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{
    policy::{Imds, Verdict},
    record::{Counts, Unwatched},
};

/// Text that stays where it was read, unless it has escapes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// A time as in events, so that it can be cut, compared and printed as it is: logs of other hosts are not to
/// be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Time<'a>(Text<'a>);

/// A line. What the kinds of events do not share is optional.
#[derive(Debug, Deserialize)]
pub struct Line<'a> {
    #[serde(borrow)]
    pub time: Time<'a>,
    #[serde(borrow)]
    pub host: Text<'a>,
    #[serde(borrow)]
    pub instance: Option<Text<'a>>,
    pub event: Lifecycle,

    pub verdict: Option<Verdict>,
    pub imds: Option<Imds>,
    #[serde(default)]
    pub status: u16,
    #[serde(default)]
    pub fallback: bool,
    #[serde(borrow)]
    pub path: Option<Text<'a>>,
    #[serde(borrow)]
    pub user_agent: Option<Text<'a>>,
    #[serde(borrow)]
    pub rule: Option<Text<'a>>,
    #[serde(borrow)]
    pub caller: Option<Caller<'a>>,
    pub folded: Option<Folded<'a>>,

    /// Of lost events.
    pub count: Option<u64>,
    /// Of a start.
    #[serde(default)]
    pub adopted: bool,
    pub took_over_from: Option<u32>,
    pub counts: Option<Counts>,
    /// Of a stop, or a sign of life: what the kernel programs have counted.
    #[serde(default)]
    pub redirected: u64,
    #[serde(default)]
    pub bypassed: u64,
    #[serde(default)]
    pub unattended_bypassed: u64,
    #[serde(default)]
    pub packets_passed: u64,
    pub pid: Option<u32>,
    #[serde(default)]
    pub unwatched: Vec<Unwatched>,
}

#[derive(Debug, Deserialize)]
pub struct Folded<'a> {
    pub count: u64,
    #[serde(borrow)]
    pub first: Time<'a>,
}

/// Which event it is, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifecycle {
    Request,
    EventsLost,
    Alive,
    Started,
    Stopped,
    Packet,
    #[serde(other)]
    Other,
}

/// Who asked.
#[derive(Debug, Deserialize)]
pub struct Caller<'a> {
    #[serde(borrow)]
    pub comm: Text<'a>,
    #[serde(borrow)]
    pub exe: Option<Text<'a>>,
    #[serde(borrow)]
    pub script: Option<Text<'a>>,
    #[serde(borrow)]
    pub user: Option<Text<'a>>,
    #[serde(borrow)]
    pub systemd_unit: Option<Text<'a>>,
    #[serde(borrow)]
    pub container_id: Option<Text<'a>>,
    #[serde(borrow)]
    pub container: Option<Container<'a>>,
    #[serde(borrow)]
    pub pod: Option<Pod<'a>>,
    #[serde(borrow, default)]
    pub parents: Vec<Parent<'a>>,
    #[serde(default)]
    pub via: Vec<crate::policy::caller::Via>,
    #[serde(default)]
    pub uid: u32,
}

#[derive(Debug, Deserialize)]
pub struct Container<'a> {
    #[serde(borrow)]
    pub image: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub struct Pod<'a> {
    #[serde(borrow)]
    pub name: Text<'a>,
    #[serde(borrow)]
    pub namespace: Text<'a>,
    #[serde(borrow)]
    pub owner: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
pub struct Parent<'a> {
    #[serde(borrow)]
    pub exe: Option<Text<'a>>,
}

impl Line<'_> {
    /// Puts into `name` what the host is called: with its instance where that is known, as names are not
    /// unique.
    pub fn name_host(&self, name: &mut String) {
        name.clear();
        name.push_str(self.host.as_str());
        if let Some(instance) = text(&self.instance) {
            name.extend([" (", instance, ")"]);
        }
    }
}

impl Text<'_> {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text, if there is one.
pub fn text<'a>(text: &'a Option<Text<'_>>) -> Option<&'a str> {
    text.as_ref().map(Text::as_str)
}

impl Deref for Time<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.as_str()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Time<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?;
        match is_time(text.as_str().as_bytes()) {
            true => Ok(Self(text)),
            false => Err(D::Error::custom("not a time as in events")),
        }
    }
}

/// Whether it is written as `2026-11-24T12:34:56.123456Z`, with or without the fraction.
fn is_time(text: &[u8]) -> bool {
    const SECONDS: &[u8] = b"0000-00-00T00:00:00";
    let Some((seconds, rest)) = text.split_at_checked(SECONDS.len()) else {
        return false;
    };
    let fits = |(byte, pattern): (&u8, &u8)| match pattern {
        b'0' => byte.is_ascii_digit(),
        _ => byte == pattern,
    };
    let fraction = rest.strip_suffix(b"Z");
    seconds.iter().zip(SECONDS).all(fits)
        && fraction.is_some_and(|rest| match rest {
            [] => true,
            [b'.', digits @ ..] => digits.len() <= 9 && digits.iter().all(u8::is_ascii_digit),
            _ => false,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_nothing_but_a_time() {
        let table = [
            ("2026-11-24T12:34:56.123456Z", true),
            ("2026-11-24T12:34:56Z", true),
            ("2026-11-24T12:34:56.123456+01:00", false),
            ("2026-11-24T12:34\u{1b}[2J6Z", false),
            ("2026-11-2€T12:34:56Z", false),
            ("<meta http-equiv=re>", false),
            ("2026-11-24T12:34:56.<b>Z", false),
            ("", false),
        ];
        for (text, expected) in table {
            assert_eq!(is_time(text.as_bytes()), expected, "{text}");
            let json = serde_json::to_string(text).unwrap();
            assert_eq!(serde_json::from_str::<Time<'_>>(&json).is_ok(), expected);
        }
    }
}
