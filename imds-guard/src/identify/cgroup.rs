//! What a cgroup path tells: systemd unit, and by way of [`Container`] container and pod.

use super::container::Container;

/// The contents of `/proc/PID/cgroup`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Path in the cgroup v2 hierarchy.
    unified: Option<String>,
    /// Paths in v1 hierarchies, on hybrid hosts, deepest first.
    legacy: Vec<String>,
}

impl Cgroups {
    /// Reads lines of the form `hierarchy:controllers:path` (cgroups(7)).
    pub fn parse(text: &str) -> Self {
        let mut cgroups = Self::default();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            match (fields.next(), fields.next(), fields.next()) {
                (Some("0"), Some(""), Some(path)) => cgroups.unified = Some(path.to_owned()),
                (_, _, Some(path)) => cgroups.legacy.push(path.to_owned()),
                _ => {}
            }
        }
        cgroups
            .legacy
            .sort_by_key(|path| std::cmp::Reverse(path.matches('/').count()));
        cgroups
    }

    /// A cgroup that is known by its path.
    pub fn of_path(path: &str) -> Self {
        Self {
            unified: Some(path.to_owned()),
            legacy: Vec::new(),
        }
    }

    /// The path in the cgroup v2 hierarchy.
    pub fn path(self) -> Option<String> {
        self.unified
    }

    /// The systemd unit: the outermost component that is no slice. `user@1000.service` is the unit
    /// even of what the user's own systemd starts: that manager names its units as it likes.
    pub fn systemd_unit(&self) -> Option<String> {
        self.paths().find_map(|path| {
            let unit = path.split('/').find(|part| is_unit(part))?;
            Some(unescape(unit))
        })
    }

    /// The container and pod that it is in.
    pub fn container(&self) -> Container {
        self.paths().find_map(Container::of).unwrap_or_default()
    }

    /// Whether a user's own systemd made it, and named it as the user likes. What is called like one within a
    /// container was named by the container.
    pub fn is_of_user(&self) -> bool {
        self.paths().any(|path| {
            let mut parts = path.split('/');
            let is_manager = |part: &str| part.starts_with("user@") && part.ends_with(".service");
            let above: Vec<_> = parts
                .by_ref()
                .take_while(|part| !is_manager(part))
                .collect();
            above.len() < path.split('/').count() && Container::of(&above.join("/")).is_none()
        })
    }

    fn paths(&self) -> impl Iterator<Item = &str> {
        self.unified.iter().chain(&self.legacy).map(String::as_str)
    }
}

/// Whether a component is a unit that holds processes.
pub(super) fn is_unit(part: &str) -> bool {
    [".service", ".scope", ".socket"]
        .iter()
        .any(|kind| part.ends_with(kind))
}

/// systemd writes bytes that it cannot use in a unit name as `\xNN` (systemd.unit(5)); names that
/// would not be a cgroup name get a `_` in front.
fn unescape(unit: &str) -> String {
    let mut bytes = Vec::with_capacity(unit.len());
    let mut rest = unit;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        match rest
            .get(at + 2..at + 4)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
        {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[at + 4..];
            }
            None => {
                bytes.extend_from_slice(b"\\x");
                rest = &rest[at + 2..];
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f4a0e6d1b2c5e7f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f";

    #[test]
    fn what_a_users_own_systemd_named_is_known() {
        for (text, of_user) in [
            (
                "0::/user.slice/user-7.slice/user@7.service/docker-{ID}.scope",
                true,
            ),
            ("0::/user.slice/user-7.slice/session-3.scope", false),
            ("0::/system.slice/docker-{ID}.scope", false),
            ("0::/system.slice/docker-{ID}.scope/user@0.service", false),
            ("0::/docker/{ID}/user@0.service/a.scope", false),
        ] {
            let cgroups = Cgroups::parse(&text.replace("{ID}", ID));
            assert_eq!(cgroups.is_of_user(), of_user, "{text}");
        }
    }

    #[test]
    fn units_are_found() {
        let table = [
            ("0::/", None),
            ("garbage", None),
            ("0::/system.slice/cron.service", Some("cron.service")),
            (
                "0::/user.slice/user-1000.slice/session-3.scope",
                Some("session-3.scope"),
            ),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/editor.service",
                Some("user@1000.service"),
            ),
            (
                r"0::/system.slice/system-getty.slice/getty@tty1\x2da.service",
                Some("getty@tty1-a.service"),
            ),
            (r"0::/bad\x2.service", Some(r"bad\x2.service")),
            ("0::/docker/{ID}/init.scope", Some("init.scope")),
            (
                "0::/system.slice/containerd.service/kubepods-podx.slice:cri-containerd:{ID}",
                Some("containerd.service"),
            ),
            ("0::/../../system.slice/cron.service", Some("cron.service")),
        ];
        for (text, unit) in table {
            let cgroups = Cgroups::parse(text);
            assert_eq!(cgroups.systemd_unit().as_deref(), unit, "{text}");
        }
    }
}
