//! From what the kernel saw to a named caller, read from `/proc` while the caller waits.

mod cgroup;
mod container;
mod hierarchy;
mod process;
mod redact;
mod users;

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::ValueEnum;
use imds_guard_common::flow::Origin;
use tokio::sync::Semaphore;

use crate::policy::caller::{Caller, Netns, Sender, Unresolved};
use cgroup::Cgroups;
use hierarchy::Hierarchy;
use users::Users;

/// How long reading a command line may take. It is the caller's own memory, and the caller can make
/// the kernel wait for it (a FUSE file mapped over its arguments); everything else is answered by
/// the kernel alone.
const COMMAND_LINE_TIMEOUT: Duration = Duration::from_millis(200);

/// How many command lines are read at once. While callers hold all of these up, others go without
/// theirs, but nobody waits.
pub const COMMAND_LINE_READERS: usize = 16;

/// How much of a command line is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
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
    hierarchy: Hierarchy,
    netns_cookie: Option<u64>,
    command_lines: CommandLines,
    readers: Arc<Semaphore>,
}

impl Resolver {
    /// A resolver that reads from this `/proc`, this passwd file and this cgroup v2 hierarchy. `netns_cookie` is that of the
    /// guard's own network namespace; `None` before Linux 5.14, where `SO_NETNS_COOKIE` is missing.
    #[must_use]
    pub fn new(
        proc: impl Into<PathBuf>,
        passwd: impl Into<PathBuf>,
        cgroups: impl Into<PathBuf>,
        netns_cookie: Option<u64>,
        command_lines: CommandLines,
    ) -> Self {
        Self {
            proc: proc.into(),
            users: Users::of(passwd),
            hierarchy: Hierarchy::at(cgroups),
            netns_cookie,
            command_lines,
            readers: Arc::new(Semaphore::new(COMMAND_LINE_READERS)),
        }
    }

    /// Names the process behind a connection. Never fails: what could not be read, or might belong
    /// to another process, is missing, and the caller says that it is unresolved.
    pub async fn resolve(&self, origin: &Origin) -> Caller {
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
            unresolved: None,
            exe: None,
            command_line: None,
            started: None,
            parents: Vec::new(),
            cgroup: None,
            user: None,
            systemd_unit: None,
            container_id: None,
            container_runtime: None,
            pod_uid: None,
        };
        let process = process::Process::open(&self.proc, origin);
        caller.netns = self.netns(origin, process.as_ref().ok());
        match process {
            Ok(process) => self.describe(&mut caller, process).await,
            Err(why) => caller.unresolved = Some(why),
        }
        caller
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

    async fn describe(&self, caller: &mut Caller, process: process::Process) {
        let cgroup = process.cgroup().unwrap_or_default();
        caller.exe = process.exe();
        caller.started = process.started();
        caller.parents = process.parents(&self.proc);
        caller.systemd_unit = cgroup.systemd_unit();
        let container = cgroup.container();
        caller.container_id = container.id;
        caller.container_runtime = container.runtime;
        caller.pod_uid = container.pod_uid;
        let host_user = caller.container_id.is_none() || cgroup.is_of_user();
        caller.cgroup = cgroup.path();
        if host_user {
            caller.user = self.users.name(caller.uid);
        }
        let process = Arc::new(process);
        caller.command_line = match self.command_lines {
            CommandLines::Off => None,
            CommandLines::Full => self.read_command_line(&process).await,
            CommandLines::Redacted => self
                .read_command_line(&process)
                .await
                .map(|arguments| redact::command_line(&arguments)),
        };
        // All of the above was read through one handle, which the kernel ties to one process; if
        // that has ended meanwhile, part of it may be missing.
        if process.is_alive() {
            caller.resolved = true;
        } else {
            caller.unresolved = Some(Unresolved::Gone);
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
