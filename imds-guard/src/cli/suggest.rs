//! From what was seen to rules that would let it go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use jiff::civil::Date;
use toml::Value;

use crate::{
    policy::{Caller, Imds, Reason, Verdict},
    record::{Event, Kind, Request},
};

/// Paths that a suggestion names; a caller that asks for more gets all of them.
const MAX_PATHS: usize = 8;

/// What was refused, or marked, and of whom.
#[derive(Default)]
pub struct Seen {
    callers: BTreeMap<Identity, Wants>,
    requests: u64,
    /// What nobody should be let do, by reason.
    left_out: BTreeMap<String, u64>,
}

/// What a caller is best known by: selectors and their values, in the order of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Identity(Vec<(&'static str, String)>);

/// What a caller would need.
#[derive(Default)]
struct Wants {
    /// Paths over IMDSv1, and how often each.
    v1: BTreeMap<String, u64>,
    /// Programs that ask.
    programs: BTreeSet<String>,
    /// The furthest that a token would have to travel.
    hops: u8,
    /// Whether it uses tokens where they were not issued.
    foreign: bool,
    first: String,
    last: String,
}

impl Seen {
    /// Takes an event into account.
    pub fn add(&mut self, event: &Event) {
        let Kind::Request(request) = &event.kind else {
            return;
        };
        self.requests += 1;
        if !matches!(request.verdict, Verdict::Audit | Verdict::Deny) {
            return;
        }
        let is_v1 = request.imds == Some(Imds::V1) && request.reason == Reason::NoToken;
        let is_needed = is_v1
            || matches!(
                request.reason,
                Reason::HopLimit | Reason::ForeignToken | Reason::UnboundToken
            );
        if !is_needed {
            *self.left_out.entry(request.reason.to_string()).or_default() += 1;
            return;
        }
        let wants = self
            .callers
            .entry(Identity::of(&request.caller))
            .or_default();
        wants.add(event, request);
    }

    /// Rules for all of it. Exceptions for IMDSv1 end with a day.
    ///
    /// # Errors
    /// None that is known.
    pub fn suggest(&self, until: Date) -> anyhow::Result<String> {
        let mut text = format!(
            "# Rules under which what was seen keeps working in enforce mode: {} requests, {} callers that \
             need a rule.\n# To be reviewed before use: they allow what should be fixed.\n",
            self.requests,
            self.callers.len(),
        );
        for (reason, count) in &self.left_out {
            writeln!(
                text,
                "# Not covered: {count} requests refused or marked for {reason}."
            )?;
        }
        let mut names = BTreeSet::new();
        // Rules about requests come first: one about a caller alone would end the search.
        for (identity, wants) in self
            .callers
            .iter()
            .filter(|(_, wants)| !wants.v1.is_empty())
        {
            let name = unused(&mut names, format!("{} still uses v1", identity.short()));
            write_rule(&mut text, &name, identity, wants, wants.v1_rule(until))?;
        }
        for (identity, wants) in &self.callers {
            let about_tokens = wants.token_rule();
            if !about_tokens.is_empty() {
                let name = unused(&mut names, format!("tokens of {}", identity.short()));
                write_rule(&mut text, &name, identity, wants, about_tokens)?;
            }
        }
        Ok(text)
    }
}

impl Wants {
    fn add(&mut self, event: &Event, request: &Request) {
        if self.first.is_empty() || event.time < self.first {
            self.first.clone_from(&event.time);
        }
        if event.time > self.last {
            self.last.clone_from(&event.time);
        }
        let program = request
            .caller
            .exe
            .as_deref()
            .unwrap_or(&request.caller.comm);
        self.programs.insert(program.to_owned());
        match request.reason {
            Reason::NoToken => *self.v1.entry(request.path.clone()).or_default() += 1,
            Reason::HopLimit => self.hops = self.hops.max(request.hops),
            _ => self.foreign = true,
        }
    }

