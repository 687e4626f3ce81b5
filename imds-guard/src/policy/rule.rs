//! Rules: for whom and what, and what is different there.

use std::{collections::BTreeMap, ops::ControlFlow, sync::Arc};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Binding, Caller, Imds,
    caller::{Netns, Pod},
    expiry::Expiry,
    path::Path,
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

/// Who asks, and from where: what does not change during a connection.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The process.
    pub caller: &'a Caller,
    /// `ipv4` or `ipv6`.
    pub endpoint: &'a str,
    /// Network hops.
    pub hops: u8,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Version of the protocol.
    pub imds: Imds,
    /// HTTP method.
    pub method: &'a str,
    /// Path.
    pub path: &'a Path<'a>,
}

/// Whether a selector matches.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// It does not.
    No,
    /// What it asks for is not known.
    Unknown,
    /// It does.
    Yes,
}

impl Rule {
    /// Whether it matches a caller, apart from what is asked.
    #[must_use]
    pub fn fits(&self, subject: &Subject<'_>) -> Fit {
        let mut fits = Fit::Yes;
        let _done = self.each_of_caller(subject, &mut |_, fit| {
            fits = fits.min(fit);
            match fit {
                Fit::No => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        fits
    }

    /// Whether it matches what is asked.
    #[must_use]
    pub fn covers(&self, ask: &Ask<'_>) -> bool {
        self.each_of_request(ask, &mut |_, fit| match fit {
            Fit::Yes => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        })
        .is_continue()
    }

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

    /// Tells each selector about the caller, by name, and whether it matches.
    pub(super) fn each_of_caller(
        &self,
        subject: &Subject<'_>,
        tell: &mut impl FnMut(&'static str, Fit) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let caller = subject.caller;
        // What `/proc` tells of a process that could not be found there is not known.
        let known = caller.resolved;
        let text = |selector: &Option<OneOf<Glob>>, found: Option<&str>, known: bool| {
            let globs = selector.as_ref()?;
            Some(match found {
                Some(found) => Fit::from(globs.matches(|glob| glob.matches(found))),
                None if !known => Fit::Unknown,
                // Nothing is among nothing, and is none of what is excluded.
                None => Fit::from(globs.any().is_empty()),
            })
        };
        let number = |selector: &Option<OneOf<Number>>, found: u32| {
            let numbers = selector.as_ref()?;
            Some(numbers.matches(|number| number.0 == found).into())
        };
        let mut tell = |name, fit: Option<Fit>| match fit {
            Some(fit) => tell(name, fit),
            None => ControlFlow::Continue(()),
        };

        tell("uid", number(&self.uid, caller.uid))?;
        tell("gid", number(&self.gid, caller.gid))?;
        tell("hops", number(&self.hops, subject.hops.into()))?;
        tell("comm", text(&self.comm, Some(&caller.comm), true))?;
        let netns = match caller.netns {
            Netns::Host => "host",
            Netns::Other => "other",
        };
        tell("netns", text(&self.netns, Some(netns), true))?;
        tell(
            "endpoint",
            text(&self.endpoint, Some(subject.endpoint), true),
        )?;
        tell("user", text(&self.user, caller.user.as_deref(), known))?;
        tell("group", text(&self.group, caller.group.as_deref(), known))?;
        let unit = caller.systemd_unit.as_deref();
        tell("systemd_unit", text(&self.systemd_unit, unit, known))?;
        let container = caller.container_id.as_deref();
        tell("container_id", text(&self.container_id, container, known))?;
        tell(
            "pod_uid",
            text(&self.pod_uid, caller.pod_uid.as_deref(), known),
        )?;
        tell(
            "cgroup",
            self.cgroup
                .as_ref()
                .map(|globs| match caller.cgroup.as_deref() {
                    Some(path) => globs.matches(|glob| glob.covers(path)).into(),
                    None if !known => Fit::Unknown,
                    None => Fit::No,
                }),
        )?;
        let image = caller.container.as_ref().and_then(|it| it.image.as_deref());
        let image_known = known && !caller.missing.container;
        tell(
            "container_image",
            text(&self.container_image, image, image_known),
        )?;
        self.each_of_pod(caller, &mut tell)?;
        tell(
            "exe",
            self.exe.as_ref().map(|globs| match &caller.exe {
                _ if !known => Fit::Unknown,
                Some(exe) if caller.exe_verified || self.names_container() => {
                    globs.matches(|glob| glob.matches(exe)).into()
                }
                // Another file than the host has under that name, and so none of those that are named. Of
                // those that are not to be it, it may be each: it never gains by that.
                Some(_) if globs.any().is_empty() => (self.action == Some(RuleAction::Deny)).into(),
                Some(_) | None => Fit::No,
            }),
        )?;
        tell(
            "ancestor_exe",
            self.ancestor_exe.as_ref().map(|globs| {
                let mut verified = caller.parents.iter().filter(|parent| parent.exe_verified);
                if globs.any().is_empty() {
                    let all = verified.all(|it| {
                        it.exe
                            .as_deref()
                            .is_some_and(|exe| globs.matches(|glob| glob.matches(exe)))
                    });
                    return if known { all.into() } else { Fit::Unknown };
                }
                let is = |exe: &str| globs.matches(|glob| glob.matches(exe));
                match verified.any(|it| it.exe.as_deref().is_some_and(is)) {
                    false if !known => Fit::Unknown,
                    found => found.into(),
                }
            }),
        )?;
        let sha256_known = known && !caller.missing.sha256;
        tell(
            "sha256",
            text(&self.sha256, caller.exe_sha256.as_deref(), sha256_known),
        )
    }

    fn each_of_pod(
        &self,
        caller: &Caller,
        tell: &mut impl FnMut(&'static str, Option<Fit>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let pod = caller.pod.as_deref();
        let known = caller.resolved && !caller.missing.pod;
        let is = |globs: &OneOf<Glob>, found: Option<&str>| match (pod, found) {
            (None, _) if !known => Fit::Unknown,
            (_, Some(found)) => globs.matches(|glob| glob.matches(found)).into(),
            (_, None) => Fit::from(globs.any().is_empty()),
        };
        let with = |selector: &Option<OneOf<Glob>>, field: fn(&Pod) -> Option<&str>| {
            selector
                .as_ref()
                .map(|globs| is(globs, pod.and_then(field)))
        };
        tell("pod", with(&self.pod, |pod| Some(&pod.name)))?;
        tell(
            "namespace",
            with(&self.namespace, |pod| Some(&pod.namespace)),
        )?;
        tell(
            "service_account",
            with(&self.service_account, |pod| pod.service_account.as_deref()),
        )?;
        let labels = self.labels.iter().map(|(key, globs)| {
            is(
                globs,
                pod.and_then(|pod| pod.labels.get(key)).map(String::as_str),
            )
        });
        tell("labels", labels.min())
    }

    /// Tells each selector about the request, by name, and whether it matches.
    pub(super) fn each_of_request(
        &self,
        ask: &Ask<'_>,
        tell: &mut impl FnMut(&'static str, Fit) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        if let Some(imds) = &self.imds {
            tell(
                "imds",
                imds.matches(|glob| glob.matches(ask.imds.as_str())).into(),
            )?;
        }
        if let Some(method) = &self.method {
            tell(
                "method",
                method.matches(|glob| glob.matches(ask.method)).into(),
            )?;
        }
        if let Some(path) = &self.path {
            tell("path", path.matches(|glob| glob.covers(ask.path)).into())?;
        }
        ControlFlow::Continue(())
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

impl From<bool> for Fit {
    fn from(fits: bool) -> Self {
        if fits { Self::Yes } else { Self::No }
    }
}
