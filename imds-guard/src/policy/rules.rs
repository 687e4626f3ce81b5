//! The whole policy: rules in their order, the mode at their end.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use jiff::Timestamp;

use super::{
    Action, Binding, Caller, Decision, HopLimitAction, Mode, Reason, Request, SessionToken, Terms,
    Verdict,
    caller::Missing,
    fit::{Ask, Fit, Subject},
    pattern::{Glob, Number, OneOf},
    rule::Rule,
};

/// What is decided, for everybody.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Whether what no rule speaks of is refused.
    pub mode: Mode,
    /// How many network hops a token may travel (1–64), as the instance's
    /// `HttpPutResponseHopLimit`; AWS's default is 1. The instance's own limit holds besides.
    pub hop_limit: u8,
    /// What becomes of token requests from further away.
    pub hop_limit_action: HopLimitAction,
    /// Where a session token is valid; `None` is the mode's own.
    pub token_binding: Option<Binding>,
    /// The first one that matches counts.
    pub rules: Arc<Rules>,
}

/// Rules in their order, and where to look for those that may match a caller.
#[derive(Debug, Default)]
pub struct Rules {
    list: Vec<Rule>,
    /// Rules that only callers of one kind can match, by what these have.
    of: HashMap<Key, Vec<u32>>,
    /// Rules that anybody may match.
    of_anybody: Vec<u32>,
    /// Of those of one kind, those that images decide, and those that pods do, for callers of whom that is not known.
    of_images: Vec<u32>,
    of_pods: Vec<u32>,
}

/// What all callers of a rule have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Uid(u32),
    Text(Field, Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Field {
    Container,
    PodUid,
    Exe,
    Unit,
    User,
    Image,
    Pod,
    Namespace,
}

/// The rules that a connection's requests can meet, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates(Vec<Candidate>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    rule: u32,
    is_certain: bool,
    is_about_requests: bool,
}

/// A decision, and the rule behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement<'a> {
    /// What becomes of the request.
    pub decision: Decision,
    /// The rule that matched; `None` where the mode decided.
    pub rule: Option<&'a Rule>,
    /// The mode, as it is for this request.
    pub mode: Mode,
}

impl Policy {
    /// Where a session token is valid, unless a rule says otherwise.
    #[must_use]
    pub fn token_binding(&self) -> Binding {
        self.token_binding.unwrap_or(Binding::of(self.mode))
    }

    /// What holds for a caller before it is known what it asks.
    ///
    /// As with [`Self::judge`], enforce mode takes the worse of what rules may say that may match.
    #[must_use]
    pub fn terms(&self, candidates: &Candidates, now: Timestamp) -> Terms {
        let of_rule = |rule: Option<&Rule>| {
            let hop_limit = rule.and_then(|rule| rule.hop_limit);
            let token_binding = rule.and_then(|rule| rule.token_binding);
            (
                hop_limit.map_or(self.hop_limit, |limit| limit.get()),
                token_binding.unwrap_or(self.token_binding()),
            )
        };
        let about_callers = candidates.0.iter().filter(|candidate| {
            !candidate.is_about_requests && self.rules.get(candidate).holds(now)
        });
        let certain = about_callers.clone().find(|it| it.is_certain);
        let (mut hop_limit, mut token_binding) = of_rule(certain.map(|it| self.rules.get(it)));
        if self.mode == Mode::Enforce {
            let uncertain = about_callers.take_while(|it| !it.is_certain);
            for (limit, binding) in uncertain.map(|it| of_rule(Some(self.rules.get(it)))) {
                hop_limit = hop_limit.min(limit);
                token_binding = token_binding.max(binding);
            }
        }
        Terms {
            mode: self.mode,
            hop_limit,
            hop_limit_action: self.hop_limit_action,
            token_binding,
            action: None,
        }
    }

    /// Judges a request, under the terms of its caller.
    ///
    /// Where a rule may or may not match, as something that it asks for is not known, enforce mode takes
    /// the worse for the caller; audit mode goes on as if it did not match.
    #[must_use]
    pub fn judge(
        &self,
        candidates: &Candidates,
        terms: Terms,
        (request, ask): (&Request<'_>, &Ask<'_>),
        hops: u8,
        token: SessionToken,
        now: Timestamp,
    ) -> Judgement<'_> {
        let decide = |rule: Option<&Rule>| terms.with(rule).decide(request, hops, token);
        let mut worst: Option<Judgement<'_>> = None;
        let mut differ = false;
        let mut consider = |rule, decision: Decision| {
            let found = Judgement {
                decision,
                rule,
                mode: terms.with(rule).mode,
            };
            match &mut worst {
                Some(worst) => {
                    differ |= worst.decision.verdict != decision.verdict;
                    if severity(decision) > severity(worst.decision) {
                        *worst = found;
                    }
                }
                None => worst = Some(found),
            }
        };
        let met = candidates.0.iter().filter_map(|candidate| {
            let rule = self.rules.get(candidate);
            (rule.holds(now) && rule.covers(ask)).then_some((rule, candidate.is_certain))
        });
        let mut ends = false;
        for (rule, is_certain) in met {
            if is_certain || self.mode == Mode::Enforce {
                consider(Some(rule), decide(Some(rule)));
            }
            if is_certain {
                ends = true;
                break;
            }
        }
        if !ends {
            consider(None, decide(None));
        }
        let mut judgement = worst.unwrap_or_else(|| Judgement {
            decision: decide(None),
            rule: None,
            mode: self.mode,
        });
        if differ && judgement.decision.verdict == Verdict::Deny {
            judgement.decision.reason = Reason::UnknownCaller;
        }
        judgement
    }
}