    fn v1_rule(&self, until: Date) -> Vec<(&'static str, Value)> {
        let mut keys = vec![
            ("expires", Value::from(until.to_string())),
            ("imds", "v1".into()),
        ];
        if self.v1.len() <= MAX_PATHS && self.v1.keys().all(|path| is_plain(path)) {
            let paths: Vec<Value> = self.v1.keys().map(|path| path.as_str().into()).collect();
            keys.push(("path", paths.into()));
        }
        keys.push(("action", "allow".into()));
        keys
    }

    fn token_rule(&self) -> Vec<(&'static str, Value)> {
        let mut keys = Vec::new();
        if self.hops > 0 {
            keys.push(("hop_limit", i64::from(self.hops).into()));
        }
        if self.foreign {
            keys.push(("token_binding", "off".into()));
        }
        keys
    }
}

impl Identity {
    /// What stays the same when a process is started again: the pod's owner before its image, the unit
    /// before the program.
    fn of(caller: &Caller) -> Self {
        let mut by = Vec::new();
        let mut add = |key, value: Option<&str>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                by.push((key, value.to_owned()));
            }
        };
        let image = caller.container.as_ref().and_then(|it| it.image.as_deref());
        if let Some(pod) = &caller.pod {
            add("namespace", Some(&pod.namespace));
            match &pod.service_account {
                Some(account) if account != "default" => add("service_account", Some(account)),
                _ => add("container_image", image),
            }
        } else if image.is_some() {
            add("container_image", image);
        } else if caller.container_id.is_some() {
            add("container_id", caller.container_id.as_deref());
        } else {
            let is_service = |unit: &&str| unit.ends_with(".service");
            add(
                "systemd_unit",
                caller.systemd_unit.as_deref().filter(is_service),
            );
            add("exe", caller.exe.as_deref().filter(|_| caller.exe_verified));
            match &caller.user {
                Some(user) => add("user", Some(user)),
                None => add("uid", Some(&caller.uid.to_string())),
            }
            if !caller.exe_verified {
                add("cgroup", caller.cgroup.as_deref());
            }
        }
        Self(by)
    }

    fn short(&self) -> String {
        let (_, most_telling) = &self.0[0];
        most_telling
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned()
    }
}

/// Whether a path means in a rule what it says.
fn is_plain(path: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.".contains(&byte);
    path.bytes().all(is_plain)
        && !path.contains("..")
        && !path.contains("//")
        && !path.contains("/./")
}

fn unused(names: &mut BTreeSet<String>, wanted: String) -> String {
    let numbered = (2..).map(|number| format!("{wanted} ({number})"));
    let mut names_to_try = std::iter::once(wanted.clone()).chain(numbered);
    let name = names_to_try
        .find(|name| !names.contains(name))
        .unwrap_or(wanted);
    names.insert(name.clone());
    name
}

fn write_rule(
    text: &mut String,
    name: &str,
    identity: &Identity,
    wants: &Wants,
    keys: Vec<(&'static str, Value)>,
) -> anyhow::Result<()> {
    let calls: u64 = wants.v1.values().sum();
    let programs: Vec<String> = wants
        .programs
        .iter()
        .map(|it| it.escape_default().to_string())
        .collect();
    writeln!(text, "\n[[rule]]")?;
    writeln!(text, "name = {}", Value::from(name))?;
    if calls > 0 {
        let days = |time: &str| time.get(..10).unwrap_or(time).to_owned();
        let reason = format!(
            "{calls} v1 requests from {} to {} by {}",
            days(&wants.first),
            days(&wants.last),
            programs.join(", ")
        );
        writeln!(text, "reason = {}", Value::from(reason))?;
        writeln!(text, "owner = \"\" # who fixes it?")?;
    }
    for (key, value) in &identity.0 {
        match *key {
            "uid" => writeln!(text, "{key} = {value}")?,
            _ => writeln!(text, "{key} = {}", Value::from(literal(value)))?,
        }
    }
    for (key, value) in keys {
        writeln!(text, "{key} = {value}")?;
    }
    Ok(())
}

/// A text as a pattern that means nothing but itself.
fn literal(text: &str) -> String {
    let mut pattern = String::new();
    for letter in text.chars() {
        if "*?[]{}\\!".contains(letter) {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern
}
