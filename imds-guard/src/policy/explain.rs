//! Which rule decides, and why the others do not.

use std::ops::ControlFlow;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Action, Mode, Policy, Reason, Request, SessionToken, Verdict,
    fit::{Ask, Fit, Subject},
    rule::Rule,
};

/// How a request would be judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Explanation {
    /// What would become of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The status that the guard would answer with; missing if it would not answer itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<u16>,
    /// The rule that decides; missing if the mode does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rule: Option<String>,
    /// The mode.
    pub mode: Mode,
    /// How many network hops a session token may travel.
    pub hop_limit: u8,
    /// Where a session token is valid.
    pub token_binding: super::Binding,
    /// The rules up to the one that decides.
    pub rules: Vec<RuleExplanation>,
}

/// How a rule is about a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuleExplanation {
    /// Its name.
    pub name: String,
    /// Whether it matches: `yes`, `no` or `unknown`.
    pub matches: Fit,
    /// Whether its time is over.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub expired: bool,
    /// The selectors that do not match.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub mismatches: Vec<String>,
    /// The selectors that ask for what is not known.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub unknown: Vec<String>,
}

impl Policy {
    /// Explains how a request would be judged, with a session token that is good where it asks for one.
    #[must_use]
    pub fn explain(
        &self,
        subject: &Subject<'_>,
        (request, ask): (&Request<'_>, &Ask<'_>),
        now: Timestamp,
    ) -> Explanation {
        let candidates = self.rules.candidates(subject);
        let terms = self.terms(&candidates, now);
        let judgement = self.judge(
            &candidates,
            terms,
            (request, ask),
            subject.hops,
            SessionToken::Plain,
            now,
        );
        let mut rules = Vec::new();
        for rule in self.rules.list() {
            let explained = explain(rule, subject, ask, now);
            let ends = explained.matches == Fit::Yes && !explained.expired;
            rules.push(explained);
            if ends {
                break;
            }
        }
        let decision = judgement.decision;
        Explanation {
            verdict: decision.verdict,
            reason: decision.reason,
            status: match decision.action {
                Action::Refuse(status) => Some(status.as_u16()),
                Action::Forward | Action::Upgrade | Action::Drop => None,
            },
            rule: judgement.rule.map(|rule| rule.name.to_string()),
            mode: self.mode,
            hop_limit: terms.hop_limit,
            token_binding: terms.token_binding,
            rules,
        }
    }
}

fn explain(rule: &Rule, subject: &Subject<'_>, ask: &Ask<'_>, now: Timestamp) -> RuleExplanation {
    let mut explained = RuleExplanation {
        name: rule.name.to_string(),
        matches: Fit::Yes,
        expired: !rule.holds(now),
        mismatches: Vec::new(),
        unknown: Vec::new(),
    };
    let mut tell = |name: &'static str, fit| {
        match fit {
            Fit::No => explained.mismatches.push(name.into()),
            Fit::Unknown => explained.unknown.push(name.into()),
            Fit::Yes => {}
        }
        explained.matches = explained.matches.min(fit);
        ControlFlow::Continue(())
    };
    let _all = rule.each_of_caller(subject, &mut tell);
    let _all = rule.each_of_request(ask, &mut tell);
    explained
}
