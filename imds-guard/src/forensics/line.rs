//! A line of an event log, as far as forensics need it: nothing is copied that can be borrowed.

use std::borrow::Cow;

use serde::Deserialize;

use crate::{
    policy::{Imds, Verdict},
    record::Counts,
};

/// Text that stays where it was read, unless it has escapes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// A line. What the kinds of events do not share is optional.
#[derive(Debug, Deserialize)]
pub struct Line<'a> {
    #[serde(borrow)]
    pub time: Text<'a>,
    #[serde(borrow)]
    pub host: Text<'a>,
    pub event: Lifecycle,

    pub verdict: Option<Verdict>,
    pub imds: Option<Imds>,
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
}

#[derive(Debug, Deserialize)]
pub struct Folded<'a> {
    pub count: u64,
    #[serde(borrow)]
    pub first: Text<'a>,
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

impl Text<'_> {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text, if there is one.
pub fn text<'a>(text: &'a Option<Text<'_>>) -> Option<&'a str> {
    text.as_ref().map(Text::as_str)
}
