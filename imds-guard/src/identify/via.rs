//! How a process came to run: by cron, a timer, a login.

use std::path::{Path, PathBuf};

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
pub fn of(parents: &[Parent], unit: Option<&str>, uid: u32) -> Vec<Via> {
    let mut via: Vec<_> = parents.iter().filter_map(by_name).collect();
    if unit.is_some_and(|unit| has_timer(unit, uid)) {
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

/// Whether a timer of the same name is there, as it starts a service by default.
fn has_timer(unit: &str, uid: u32) -> bool {
    let Some(name) = unit.strip_suffix(".service") else {
        return false;
    };
    // An instance's timer may be that of the template.
    let template = name.split_once('@').map(|(name, _)| format!("{name}@"));
    let of_user =
        ["user", "transient"].map(|kind| PathBuf::from(format!("/run/user/{uid}/systemd/{kind}")));
    let of_user = of_user.iter().map(PathBuf::as_path);
    let folders = TIMERS.iter().map(Path::new).chain(of_user);
    let mut names = vec![format!("{name}.timer")];
    names.extend(template.map(|name| format!("{name}.timer")));
    folders
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .any(|timer| timer.exists())
}
