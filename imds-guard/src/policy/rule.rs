//! Rules: for whom and what, and what is different there.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Binding,
    caller::Missing,
    expiry::Expiry,
    pattern::{Glob, Number, OneOf, PathGlob, Pattern},
    refusal::Refusal,
};

/// A rule. All selectors that are given must match; each takes one pattern or a list, and `!` in front
/// of a pattern excludes what it matches.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What events call it.
    pub name: Arc<str>,
    /// Why it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who answers for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Until when it holds: a date, the end of which (UTC) is meant, or a date and time (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Expiry>,

    /// The running program: a file of the host, known by device and inode, not by what the process says.
    /// A rule that names a container or pod besides means the path in there, which is the container's own
    /// word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<OneOf<Glob>>,
    /// SHA-256 of the file that runs, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<OneOf<Glob>>,
    /// Name of the calling thread, at most 15 bytes. The process can choose it freely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comm: Option<OneOf<Glob>>,
    /// User, by the host's name for it; processes in containers have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<OneOf<Glob>>,
    /// Real user id on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<OneOf<Number>>,
    /// Group, by the host's name for it; processes in containers have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<OneOf<Glob>>,
    /// Real group id on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<OneOf<Number>>,
    /// systemd unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub systemd_unit: Option<OneOf<Glob>>,
    /// Path of a cgroup, for its processes and those of the cgroups below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<OneOf<Glob>>,
    /// Id of a container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<OneOf<Glob>>,
    /// Image of a container, as its runtime calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_image: Option<OneOf<Glob>>,
    /// UID of a Kubernetes pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<OneOf<Glob>>,
    /// Name of a Kubernetes pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<OneOf<Glob>>,
    /// Kubernetes namespace of a pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<OneOf<Glob>>,
    /// Kubernetes service account of a pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<OneOf<Glob>>,
    /// Labels of a Kubernetes pod; all that are given must match.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub labels: BTreeMap<String, OneOf<Glob>>,
    /// Network namespace: `host` or `other`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<OneOf<Glob>>,
    /// Program of one of the process's ancestors, a file of the host as with `exe`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ancestor_exe: Option<OneOf<Glob>>,
    /// Address that was asked: `ipv4` (also in its IPv6-mapped form) or `ipv6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<OneOf<Glob>>,
    /// Network hops between the caller and the guard; 1 is the host itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hops: Option<OneOf<Number>>,

    /// Version of the protocol: `v1`, `v2` or `token`, the request for a session token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imds: Option<OneOf<Glob>>,
    /// HTTP method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<OneOf<Glob>>,
    /// Path, and all that lies below it, in every version of the service's tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<OneOf<PathGlob>>,

    /// What becomes of the request; without it, the mode decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<RuleAction>,
    /// How `deny` refuses: with status 401, 403 (default) or 404, or not at all (`drop`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Refusal>,
    /// Another hop limit (1–64).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_limit: Option<HopLimit>,
    /// Another token binding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_binding: Option<Binding>,
    /// Requests a second that one caller (a user in a cgroup) may send; more are refused with 429.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<std::num::NonZeroU32>,
}

/// What becomes of a request that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    /// IMDSv1 is forwarded; all else as without the rule.
    Allow,
    /// Forwarded, and marked in the events.
    Audit,
    /// Refused.
    Deny,
    /// IMDSv1 is answered with a session token of the guard's own.
    Upgrade,
}

/// How far a session token may travel: 1 to 64 network hops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(try_from = "u8")]
pub struct HopLimit(#[schemars(range(min = 1, max = 64))] u8);

impl Rule {
    /// Whether it has selectors that are about requests, and not about callers alone.
    #[must_use]
    pub fn is_about_requests(&self) -> bool {
        self.imds.is_some() || self.method.is_some() || self.path.is_some()
    }

    /// Whether it holds at a time.
    #[must_use]
    pub fn holds(&self, now: Timestamp) -> bool {
        self.expires.is_none_or(|expires| now < expires.at())
    }

    /// Whether it names a container or pod, in which paths have a meaning of their own.
    #[must_use]
    pub fn names_container(&self) -> bool {
        self.container_id.is_some()
            || self.container_image.is_some()
            || self.pod_uid.is_some()
            || self.needs_pod()
    }

    /// Whether it asks for what only Kubernetes knows.
    #[must_use]
    pub fn needs_pod(&self) -> bool {
        self.pod.is_some()
            || self.namespace.is_some()
            || self.service_account.is_some()
            || !self.labels.is_empty()
    }

    /// What it asks for that takes an effort to find out.
    #[must_use]
    pub fn asks(&self) -> Missing {
        Missing {
            exe: self.exe.is_some(),
            ancestors: self.ancestor_exe.is_some(),
            sha256: self.sha256.is_some(),
            container: self.container_image.is_some(),
            pod: self.needs_pod(),
        }
    }

    /// Checks what no single key can.
    ///
    /// # Errors
    /// Keys that contradict each other.
    pub fn validate(&self) -> Result<(), String> {
        let of = [
            ("imds", &self.imds, &["v1", "v2", "token"][..]),
            ("netns", &self.netns, &["host", "other"]),
            ("endpoint", &self.endpoint, &["ipv4", "ipv6"]),
        ];
        for (key, globs, known) in of {
            let mut unknown = globs.iter().flat_map(OneOf::all);
            let unknown = unknown.find(|glob| !known.iter().any(|known| glob.matches(known)));
            if let Some(glob) = unknown {
                let known = known.join(", ");
                return Err(format!(
                    "{key} \"{}\": it is one of {known}",
                    glob.written()
                ));
            }
        }
        let is_digest = |glob: &Glob| {
            let text = glob.written();
            text.len() == 64
                && text
                    .bytes()
                    .all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'))
        };
        if let Some(globs) = &self.sha256
            && !globs.all().all(is_digest)
        {
            return Err("sha256 is 64 digits, from 0 to 9 and a to f, as sha256sum prints".into());
        }
        for (key, globs) in [
            ("exe", &self.exe),
            ("ancestor_exe", &self.ancestor_exe),
            ("cgroup", &self.cgroup),
        ] {
            let mut relative = globs.iter().flat_map(OneOf::all);
            if let Some(glob) = relative.find(|glob| !glob.written().starts_with(['/', '*'])) {
                return Err(format!(
                    "{key} \"{}\": give a path from the root",
                    glob.written()
                ));
            }
        }
        if self.is_about_requests() && (self.hop_limit.is_some() || self.token_binding.is_some()) {
            return Err(
                "hop_limit and token_binding are about callers: give them in a rule without imds, \
                 method and path"
                    .into(),
            );
        }
        if self.answer.is_some() && self.action != Some(RuleAction::Deny) {
            return Err("answer belongs to action = \"deny\"".into());
        }
        if self.rate.is_some() && self.action == Some(RuleAction::Deny) {
            return Err(
                "a rate of requests that are denied anyway: leave one of the two out".into(),
            );
        }
        if self.action.is_none()
            && self.hop_limit.is_none()
            && self.token_binding.is_none()
            && self.rate.is_none()
        {
            return Err(
                "it changes nothing: give it an action, hop_limit, token_binding or rate".into(),
            );
        }
        Ok(())
    }
}

impl HopLimit {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for HopLimit {
    type Error = &'static str;

    fn try_from(limit: u8) -> Result<Self, Self::Error> {
        match limit {
            1..=64 => Ok(Self(limit)),
            _ => Err("a hop limit is a number from 1 to 64"),
        }
    }
}
