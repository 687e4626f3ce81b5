//! Who a caller is, beyond one process: what runs, and where.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::line::{self, text};

/// What tells callers apart in a report: neither a process id nor a pod's random name.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub struct Identity {
    /// The running program; where it could not be found out, the name of the thread in parentheses.
    pub program: String,
    /// What it runs, if it is an interpreter.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub script: Option<String>,
    /// Namespace of its pod.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub namespace: Option<String>,
    /// What its pod belongs to, as `Deployment/web`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub owner: Option<String>,
    /// Image of its container; its id, where the image is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<String>,
    /// Its systemd unit; of transient ones with numbers in their name, the name without.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unit: Option<String>,
    /// Its user, where nothing above tells where it belongs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<String>,
}

impl Identity {
    /// Puts the parts of an identity into a key that is unique for it. Nothing is allocated once the key
    /// has room.
    pub(super) fn key(caller: &line::Caller<'_>, key: &mut String) {
        key.clear();
        let mut part = |text: &str| {
            key.push_str(text);
            key.push('\0');
        };
        match program(caller) {
            Some(exe) => part(exe),
            None => {
                part("");
                part(caller.comm.as_str());
            }
        }
        part(text(&caller.script).unwrap_or_default());
        match (&caller.pod, place(caller)) {
            (Some(pod), _) => {
                part(pod.namespace.as_str());
                part(text(&pod.owner).unwrap_or(pod.name.as_str()));
            }
            (None, place) => part(place),
        }
        part(image(caller).unwrap_or_default());
        if !is_placed(caller) {
            part(text(&caller.user).unwrap_or_default());
            // Users without a name are told apart by number.
            let _infallible = write!(key, "{}", caller.uid);
        }
    }

    /// The identity itself.
    pub(super) fn of(caller: &line::Caller<'_>) -> Self {
        let owned = |text: &str| text.to_owned();
        let pod = caller.pod.as_ref();
        let unit = text(&caller.systemd_unit).filter(|_| caller.container_id.is_none());
        Self {
            program: match program(caller) {
                Some(exe) => owned(exe),
                None => format!("({})", caller.comm.as_str()),
            },
            script: text(&caller.script).map(owned),
            namespace: pod.map(|pod| owned(pod.namespace.as_str())),
            owner: pod.map(|pod| owned(text(&pod.owner).unwrap_or(pod.name.as_str()))),
            image: image(caller).map(owned),
            unit: unit
                .filter(|unit| is_service(unit))
                .map(|unit| owned(stable(unit))),
            user: match text(&caller.user) {
                _ if is_placed(caller) => None,
                Some(user) => Some(owned(user)),
                None => Some(caller.uid.to_string()),
            },
        }
    }

    /// Its program, or what that runs.
    #[must_use]
    pub fn what(&self) -> String {
        match &self.script {
            Some(script) => {
                let interpreter = self.program.rsplit('/').next().unwrap_or(&self.program);
                format!("{script} under {interpreter}")
            }
            None => self.program.clone(),
        }
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> String {
        if let (Some(namespace), Some(owner)) = (&self.namespace, &self.owner) {
            return format!("{namespace}/{owner}");
        }
        let place = self.image.as_ref().or(self.unit.as_ref());
        match (place, &self.user) {
            (Some(place), _) => place.clone(),
            (None, Some(user)) => format!("user {user}"),
            (None, None) => String::new(),
        }
    }
}

/// The running program; the same before and after its file was replaced, as by an update.
fn program<'a>(caller: &'a line::Caller<'_>) -> Option<&'a str> {
    text(&caller.exe).map(|exe| exe.strip_suffix(" (deleted)").unwrap_or(exe))
}

/// Whether something tells where a caller belongs, beside its user.
fn is_placed(caller: &line::Caller<'_>) -> bool {
    let is_service = text(&caller.systemd_unit).is_some_and(is_service);
    caller.pod.is_some() || caller.container_id.is_some() || is_service
}

/// Whether a unit is more than a login's or a scope's.
fn is_service(unit: &str) -> bool {
    !unit.ends_with(".scope") && !unit.starts_with("user@")
}

/// A unit's name, the same for all transient ones (`run-r5f0c….service` of systemd-run).
fn stable(unit: &str) -> &str {
    let is_random = |rest: &str| {
        rest.strip_suffix(".service").is_some_and(|rest| {
            rest.len() > 4
                && rest.bytes().all(|it| {
                    it.is_ascii_hexdigit() || matches!(it, b'r' | b'u' | b'p' | b'i' | b'-')
                })
        })
    };
    match unit.strip_prefix("run-") {
        Some(rest) if is_random(rest) => "run-*.service",
        _ => unit,
    }
}

fn image<'a>(caller: &'a line::Caller<'_>) -> Option<&'a str> {
    let container = caller.container.as_ref();
    let image = container.and_then(|container| text(&container.image));
    let id = text(&caller.container_id).map(|id| &id[..id.floor_char_boundary(12)]);
    image.or(if caller.pod.is_some() { None } else { id })
}

fn place<'a>(caller: &'a line::Caller<'_>) -> &'a str {
    let unit = text(&caller.systemd_unit).filter(|_| caller.container_id.is_none());
    unit.filter(|unit| is_service(unit))
        .map(stable)
        .unwrap_or_default()
}