/// How bad a decision is for the caller.
fn severity(decision: Decision) -> u8 {
    match decision.action {
        Action::Forward => 0,
        Action::Upgrade => 1,
        Action::Refuse(_) => 2,
        Action::Drop => 3,
    }
}

impl Rules {
    /// Rules in their order.
    #[must_use]
    pub fn new(list: Vec<Rule>) -> Self {
        let mut rules = Self::default();
        for (number, rule) in (0..).zip(&list) {
            match keys(rule) {
                Some(keys) => {
                    for key in keys {
                        match key {
                            Key::Text(Field::Image, _) => rules.of_images.push(number),
                            Key::Text(Field::Pod | Field::Namespace, _) => {
                                rules.of_pods.push(number);
                            }
                            _ => {}
                        }
                        rules.of.entry(key).or_default().push(number);
                    }
                }
                None => rules.of_anybody.push(number),
            }
        }
        rules.list = list;
        rules
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> &[Rule] {
        &self.list
    }

    /// What has to be found out about a caller, of all that is missing, as one of the rules that its
    /// requests can meet asks for it.
    #[must_use]
    pub fn wanted(&self, candidates: &Candidates, caller: &Caller) -> Missing {
        let unsure = candidates.0.iter().filter(|it| !it.is_certain);
        let asked = unsure.map(|it| self.get(it).asks());
        asked
            .fold(Missing::default(), Missing::or)
            .and(caller.missing)
    }

    /// Those that a caller's requests can meet.
    #[must_use]
    pub fn candidates(&self, subject: &Subject<'_>) -> Candidates {
        let caller = subject.caller;
        let numbers: Vec<u32> = if !caller.resolved {
            (0..).zip(&self.list).map(|(number, _)| number).collect()
        } else {
            let of_caller = keys_of(caller).filter_map(|key| self.of.get(&key));
            let mut numbers = self.of_anybody.clone();
            numbers.extend(of_caller.flatten());
            if caller.missing.container {
                numbers.extend(&self.of_images);
            }
            if caller.missing.pod {
                numbers.extend(&self.of_pods);
            }
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let mut candidates = Vec::new();
        for number in numbers {
            let rule = &self.list[number as usize];
            let is_certain = match rule.fits(subject) {
                Fit::No => continue,
                Fit::Unknown => false,
                Fit::Yes => true,
            };
            let is_about_requests = rule.is_about_requests();
            candidates.push(Candidate {
                rule: number,
                is_certain,
                is_about_requests,
            });
            // No request gets past this one.
            if is_certain && !is_about_requests && rule.expires.is_none() {
                break;
            }
        }
        Candidates(candidates)
    }

    fn get(&self, candidate: &Candidate) -> &Rule {
        &self.list[candidate.rule as usize]
    }
}

/// What all callers of a rule have at least one of; `None` if that cannot be said.
fn keys(rule: &Rule) -> Option<HashSet<Key>> {
    let texts = |field, globs: &Option<OneOf<Glob>>| {
        let any = globs.as_ref()?.any();
        let key = |glob: &Glob| Some(Key::Text(field, glob.as_literal()?.into()));
        let keys: Option<HashSet<Key>> = any.iter().map(key).collect();
        keys.filter(|keys| !keys.is_empty())
    };
    let uids = |numbers: &Option<OneOf<Number>>| {
        let any = numbers.as_ref()?.any();
        let keys: HashSet<Key> = any.iter().map(|number| Key::Uid(number.0)).collect();
        (!keys.is_empty()).then_some(keys)
    };
    texts(Field::Container, &rule.container_id)
        .or_else(|| texts(Field::PodUid, &rule.pod_uid))
        .or_else(|| texts(Field::Exe, &rule.exe))
        .or_else(|| texts(Field::Pod, &rule.pod))
        .or_else(|| texts(Field::Image, &rule.container_image))
        .or_else(|| texts(Field::Namespace, &rule.namespace))
        .or_else(|| texts(Field::Unit, &rule.systemd_unit))
        .or_else(|| texts(Field::User, &rule.user))
        .or_else(|| uids(&rule.uid))
}

/// Everything that a caller has.
fn keys_of(caller: &Caller) -> impl Iterator<Item = Key> {
    let image = caller.container.as_ref().and_then(|it| it.image.as_deref());
    let pod = caller.pod.as_ref();
    let texts = [
        (Field::Container, caller.container_id.as_deref()),
        (Field::PodUid, caller.pod_uid.as_deref()),
        (Field::Exe, caller.exe.as_deref()),
        (Field::Pod, pod.map(|pod| pod.name.as_str())),
        (Field::Image, image),
        (Field::Namespace, pod.map(|pod| pod.namespace.as_str())),
        (Field::Unit, caller.systemd_unit.as_deref()),
        (Field::User, caller.user.as_deref()),
    ];
    let texts = texts.into_iter();
    let texts = texts.filter_map(|(field, text)| Some(Key::Text(field, text?.into())));
    texts.chain([Key::Uid(caller.uid)])
}

#[cfg(test)]
mod tests;
