//! Who is asking.

use std::{collections::BTreeMap, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The process behind a connection.
///
/// The first group of fields comes from the kernel, taken while the process was in `connect(2)`: it
/// is always true. The second is read from `/proc` while the process waits for its answer, all of it
/// from the process that connected (`resolved`), but as it is then: a process that has executed
/// another program since it connected shows that one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Caller {
    /// Process id (the kernel's tgid) in the host's pid namespace.
    pub pid: u32,
    /// Thread id (the kernel's pid) in the host's pid namespace.
    pub tid: u32,
    /// Real user id in the host's user namespace.
    pub uid: u32,
    /// Real group id in the host's user namespace.
    pub gid: u32,
    /// Name of the calling thread; the process can choose it freely.
    pub comm: String,
    /// Inode of the process's cgroup v2 directory.
    pub cgroup_id: u64,
    /// The kernel's number for the network namespace of the socket.
    pub netns_cookie: u64,
    /// Whose network namespace that is.
    pub netns: Netns,

    /// Whether the process was found in `/proc`, and is the one that connected.
    pub resolved: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unresolved: Option<Unresolved>,
    /// The running program. In a container, the path as seen inside; ` (deleted)` is the kernel's
    /// mark for a file that is gone.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exe: Option<String>,
    /// Whether the host has that very file under that name (device and inode). Without it, `exe` is
    /// a name that the process can have chosen: in a container or mount namespace of its own, or
    /// after the file was replaced.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub exe_verified: bool,
    /// SHA-256 of the file that runs, where a rule asks for it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exe_sha256: Option<String>,
    /// The command line, as configured: with what looks like a secret replaced by `[redacted]`
    /// (default), whole, or not at all. The process can change it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub command_line: Option<Vec<String>>,
    /// What it runs, if it is an interpreter: a script, the main class or jar of Java, `-m` and a module of
    /// Python; the applet of busybox. From the command line, so the process can change it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub script: Option<String>,
    /// Who logged in, whoever the process has become since (`sudo`): name or number of the user, from
    /// the kernel's audit login id; missing for services.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub login: Option<String>,
    /// Number of that login, as `ausearch --session` takes it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub login_session: Option<u32>,
    /// How it came to run, as the names of its ancestors and units tell; they can be made up.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub via: Vec<Via>,
    /// When the process started (RFC 3339, UTC; to 10 ms).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub started: Option<String>,
    /// Its ancestors, nearest first, up to init.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub parents: Vec<Parent>,
    /// Path of its cgroup.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cgroup: Option<String>,
    /// Name of the user on the host; not given for processes in containers, which have users of
    /// their own, unless it is the user who runs the container.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<String>,
    /// Name of the group on the host; given as `user` is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub group: Option<String>,
    /// The systemd unit it runs in.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub systemd_unit: Option<String>,
    /// Id of the container it runs in.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub container_id: Option<String>,
    /// Who runs that container, where the cgroup's path says it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub container_runtime: Option<Runtime>,
    /// UID of the Kubernetes pod it runs in; for static pods, the one that kubelet gave them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pod_uid: Option<String>,
    /// What the runtime says of that container.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub container: Option<Arc<Container>>,
    /// What Kubernetes says of that pod.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pod: Option<Arc<Pod>>,
    /// What else is not known.
    #[serde(skip)]
    pub missing: Missing,
}

/// What is not known of a caller: it could not be found out in time, or nobody wanted to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Whether its program is the one that the host has under its name.
    pub exe: bool,
    /// The same of its ancestors.
    pub ancestors: bool,
    /// The digest of its program.
    pub sha256: bool,
    /// The image of the container that it is in.
    pub container: bool,
    /// The pod that it is in.
    pub pod: bool,
}

impl Missing {
    /// Whether anything is.
    #[must_use]
    pub const fn any(self) -> bool {
        self.exe || self.ancestors || self.sha256 || self.container || self.pod
    }

    /// What is missing here, or there.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            exe: self.exe || other.exe,
            ancestors: self.ancestors || other.ancestors,
            sha256: self.sha256 || other.sha256,
            container: self.container || other.container,
            pod: self.pod || other.pod,
        }
    }

    /// What is missing here and there.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            exe: self.exe && other.exe,
            ancestors: self.ancestors && other.ancestors,
            sha256: self.sha256 && other.sha256,
            container: self.container && other.container,
            pod: self.pod && other.pod,
        }
    }
}

/// A container, as its runtime knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Container {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// The image it was made of.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<String>,
}

/// A pod, as Kubernetes knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// What it belongs to, as `Deployment/web`; of a ReplicaSet that a Deployment made, that.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub owner: Option<String>,
    /// The service account that it runs as.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub service_account: Option<String>,
    /// Its labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub labels: BTreeMap<String, String>,
}

/// Who runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// Docker, also for ECS and cri-dockerd.
    Docker,
    /// containerd, for Kubernetes or nerdctl.
    Containerd,
    /// CRI-O.
    Crio,
    /// podman.
    Podman,
}

/// How a process came to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// By cron, anacron or at.
    Cron,
    /// In a session of ssh.
    Ssh,
    /// By sudo, su or alike.
    Sudo,
    /// By a timer of systemd.
    Timer,
}

/// An ancestor of the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Parent {
    /// Process id in the host's pid namespace.
    pub pid: u32,
    /// The running program; missing for kernel threads.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exe: Option<String>,
    /// As with the caller; looked for only where a rule asks for it.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub exe_verified: bool,
}

/// The socket behind a packet. Who holds it is not known: packets leave long after the call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sender {
    /// Owner of the socket, as the user namespace of its network namespace numbers users.
    pub uid: u32,
    /// Inode of the cgroup v2 directory that the socket was made in.
    pub cgroup_id: u64,
    /// Path of that cgroup, if it is still there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cgroup: Option<String>,
    /// Its systemd unit.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub systemd_unit: Option<String>,
    /// Its container.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub container_id: Option<String>,
}

/// Whose network namespace a socket lives in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Netns {
    /// The guard's own, the host's.
    #[default]
    Host,
    /// Another one: a container's, for instance.
    Other,
}

/// Why a process could not be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unresolved {
    /// It was gone when the guard looked.
    Gone,
    /// Its pid belongs to a process that started after the connection was made.
    PidReused,
    /// The kernel connected on behalf of a process that it does not tell (io_uring before Linux 5.10.162).
    KernelThread,
    /// `/proc` could not be read.
    Unreadable,
}
