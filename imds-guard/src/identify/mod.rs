//! From what the kernel saw to a named caller, read from `/proc` while the caller waits.

mod cgroup;
mod container;
mod hierarchy;
mod process;
mod program;
mod redact;
mod script;
mod shares;
mod users;
mod via;
pub mod workload;

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use clap::ValueEnum;
use futures_util::FutureExt as _;
use imds_guard_common::flow::Origin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::caller::{Caller, Missing, Netns, Sender, Unresolved};
use cgroup::Cgroups;
use hierarchy::Hierarchy;
use process::Process;
pub use program::DIGESTERS;
use program::Digests;
use shares::Shares;
use users::Users;
use workload::{Wait, Workloads};

/// How long reading a command line may take. It is the caller's own memory, and the caller can make
/// the kernel wait for it (a FUSE file mapped over its arguments).
const COMMAND_LINE_TIMEOUT: Duration = Duration::from_millis(200);

/// How long looking at programs may take, which can be in file systems that do not answer. Rules are about
/// them, so there is more patience for it; all else about a process is answered by the kernel alone.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(1);

/// How many of these are read at once. While callers hold all of these up, others go without theirs, but
/// nobody waits for longer.
pub const READERS: usize = 16;

/// How many for one cgroup or user.
const READERS_EACH: usize = 4;

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
    hierarchy: Arc<Hierarchy>,
    digests: Digests,
    workloads: Workloads,
    netns_cookie: Option<u64>,
    command_lines: CommandLines,
    readers: Arc<Shares>,
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
        Self {
            digests: Digests::new(),
            proc: proc.into(),
            users: Users::of(passwd),
            groups: Users::of(group),
            workloads,
            hierarchy: Arc::new(Hierarchy::at(cgroups)),
            netns_cookie,
            command_lines,
            readers: Arc::new(Shares::new(READERS, READERS_EACH)),
        }
    }

    /// Names the process behind a connection. Never fails: what could not be read, or might belong
    /// to another process, is missing, and the caller says that it is unresolved. What takes an effort
    /// is found out where it is wanted, when all else is known.
    pub async fn resolve(
        &self,
        origin: &Origin,
        wanted: impl Fn(&Caller) -> Missing,
        wait: Wait,
    ) -> Caller {
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
        let process = Process::open(&self.proc, origin).map(Arc::new);
        caller.netns = self.netns(origin, process.as_deref().ok());
        match &process {
            Ok(process) => self.describe(&mut caller, process).await,
            Err(why) => caller.unresolved = Some(*why),
        }
        caller.resolved = caller.unresolved.is_none();
        if caller.cgroup.is_none() && caller.unresolved != Some(Unresolved::KernelThread) {
            self.place_by_number(&mut caller).await;
        }
        caller.missing = Missing {
            exe: caller.missing.exe,
            ancestors: !caller.parents.is_empty(),
            sha256: caller.exe.is_some(),
            container: caller.container_id.is_some(),
            pod: caller.pod_uid.is_some(),
        };
        let wanted = wanted(&caller);
        let open = process.as_deref().ok();
        self.look_up(&mut caller, open, (wanted, wait)).await;
        // All of the above was read through one handle, which the kernel ties to one process; if
        // that has ended meanwhile, part of it may be missing.
        if !process.is_ok_and(|process| process.is_alive()) {
            caller.resolved = false;
            caller.unresolved.get_or_insert(Unresolved::Gone);
            // These were asked for by pid, which may have been somebody else's by then.
            caller.exe_verified = false;
            caller.exe_sha256 = None;
            for parent in &mut caller.parents {
                parent.exe_verified = false;
            }
        }
        if !caller.resolved {
            // No rule counts on them, and they will not be known later, either.
            let Missing { container, pod, .. } = caller.missing;
            caller.missing = Missing {
                container,
                pod,
                ..Missing::default()
            };
        }
        caller
    }

    /// Names a process that has not connected; `None` if there is none of that number.
    pub async fn resolve_pid(
        &self,
        pid: u32,
        wanted: impl Fn(&Caller) -> Missing,
    ) -> Option<Caller> {
        let mut origin = process::origin(&self.proc, pid)?;
        let process = Process::open(&self.proc, &origin).ok()?;
        if process.shares_netns(&self.proc) {
            origin.netns_cookie = self.netns_cookie.unwrap_or_default();
        }
        let path = process.cgroup().ok().and_then(Cgroups::path);
        origin.cgroup_id = path
            .and_then(|path| self.hierarchy.id(&path))
            .unwrap_or_default();
        Some(self.resolve(&origin, wanted, Wait::Bounded).await)
    }

    /// A caller with what runtimes and Kubernetes have told of it meanwhile; `None` if that is nothing.
    #[must_use]
    pub fn news(&self, caller: &Caller) -> Option<Caller> {
        let container = match (&caller.container, &caller.container_id) {
            (None, Some(id)) => {
                let found = self
                    .workloads
                    .container(id, caller.container_runtime, Wait::No);
                found.now_or_never().flatten()
            }
            _ => None,
        };
        let pod = match (&caller.pod, &caller.pod_uid) {
            (None, Some(uid)) => self.workloads.pod(uid, Wait::No).now_or_never().flatten(),
            _ => None,
        };
        if container.is_none() && pod.is_none() {
            return None;
        }
        let mut news = caller.clone();
        news.missing.container &= container.is_none();
        news.missing.pod &= pod.is_none();
        news.container = container.or(news.container);
        news.pod = pod.or(news.pod);
        Some(news)
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

    /// What `/proc` tells.
    async fn describe(&self, caller: &mut Caller, process: &Arc<Process>) {
        caller.exe = process.exe();
        caller.started = process.started();
        caller.parents = process.parents(&self.proc);
        caller.login = process.login().and_then(|uid| self.login_name(uid));
        caller.login_session = process.login_session();
        match process.cgroup() {
            Ok(cgroup) => self.place(caller, cgroup, true),
            Err(why) => caller.unresolved = Some(why),
        }
        caller.via = via::of(&caller.parents, caller.systemd_unit.as_deref());
        let command_line = self.read_files(caller, process).await;
        caller.command_line = match self.command_lines {
            CommandLines::Off => None,
            CommandLines::Full => command_line,
            CommandLines::Redacted => command_line.map(|it| redact::command_line(&it)),
        };
        if let (Some(exe), Some(arguments)) = (&caller.exe, &caller.command_line) {
            caller.script = script::of(exe, arguments, process.cwd().as_deref());
        }
    }

    /// What the kernel's number of the cgroup tells, where the process itself cannot be asked. Only what is
    /// found that way is known: what is not may be in a hierarchy of cgroup v1.
    async fn place_by_number(&self, caller: &mut Caller) {
        let (hierarchy, id) = (Arc::clone(&self.hierarchy), caller.cgroup_id);
        let path = self.in_time(caller, move || hierarchy.path(id)).await;
        if let Some(path) = path.flatten() {
            let own = std::fs::read_to_string(self.proc.join("self/cgroup"));
            let is_all = own.is_ok_and(|own| own.lines().all(|line| line.starts_with("0::")));
            self.place(caller, Cgroups::of_path(&path), is_all);
        }
    }

    /// What the cgroup tells. Users are named only if that is all there is to know of it, as it may be a
    /// container's otherwise, which has users of its own.
    fn place(&self, caller: &mut Caller, cgroup: Cgroups, is_all: bool) {
        caller.systemd_unit = cgroup.systemd_unit();
        let container = cgroup.container();
        caller.container_id = container.id;
        caller.container_runtime = container.runtime;
        caller.pod_uid = container.pod_uid;
        if is_all && (caller.container_id.is_none() || cgroup.is_of_user()) {
            caller.user = self.users.name(caller.uid);
            caller.group = self.groups.name(caller.gid);
        }
        caller.cgroup = cgroup.path();
    }

    /// Finds out what is not in `/proc`.
    async fn look_up(
        &self,
        caller: &mut Caller,
        process: Option<&Process>,
        (wanted, wait): (Missing, Wait),
    ) {
        let wait_for = |wanted| if wanted { wait } else { Wait::No };
        if let Some(id) = &caller.container_id {
            let (runtime, wait) = (caller.container_runtime, wait_for(wanted.container));
            caller.container = self.workloads.container(id, runtime, wait).await;
            caller.missing.container = caller.container.is_none();
        }
        if let Some(uid) = &caller.pod_uid {
            caller.pod = self.workloads.pod(uid, wait_for(wanted.pod)).await;
            caller.missing.pod = caller.pod.is_none();
        }
        if wanted.ancestors {
            let (proc, mut parents) = (self.proc.clone(), caller.parents.clone());
            let verify = move || {
                let mut is_known = true;
                for parent in &mut parents {
                    let exe = parent.exe.as_deref().zip(i32::try_from(parent.pid).ok());
                    let is_hosts = exe.map(|(exe, pid)| program::is_hosts(&proc, pid, exe));
                    is_known &= is_hosts != Some(None);
                    parent.exe_verified = is_hosts == Some(Some(true));
                }
                (parents, is_known)
            };
            if let Some((parents, is_known)) = self.in_time(caller, verify).await {
                caller.parents = parents;
                caller.missing.ancestors = !is_known;
            }
        }
        if let Some(process) = process
            && wanted.sha256
        {
            let (proc, pid) = (self.proc.clone(), process.number());
            let program = self
                .in_time(caller, move || program::open(&proc, pid))
                .await;
            if let Some(program) = program.flatten() {
                let parties = shares::parties(caller);
                caller.exe_sha256 = self.digests.of(program, parties, wait).await;
                caller.missing.sha256 = caller.exe_sha256.is_none();
            }
        }
    }

    /// Finds out whether the program is the host's, and returns the command line: what can block.
    async fn read_files(&self, caller: &mut Caller, process: &Arc<Process>) -> Option<Vec<String>> {
        let verified = Arc::new(OnceLock::new());
        let read = {
            let (proc, pid, exe) = (self.proc.clone(), process.number(), caller.exe.clone());
            let (process, verified) = (Arc::clone(process), Arc::clone(&verified));
            let reads_more = self.command_lines != CommandLines::Off;
            move || {
                let is_hosts = exe.map(|exe| program::is_hosts(&proc, pid, &exe));
                let _once = verified.set(is_hosts.unwrap_or(Some(false)));
                reads_more.then(|| process.command_line()).flatten()
            }
        };
        let mut read = std::pin::pin!(self.on_another_thread(caller, read));
        let mut command_line = tokio::time::timeout(COMMAND_LINE_TIMEOUT, read.as_mut()).await;
        if command_line.is_err() && verified.get().is_none() {
            let longer = PROGRAM_TIMEOUT.saturating_sub(COMMAND_LINE_TIMEOUT);
            command_line = tokio::time::timeout(longer, read).await;
        }
        let is_hosts = verified.get().copied().flatten();
        caller.exe_verified = is_hosts.unwrap_or_default();
        caller.missing.exe = is_hosts.is_none();
        command_line.ok()??
    }

    /// Does what can block, for as long as there is patience for programs.
    async fn in_time<T: Send + 'static>(
        &self,
        caller: &Caller,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let read = self.on_another_thread(caller, read);
        tokio::time::timeout(PROGRAM_TIMEOUT, read).await.ok()?
    }

    /// Does what can block where it holds up nobody but its caller, who has its share of threads.
    fn on_another_thread<T, R>(
        &self,
        caller: &Caller,
        read: R,
    ) -> impl Future<Output = Option<T>> + Send + use<T, R>
    where
        T: Send + 'static,
        R: FnOnce() -> T + Send + 'static,
    {
        let (readers, parties) = (Arc::clone(&self.readers), shares::parties(caller));
        async move {
            let place = readers.take(&parties).await?;
            let read = tokio::task::spawn_blocking(move || {
                let _held = place;
                read()
            });
            read.await.ok()
        }
    }

    fn netns(&self, origin: &Origin, process: Option<&Process>) -> Netns {
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
