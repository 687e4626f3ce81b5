//! From what the kernel saw to a named caller, read from `/proc` while the caller waits.

mod cgroup;
mod container;
mod hierarchy;
mod process;
mod program;
mod redact;
mod script;
mod users;
mod via;
pub mod workload;

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::ValueEnum;
use imds_guard_common::flow::Origin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::policy::{
    Needs,
    caller::{Caller, Netns, Sender, Unresolved},
};
use cgroup::Cgroups;
use hierarchy::Hierarchy;
pub use program::DIGESTERS;
use program::Digests;
use users::Users;
use workload::{Wait, Workloads};

/// How long reading a command line may take. It is the caller's own memory, and the caller can make
/// the kernel wait for it (a FUSE file mapped over its arguments); everything else is answered by
/// the kernel alone.
const COMMAND_LINE_TIMEOUT: Duration = Duration::from_millis(200);

/// How many command lines are read at once. While callers hold all of these up, others go without
/// theirs, but nobody waits.
pub const COMMAND_LINE_READERS: usize = 16;

/// How much of a command line is recorded.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum CommandLines {
    /// With what looks like a secret replaced by `[redacted]`.
    #[default]
    Redacted,
    /// Whole: secrets in arguments end up in the events.
    Full,
    /// Not at all.
    Off,
}

/// Names callers.
pub struct Resolver {
    proc: PathBuf,
    users: Users,
    groups: Users,
    hierarchy: Hierarchy,
    digests: Digests,
    workloads: Workloads,
    netns_cookie: Option<u64>,
    command_lines: CommandLines,
    readers: Arc<Semaphore>,
}

impl Resolver {
    /// A resolver that reads from this `/proc`, these files of users and groups, and this cgroup v2
    /// hierarchy. `netns_cookie` is that of the
    /// guard's own network namespace; `None` before Linux 5.14, where `SO_NETNS_COOKIE` is missing.
    #[must_use]
    pub fn new(
        proc: impl Into<PathBuf>,
        (passwd, group): (&str, &str),
        cgroups: impl Into<PathBuf>,
        workloads: Workloads,
        netns_cookie: Option<u64>,
        command_lines: CommandLines,
    ) -> Self {
        let proc = proc.into();
        Self {
            digests: Digests::new(proc.clone()),
            proc,
            users: Users::of(passwd),
            groups: Users::of(group),
            workloads,
            hierarchy: Hierarchy::at(cgroups),
            netns_cookie,
            command_lines,
            readers: Arc::new(Semaphore::new(COMMAND_LINE_READERS)),
        }
    }

    /// Names the process behind a connection. Never fails: what could not be read, or might belong
    /// to another process, is missing, and the caller says that it is unresolved. What takes an effort
    /// is found out where it is needed.
    pub async fn resolve(&self, origin: &Origin, needs: Needs) -> Caller {
        let mut caller = Caller {
            pid: origin.pid,
            tid: origin.tid,
            uid: origin.uid,
            gid: origin.gid,
            comm: lossy(&origin.comm),
            cgroup_id: origin.cgroup_id,
            netns_cookie: origin.netns_cookie,
            netns: Netns::Other,
            resolved: false,
            ..Caller::default()
        };
        let process = process::Process::open(&self.proc, origin);
        caller.netns = self.netns(origin, process.as_ref().ok());
        match process {
            Ok(process) => self.describe(&mut caller, process, needs).await,
            Err(why) => caller.unresolved = Some(why),
        }
        caller
    }

    /// Names a process that has not connected; `None` if there is none of that number.
    pub async fn resolve_pid(&self, pid: u32, needs: Needs) -> Option<Caller> {
        let mut origin = process::origin(&self.proc, pid)?;
        let process = process::Process::open(&self.proc, &origin).ok()?;
        if process.shares_netns(&self.proc) {
            origin.netns_cookie = self.netns_cookie.unwrap_or_default();
        }
        let path = process.cgroup().ok().and_then(Cgroups::path);
        origin.cgroup_id = path
            .and_then(|path| self.hierarchy.id(&path))
            .unwrap_or_default();
        Some(self.resolve(&origin, needs).await)
    }

    /// Name of the user in whose login a process runs, whoever it has become since
    /// (`/proc/PID/loginuid`); `None` for services.
    #[must_use]
    pub fn login(&self, pid: u32) -> Option<String> {
        let file = self.proc.join(pid.to_string()).join("loginuid");
        let uid = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        self.login_name(uid)
    }

    /// Name of a login's user, or number; `None` where nobody has logged in.
    fn login_name(&self, uid: u32) -> Option<String> {
        (uid != u32::MAX).then(|| self.users.name(uid).unwrap_or_else(|| uid.to_string()))
    }

    /// Cookie of the guard's own network namespace.
    #[must_use]
    pub fn netns_cookie(&self) -> Option<u64> {
        self.netns_cookie
    }

