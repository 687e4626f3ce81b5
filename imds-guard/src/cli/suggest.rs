//! From what was seen to rules that would let it go on.

mod paths;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use jiff::civil::Date;
use toml::Value;

use crate::{
    policy::{Caller, Imds, Reason, Verdict, caller::Pod},
    record::{Event, Kind, Request},
};

/// Kinds of what makes pods, and gives them its name with something behind it.
const MAKES_PODS: [&str; 5] = [
    "DaemonSet",
    "Deployment",
    "Job",
    "ReplicaSet",
    "StatefulSet",
];

/// What was refused, marked, or let through by an exception, and of whom.
#[derive(Default)]
pub struct Seen {
    callers: BTreeMap<Identity, Wants>,
    requests: u64,
    /// What nobody should be let do, by reason.
    left_out: BTreeMap<String, u64>,
}

/// What a caller is best known by: selectors and their patterns, in the order of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Identity(Vec<(&'static str, String)>);

/// What a caller would need.
#[derive(Default)]
struct Wants {
    /// Paths over IMDSv1, and how often each.
    v1: BTreeMap<String, u64>,
    /// Whether a rule carried over all of these: it has to go on doing so.
    is_upgraded: bool,
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
        self.requests += request.calls();
        let is_v1 = request.imds == Some(Imds::V1);
        let is_needed = match (request.verdict, request.reason) {
            // These are about to be replaced: whoever relies on an exception needs it in the new ones.
            (Verdict::Allow, Reason::Rule) | (Verdict::Upgrade, _) => is_v1,
            (Verdict::Allow, _) => false,
            (_, Reason::NoToken) => is_v1,
            (_, Reason::HopLimit | Reason::ForeignToken | Reason::UnboundToken) => true,
            (_, reason) => {
                *self.left_out.entry(reason.to_string()).or_default() += request.calls();
                false
            }
        };
        if !is_needed {
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
            Reason::NoToken | Reason::Rule | Reason::Upgraded => {
                let is_upgrade = request.verdict == Verdict::Upgrade;
                self.is_upgraded = is_upgrade && (self.is_upgraded || self.v1.is_empty());
                *self.v1.entry(request.path.clone()).or_default() += request.calls();
            }
            Reason::HopLimit => self.hops = self.hops.max(request.hops),
            _ => self.foreign = true,
        }
    }

    fn v1_rule(&self, until: Date) -> Vec<(&'static str, Value)> {
        let paths = paths::patterns(self.v1.keys().map(String::as_str));
        let paths: Vec<Value> = paths.into_iter().map(Value::from).collect();
        let action = if self.is_upgraded { "upgrade" } else { "allow" };
        vec![
            ("expires", Value::from(until.to_string())),
            ("imds", "v1".into()),
            ("path", paths.into()),
            ("action", action.into()),
        ]
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
        let exactly = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(literal);
        let mut add = |key, pattern: Option<String>| {
            let is_known = pattern.is_some();
            by.extend(pattern.map(|pattern| (key, pattern)));
            is_known
        };
        let image = caller.container.as_ref().and_then(|it| it.image.as_deref());
        let is_known = if let Some(pod) = &caller.pod {
            add("namespace", exactly(Some(&pod.namespace)));
            // Many run as the default one: not all of a namespace are meant.
            let account = pod.service_account.as_deref();
            let siblings = name_of_owner(pod).map(|owner| format!("{}-*", literal(owner)));
            add(
                "service_account",
                exactly(account.filter(|it| *it != "default")),
            ) || add("container_image", exactly(image))
                || add("pod", siblings)
                || add("pod_uid", exactly(caller.pod_uid.as_deref()))
        } else {
            add("container_image", exactly(image))
                || add("container_id", exactly(caller.container_id.as_deref()))
        };
        if !is_known {
            let is_service = |unit: &&str| unit.ends_with(".service");
            let unit = caller.systemd_unit.as_deref().filter(is_service);
            add("systemd_unit", exactly(unit));
            let exe = caller.exe.as_deref().filter(|_| caller.exe_verified);
            add("exe", exactly(exe));
            let uid = caller.uid.to_string();
            let _is_known = add("user", exactly(caller.user.as_deref())) || add("uid", Some(uid));
            if !caller.exe_verified {
                add("cgroup", exactly(caller.cgroup.as_deref()));
            }
        }
        Self(by)
    }

    fn short(&self) -> String {
        let most_telling = self.0.first().map_or("", |(_, pattern)| pattern);
        let last = most_telling.rsplit('/').next().unwrap_or_default();
        last.replace('\\', "")
    }
}

/// What the names of a pod and its like begin with.
fn name_of_owner(pod: &Pod) -> Option<&str> {
    let (kind, name) = pod.owner.as_deref()?.split_once('/')?;
    let rest = pod.name.strip_prefix(name)?;
    (MAKES_PODS.contains(&kind) && !name.is_empty() && rest.starts_with('-')).then_some(name)
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
            _ => writeln!(text, "{key} = {}", Value::from(value.as_str()))?,
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

#[cfg(test)]
mod tests;
