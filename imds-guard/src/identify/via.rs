//! How a process came to run: by cron, a timer, a login.

use std::path::Path;

use crate::policy::caller::{Parent, Via};

/// Where the timers of the system are (systemd.unit(5)).
const TIMERS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/transient",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// What the ancestors' names and the unit tell.
pub fn of(parents: &[Parent], unit: Option<&str>) -> Vec<Via> {
    let mut via: Vec<_> = parents.iter().filter_map(by_name).collect();
    if unit.is_some_and(has_timer) {
        via.push(Via::Timer);
    }
    via.dedup();
    via
}

fn by_name(parent: &Parent) -> Option<Via> {
    let exe = parent.exe.as_deref()?;
    match exe.rsplit('/').next()? {
        "cron" | "crond" | "anacron" | "atd" => Some(Via::Cron),
        "sshd" | "sshd-session" => Some(Via::Ssh),
        "sudo" | "su" | "runuser" | "doas" => Some(Via::Sudo),
        _ => None,
    }
}

/// Whether a timer of the same name is there, as it starts a service by default. Timers of users are not
/// looked for: they are where the guard must not look, and their services all are `user@UID.service` to it.
fn has_timer(unit: &str) -> bool {
    let Some(name) = unit.strip_suffix(".service") else {
        return false;
    };
    // Names that were written in hexadecimal can have any characters, and lead elsewhere.
    if name.contains('/') {
        return false;
    }
    // An instance's timer may be that of the template.
    let template = name.split_once('@').map(|(name, _)| format!("{name}@"));
    let mut names = vec![format!("{name}.timer")];
    names.extend(template.map(|name| format!("{name}.timer")));
    TIMERS
        .iter()
        .flat_map(|folder| names.iter().map(move |name| Path::new(folder).join(name)))
        .any(|timer| timer.exists())
}
