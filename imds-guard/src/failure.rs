//! Why the guard could not start: one sentence and one exit code each.

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode};

use thiserror::Error;

/// A reason not to start, with what to do about it.
#[derive(Debug, Error)]
pub enum Failure {
    /// Exit code 10.
    #[error(
        "missing {missing}: run imds-guard as root, or give it these capabilities \
         (systemd: AmbientCapabilities=, Kubernetes: securityContext.capabilities.add)"
    )]
    Capabilities {
        /// The names, such as `CAP_BPF, CAP_NET_ADMIN`.
        missing: String,
    },
    /// Exit code 11.
    #[error("no usable cgroup v2: {0}")]
    Cgroup(String),
    /// Exit code 12.
    #[error("kernel {found} is too old: imds-guard needs {needed} or newer")]
    KernelTooOld {
        /// As uname(2) says.
        found: String,
        /// The oldest kernel that works.
        needed: &'static str,
    },
    /// Exit code 13.
    #[error(
        "this kernel lacks {missing}: it was built without it (CONFIG_BPF_SYSCALL, \
         CONFIG_CGROUP_BPF, CONFIG_DEBUG_INFO_BTF) or forbids it (lockdown, seccomp)"
    )]
    KernelFeature {
        /// Program types, helpers or maps.
        missing: String,
    },
    /// Exit code 14.
    #[error(
        "{address} is busy: another process listens on that port; find it with \
         `ss -ltnp sport = :{}`, or choose another port with --listen", address.port()
    )]
    PortBusy {
        /// The listener that could not be bound.
        address: SocketAddr,
    },
    /// Exit code 15.
    #[error(
        "{} is already the address of interface {interface}: imds-guard wants an address of its \
         own on {link}; remove it there, or choose another one with --listen", address.ip()
    )]
    AddressInUse {
        /// The listener's address.
        address: SocketAddr,
        /// Who has it.
        interface: String,
        /// Where it should be.
        link: String,
    },
    /// Exit code 16.
    #[error("cannot write events to {}: {error}; choose another file with --events", path.display())]
    Events {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Exit code 17.
    #[error(
        "this process does not see the host's process ids, so it could not name who calls: run it \
         outside containers, or in the host's pid namespace (Kubernetes: hostPID: true; docker: \
         --pid=host)"
    )]
    PidNamespace,
    /// Exit code 18.
    #[error(
        "{} is not in a BPF file system, where the kernel programs are kept: mount one with \
         `mount -t bpf bpf /sys/fs/bpf` (in a container: mount the host's /sys/fs/bpf into it), or \
         name another place with --pins", path.display()
    )]
    Bpffs {
        /// Where pins should be.
        path: PathBuf,
    },
    /// Exit code 19.
    #[error(
        "imds-guard is already running with pid {pid}: stop it, or take over from it with --replace"
    )]
    Running {
        /// The other daemon.
        pid: u32,
    },
    /// Exit code 20.
    #[error(
        "{} was left by another version of imds-guard, whose kernel programs this one does not know \
         (it knows {known}): run `imds-guard detach` of that version first, or remove the directory",
        found.display()
    )]
    Layout {
        /// The pins of the other version.
        found: PathBuf,
        /// The layout of this version.
        known: &'static str,
    },
    /// Exit code 21.
    #[error(
        "no imds-guard is running: nobody listens on {}; start it, or name its directory with \
         --run-dir", path.display()
    )]
    NotRunning {
        /// The control socket.
        path: PathBuf,
    },
    /// Exit code 22.
    #[error("cannot speak to imds-guard on {}: {error}; only root may", path.display())]
    Control {
        /// The control socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Exit code 23.
    #[error("{0}")]
    Refused(String),
    /// Exit code 2, as for a bad option.
    #[error("{0}")]
    Settings(String),
    /// Exit code 1.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// Exit codes, for `--help` and the documentation.
pub const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  an error that has no code of its own
   2  bad option, argument or configuration file
  10  not root, or a capability is missing
  11  no cgroup v2, or not the one asked for
  12  the kernel is too old
  13  the kernel lacks BTF, a helper, or a program or map type
  14  the listener's port is busy
  15  the listener's address belongs to another interface
  16  the event file cannot be written
  17  not in the host's pid namespace
  18  no BPF file system for the pins
  19  imds-guard is already running
  20  pins of another version are in place
  21  no imds-guard is running that could answer
  22  the control socket cannot be opened
  23  the running imds-guard refuses, and says why";

impl Failure {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Other(_) => 1,
            Self::Settings(_) => 2,
            Self::Capabilities { .. } => 10,
            Self::Cgroup(_) => 11,
            Self::KernelTooOld { .. } => 12,
            Self::KernelFeature { .. } => 13,
            Self::PortBusy { .. } => 14,
            Self::AddressInUse { .. } => 15,
            Self::Events { .. } => 16,
            Self::PidNamespace => 17,
            Self::Bpffs { .. } => 18,
            Self::Running { .. } => 19,
            Self::Layout { .. } => 20,
            Self::NotRunning { .. } => 21,
            Self::Control { .. } => 22,
            Self::Refused(_) => 23,
        })
    }
}