    /// Names the socket behind a packet, as far as its cgroup tells.
    #[must_use]
    pub fn sender(&self, cgroup_id: u64, uid: u32) -> Sender {
        let path = self.hierarchy.path(cgroup_id);
        let cgroups = path.as_deref().map(Cgroups::of_path).unwrap_or_default();
        Sender {
            uid,
            cgroup_id,
            systemd_unit: cgroups.systemd_unit(),
            container_id: cgroups.container().id,
            cgroup: path,
        }
    }

    async fn describe(&self, caller: &mut Caller, process: process::Process, needs: Needs) {
        let cgroup = process.cgroup();
        let unreadable = cgroup.as_ref().err().copied();
        let cgroup = cgroup.unwrap_or_default();
        caller.exe = process.exe();
        caller.started = process.started();
        caller.exe_verified = match &caller.exe {
            Some(exe) => program::is_hosts(&self.proc, caller.pid, exe),
            None => false,
        };
        caller.parents = process.parents(&self.proc);
        if needs.ancestors {
            for parent in &mut caller.parents {
                parent.exe_verified = match &parent.exe {
                    Some(exe) => program::is_hosts(&self.proc, parent.pid, exe),
                    None => false,
                };
            }
        }
        caller.systemd_unit = cgroup.systemd_unit();
        caller.login = process.login().and_then(|uid| self.login_name(uid));
        caller.login_session = process.login_session();
        let unit = caller.systemd_unit.as_deref();
        caller.via = via::of(&caller.parents, unit, caller.uid);
        let container = cgroup.container();
        caller.container_id = container.id;
        caller.container_runtime = container.runtime;
        caller.pod_uid = container.pod_uid;
        // Where the cgroup is not known, it may be a container's.
        let host_user =
            unreadable.is_none() && (caller.container_id.is_none() || cgroup.is_of_user());
        caller.cgroup = cgroup.path();
        if host_user {
            caller.user = self.users.name(caller.uid);
            caller.group = self.groups.name(caller.gid);
        }
        self.look_up(caller, needs).await;
        let process = Arc::new(process);
        caller.command_line = match self.command_lines {
            CommandLines::Off => None,
            CommandLines::Full => self.read_command_line(&process).await,
            CommandLines::Redacted => self
                .read_command_line(&process)
                .await
                .map(|arguments| redact::command_line(&arguments)),
        };
        if let (Some(exe), Some(arguments)) = (&caller.exe, &caller.command_line) {
            caller.script = script::of(exe, arguments, process.cwd().as_deref());
        }
        // All of the above was read through one handle, which the kernel ties to one process; if
        // that has ended meanwhile, part of it may be missing.
        caller.unresolved = match process.is_alive() {
            true => unreadable,
            false => Some(Unresolved::Gone),
        };
        caller.resolved = caller.unresolved.is_none();
        if !caller.resolved {
            // These were asked for by pid, which may have been somebody else's by then.
            caller.exe_verified = false;
            caller.exe_sha256 = None;
            for parent in &mut caller.parents {
                parent.exe_verified = false;
            }
        }
    }

    /// Finds out what is not in `/proc`.
    async fn look_up(&self, caller: &mut Caller, needs: Needs) {
        let wait = |needed| if needed { Wait::Bounded } else { Wait::No };
        if let Some(id) = &caller.container_id {
            let runtime = caller.container_runtime;
            let found = self
                .workloads
                .container(id, runtime, wait(needs.container))
                .await;
            caller.missing.container = needs.container && found.is_unknown();
            caller.container = found.yes();
        }
        if let Some(uid) = &caller.pod_uid {
            let found = self.workloads.pod(uid, wait(needs.pod)).await;
            caller.missing.pod = needs.pod && found.is_unknown();
            caller.pod = found.yes();
        }
        if needs.sha256 {
            caller.exe_sha256 = self.digests.of(caller.pid).await;
            caller.missing.sha256 = caller.exe_sha256.is_none();
        }
    }

    /// Reads it on another thread, in bounded number and time.
    async fn read_command_line(&self, process: &Arc<process::Process>) -> Option<Vec<String>> {
        let place = Arc::clone(&self.readers).try_acquire_owned().ok()?;
        let process = Arc::clone(process);
        let read = tokio::task::spawn_blocking(move || {
            let command_line = process.command_line();
            drop(place);
            command_line
        });
        tokio::time::timeout(COMMAND_LINE_TIMEOUT, read)
            .await
            .ok()?
            .ok()?
    }

    fn netns(&self, origin: &Origin, process: Option<&process::Process>) -> Netns {
        let host = match self.netns_cookie {
            Some(own) => origin.netns_cookie == own,
            None => process.is_some_and(|process| process.shares_netns(&self.proc)),
        };
        if host { Netns::Host } else { Netns::Other }
    }
}

/// A name that the kernel has padded with NUL.
pub fn lossy(padded: &[u8]) -> String {
    let end = padded
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(padded.len());
    String::from_utf8_lossy(&padded[..end]).into_owned()
}
