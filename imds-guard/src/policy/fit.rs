//! Whom a rule is about, and what.

use std::ops::ControlFlow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Caller, Imds,
    caller::{Netns, Parent},
    path::Path,
    pattern::{Glob, Number, OneOf},
    rule::{Rule, RuleAction},
};

/// Process id of init, whom all others descend from; whoever is made up for an explanation has 0.
const INIT: u32 = 1;

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

    pub(super) fn each_of_caller(
        &self,
        subject: &Subject<'_>,
        tell: &mut impl FnMut(&'static str, Fit) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let caller = subject.caller;
        // What `/proc` tells of a process that could not be found there is not known.
        let known = caller.resolved;
        let text = |selector: &Option<OneOf<Glob>>, found: Option<&str>, known: bool| {
            Some(selector.as_ref()?.fit(found, known))
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
        tell("exe", self.exe.as_ref().map(|it| self.exe_fit(it, caller)))?;
        let ancestors = self.ancestor_exe.as_ref();
        tell(
            "ancestor_exe",
            ancestors.map(|it| self.ancestor_fit(it, caller)),
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
        let with = |selector: &Option<OneOf<Glob>>, found: Option<&str>| {
            Some(selector.as_ref()?.fit(found, known))
        };
        tell("pod", with(&self.pod, pod.map(|pod| &*pod.name)))?;
        let namespace = pod.map(|pod| &*pod.namespace);
        tell("namespace", with(&self.namespace, namespace))?;
        let account = pod.and_then(|pod| pod.service_account.as_deref());
        tell("service_account", with(&self.service_account, account))?;
        let labels = self.labels.iter().map(|(key, globs)| {
            let label = pod.and_then(|pod| pod.labels.get(key));
            globs.fit(label.map(String::as_str), known)
        });
        tell("labels", labels.min())
    }

    /// Whether the program is one of these. In a container, where the rule is about some, names are the
    /// container's; everywhere else they count only where the host has that very file.
    fn exe_fit(&self, globs: &OneOf<Glob>, caller: &Caller) -> Fit {
        let is_container = caller.container_id.is_some() || caller.pod_uid.is_some();
        let counts = caller.exe_verified || (is_container && self.names_container());
        let as_named = |exe| Fit::from(globs.matches(|glob| glob.matches(exe)));
        let as_other = self.unverified_fit(globs);
        match caller.exe.as_deref() {
            _ if !caller.resolved => Fit::Unknown,
            Some(exe) if counts => as_named(exe),
            Some(exe) if caller.missing.exe && as_named(exe) != as_other => Fit::Unknown,
            _ => as_other,
        }
    }

    /// Whether an ancestor runs one of these; or, where they are only excluded, whether none does.
    fn ancestor_fit(&self, globs: &OneOf<Glob>, caller: &Caller) -> Fit {
        if !caller.resolved {
            return Fit::Unknown;
        }
        let found = self.ancestors_fit(globs, caller, |it| it.exe_verified);
        match caller.missing.ancestors {
            true if self.ancestors_fit(globs, caller, |_| true) != found => Fit::Unknown,
            _ => found,
        }
    }

    /// The same, if just these are taken for verified.
    fn ancestors_fit(
        &self,
        globs: &OneOf<Glob>,
        caller: &Caller,
        is_verified: fn(&Parent) -> bool,
    ) -> Fit {
        let verified = || {
            let verified = caller.parents.iter().filter(|it| is_verified(it));
            verified.filter_map(|it| it.exe.as_deref())
        };
        let is = |exe: &str| globs.matches(|glob| glob.matches(exe));
        if !globs.any().is_empty() {
            return verified().any(is).into();
        }
        // Whoever is not looked at may be it: one that is not verified, or further up than the guard looks.
        let eldest = caller.parents.last().map_or(caller.pid, |it| it.pid);
        let are_all_known = eldest <= INIT && verified().count() == caller.parents.len();
        match verified().all(is) {
            true if !are_all_known => self.unverified_fit(globs),
            none_is_excluded => none_is_excluded.into(),
        }
    }

    /// A file that the host does not have under its name, or that has none, is none of those that are
    /// named. Of those that are not to be it, it may be each: it never gains by that.
    fn unverified_fit(&self, globs: &OneOf<Glob>) -> Fit {
        (globs.any().is_empty() && self.action == Some(RuleAction::Deny)).into()
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
}

impl OneOf<Glob> {
    /// Whether it matches what was found, if anything, when it is `known` that there is no more.
    fn fit(&self, found: Option<&str>, known: bool) -> Fit {
        match found {
            Some(found) => self.matches(|glob| glob.matches(found)).into(),
            None if !known => Fit::Unknown,
            // Nothing is among nothing, and is none of what is excluded.
            None => self.any().is_empty().into(),
        }
    }
}

impl From<bool> for Fit {
    fn from(fits: bool) -> Self {
        if fits { Self::Yes } else { Self::No }
    }
}
