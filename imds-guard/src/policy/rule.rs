//! Exceptions for some callers, and what applies to each in the end.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, de::Error as _};

use super::{Binding, Caller, HopLimitAction, Mode};

/// The rules as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether refusals are carried out.
    pub mode: Mode,
    /// How many network hops a token may travel (1–64), as the instance's
    /// `HttpPutResponseHopLimit`; AWS's default is 1. The instance's own limit holds besides.
    pub hop_limit: u8,
    /// What becomes of token requests from further away.
    pub hop_limit_action: HopLimitAction,
    /// Where a session token is valid.
    pub token_binding: Binding,
    /// Exceptions; the first one that matches counts.
    pub rules: Vec<Rule>,
}

/// An exception: for whom, and what is different for them. Selectors that are not given match everybody.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What events call it.
    pub name: Arc<str>,

    /// Real user id on the host.
    pub uid: Option<u32>,
    /// Path of a cgroup, for its processes and those of the cgroups below it.
    pub cgroup: Option<String>,
    /// Id of a container.
    pub container_id: Option<String>,
    /// UID of a Kubernetes pod.
    pub pod_uid: Option<String>,

    /// Another hop limit (1–64).
    #[serde(default, deserialize_with = "hop_limit")]
    pub hop_limit: Option<u8>,
    /// Another token binding.
    pub token_binding: Option<Binding>,
    /// What becomes of IMDSv1.
    pub action: Option<RuleAction>,
}

/// What a rule does about IMDSv1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    /// Answers it with a session token of the guard's own.
    Upgrade,
}

/// What applies to a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Whether refusals are carried out.
    pub mode: Mode,
    /// How far a token may travel.
    pub hop_limit: u8,
    /// What becomes of token requests from further away.
    pub hop_limit_action: HopLimitAction,
    /// Where a session token is valid.
    pub token_binding: Binding,
    /// Whether IMDSv1 is carried over.
    pub upgrade: bool,
    /// The rule that says so, if one does.
    pub rule: Option<Arc<str>>,
}

impl Policy {
    /// What applies to a caller.
    #[must_use]
    pub fn terms(&self, caller: &Caller) -> Terms {
        let rule = self.rules.iter().find(|rule| rule.matches(caller));
        Terms {
            mode: self.mode,
            hop_limit: rule
                .and_then(|rule| rule.hop_limit)
                .unwrap_or(self.hop_limit),
            hop_limit_action: self.hop_limit_action,
            token_binding: rule
                .and_then(|rule| rule.token_binding)
                .unwrap_or(self.token_binding),
            upgrade: rule.is_some_and(|rule| rule.action == Some(RuleAction::Upgrade)),
            rule: rule.map(|rule| Arc::clone(&rule.name)),
        }
    }
}

impl Rule {
    fn matches(&self, caller: &Caller) -> bool {
        let is =
            |wanted: &Option<String>, found: &Option<String>| wanted.is_none() || (wanted == found);
        self.uid.is_none_or(|uid| uid == caller.uid)
            && self.cgroup.as_ref().is_none_or(|wanted| {
                let found = caller.cgroup.as_deref();
                let rest =
                    found.and_then(|cgroup| cgroup.strip_prefix(wanted.trim_end_matches('/')));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
            && is(&self.container_id, &caller.container_id)
            && is(&self.pod_uid, &caller.pod_uid)
    }

    /// Whether it is about somebody, and not about everybody.
    #[must_use]
    pub fn selects(&self) -> bool {
        self.uid.is_some()
            || self.cgroup.is_some()
            || self.container_id.is_some()
            || self.pod_uid.is_some()
    }
}

fn hop_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u8>, D::Error> {
    let limit = u8::deserialize(deserializer)?;
    match limit {
        1..=64 => Ok(Some(limit)),
        _ => Err(D::Error::custom("a hop limit is a number from 1 to 64")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::caller::Netns;

    pub(crate) fn caller() -> Caller {
        Caller {
            pid: 1,
            tid: 1,
            uid: 33,
            gid: 33,
            comm: "x".into(),
            cgroup_id: 7,
            netns_cookie: 1,
            netns: Netns::Host,
            resolved: true,
            unresolved: None,
            exe: None,
            command_line: None,
            started: None,
            parents: Vec::new(),
            cgroup: Some("/system.slice/web.service".into()),
            user: None,
            systemd_unit: None,
            container_id: None,
            container_runtime: None,
            pod_uid: None,
        }
    }

    fn rule(toml: &str) -> Rule {
        toml::from_str(&format!("name = \"r\"\n{toml}")).unwrap()
    }

    #[test]
    fn a_rule_matches_whom_it_names() {
        let in_pod = Caller {
            container_id: Some("c0ffee".into()),
            pod_uid: Some("a-pod".into()),
            ..caller()
        };
        let table = [
            ("", true, true),
            ("uid = 33", true, true),
            ("uid = 0", false, false),
            ("cgroup = '/system.slice/web.service'", true, true),
            ("cgroup = '/system.slice/'", true, true),
            ("cgroup = '/system.slice/web'", false, false),
            ("cgroup = '/system'", false, false),
            ("container_id = 'c0ffee'", false, true),
            ("pod_uid = 'a-pod'", false, true),
            ("pod_uid = 'a-pod'\nuid = 0", false, false),
        ];
        for (selectors, host, pod) in table {
            let rule = rule(selectors);
            assert_eq!(rule.matches(&caller()), host, "{selectors}");
            assert_eq!(rule.matches(&in_pod), pod, "{selectors}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let policy = Policy {
            mode: Mode::Enforce,
            hop_limit: 1,
            hop_limit_action: HopLimitAction::Reject,
            token_binding: Binding::Container,
            rules: vec![
                rule("uid = 7\nhop_limit = 9"),
                rule("uid = 33\nhop_limit = 3\ntoken_binding = 'off'\naction = 'upgrade'"),
                rule("hop_limit = 5"),
            ],
        };
        let terms = policy.terms(&caller());
        assert_eq!((terms.hop_limit, terms.token_binding), (3, Binding::Off));
        assert!(terms.upgrade && terms.rule.as_deref() == Some("r"));
        let root = Caller { uid: 0, ..caller() };
        let terms = policy.terms(&root);
        assert_eq!(
            (terms.hop_limit, terms.token_binding),
            (5, Binding::Container)
        );
        assert!(!terms.upgrade);
    }
}
