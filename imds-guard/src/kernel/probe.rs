//! What this kernel and this process can do.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use caps::{CapSet, Capability};

use crate::failure::Failure;

/// The oldest kernel the programs load on: Amazon Linux 2's.
pub const OLDEST_KERNEL: (u32, u32) = (5, 10);
const OLDEST_KERNEL_NAME: &str = "5.10";

/// Capabilities without which the guard cannot start: load programs, attach them and add an
/// address, listen on a port below 1024, read other processes' executables.
pub const NEEDED_CAPABILITIES: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_PTRACE,
];

/// The inode of a cgroup v2 hierarchy's real root (kernel: kernfs gives the root inode 1).
const ROOT_INODE: u64 = 1;

/// # Errors
/// [`Failure::Capabilities`] with what is missing.
pub fn capabilities() -> Result<(), Failure> {
    let missing: Vec<String> = NEEDED_CAPABILITIES
        .into_iter()
        .filter(|capability| !caps::has_cap(None, CapSet::Effective, *capability).unwrap_or(false))
        .map(|capability| capability.to_string())
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Failure::Capabilities {
            missing: missing.join(", "),
        })
    }
}

/// Inode of the initial pid namespace (kernel: PROC_PID_INIT_INO).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// Whether this process sees the host's process ids, as the kernel programs do.
///
/// # Errors
/// [`Failure::PidNamespace`] if it has a pid namespace of its own.
pub fn pid_namespace() -> Result<(), Failure> {
    match fs::metadata("/proc/self/ns/pid") {
        Ok(namespace) if namespace.ino() == INITIAL_PID_NAMESPACE => Ok(()),
        _ => Err(Failure::PidNamespace),
    }
}

/// The kernel's release, if it is new enough.
///
/// # Errors
/// [`Failure::KernelTooOld`].
pub fn kernel() -> Result<String, Failure> {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    if version(&release) >= Some(OLDEST_KERNEL) {
        Ok(release)
    } else {
        Err(Failure::KernelTooOld {
            found: release,
            needed: OLDEST_KERNEL_NAME,
        })
    }
}

/// Major and minor number of a release such as `6.1.0-21-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The mount point of the cgroup v2 hierarchy.
///
/// # Errors
/// [`Failure::Cgroup`] if there is none.
pub fn cgroup2_mount() -> Result<PathBuf, Failure> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Failure::Cgroup(format!("/proc/self/mountinfo: {error}")))?;
    find_cgroup2(&mounts).ok_or_else(|| {
        Failure::Cgroup(
            "this host mounts cgroup v1 only: boot it with systemd.unified_cgroup_hierarchy=1, or \
             mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`"
                .into(),
        )
    })
}

/// Fields as in proc(5): id, parent, device, root, mount point, options…, `-`, type, source, options.
fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup2 ").then_some(())?;
        mount.split(' ').nth(4).map(PathBuf::from)
    })
}

/// The cgroup to watch: the one asked for, or the host's root.
///
/// # Errors
/// [`Failure::Cgroup`] if it is not a cgroup v2 directory, or if none was asked for and a cgroup
/// namespace hides the host's root.
pub fn cgroup(asked_for: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = asked_for {
        return if path.join("cgroup.procs").exists() && is_cgroup2(path) {
            Ok(path.to_owned())
        } else {
            Err(Failure::Cgroup(format!(
                "{} is not a directory of the cgroup v2 hierarchy",
                path.display()
            )))
        };
    }
    let root = cgroup2_mount()?;
    if is_host_root(&root) {
        Ok(root)
    } else {
        Err(Failure::Cgroup(format!(
            "{} is not the host's root cgroup, but that of a container: processes outside it would \
             not be watched; mount the host's /sys/fs/cgroup into the container and give its path \
             with --cgroup",
            root.display()
        )))
    }
}

/// Whether a cgroup is the host's root, which all processes are below.
#[must_use]
pub fn is_host_root(cgroup: &Path) -> bool {
    fs::metadata(cgroup).is_ok_and(|meta| meta.ino() == ROOT_INODE)
}

fn is_cgroup2(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}

/// What the programs need and the kernel does not have, in words.
#[must_use]
pub fn missing_features() -> Vec<String> {
    use BpfHelper as H;
    let mut missing = Vec::new();
    if aya::features().btf().is_none() {
        missing.push("BTF (type information for maps)".to_owned());
    }
    let programs = [
        ("cgroup/connect programs", ProgramType::CgroupSockAddr),
        ("cgroup_skb programs", ProgramType::CgroupSkb),
        ("tc programs", ProgramType::SchedClassifier),
    ];
    for (name, program) in programs {
        if matches!(is_program_supported(program), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    for (name, map) in [
        ("ring buffers", MapType::RingBuf),
        ("LRU maps", MapType::LruHash),
    ] {
        if matches!(is_map_supported(map), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    let helpers = [
        (
            "bpf_get_socket_cookie",
            ProgramType::CgroupSockAddr,
            H::BPF_FUNC_get_socket_cookie,
        ),
        (
            "bpf_get_netns_cookie",
            ProgramType::CgroupSockAddr,
            H::BPF_FUNC_get_netns_cookie,
        ),
        (
            "bpf_get_current_cgroup_id",
            ProgramType::CgroupSockAddr,
            H::BPF_FUNC_get_current_cgroup_id,
        ),
        (
            "bpf_ktime_get_boot_ns",
            ProgramType::CgroupSockAddr,
            H::BPF_FUNC_ktime_get_boot_ns,
        ),
        (
            "bpf_get_socket_cookie",
            ProgramType::CgroupSkb,
            H::BPF_FUNC_get_socket_cookie,
        ),
        (
            "bpf_skb_cgroup_id",
            ProgramType::CgroupSkb,
            H::BPF_FUNC_skb_cgroup_id,
        ),
        (
            "bpf_skb_cgroup_id",
            ProgramType::SchedClassifier,
            H::BPF_FUNC_skb_cgroup_id,
        ),
    ];
    for (name, program, helper) in helpers {
        if matches!(is_helper_supported(program, helper), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    missing.dedup();
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version("5.10.223-212.873.amzn2.x86_64"), Some((5, 10)));
        assert_eq!(version("6.1.0-21-cloud-amd64"), Some((6, 1)));
        assert!(version("5.4.0").unwrap() < OLDEST_KERNEL);
        assert!(version("5.9.16") < Some(OLDEST_KERNEL));
        assert!(version("strange") < Some(OLDEST_KERNEL));
    }

    #[test]
    fn the_unified_hierarchy_is_found_on_every_kind_of_host() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
        let pure = "26 23 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let legacy = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu";
        assert_eq!(find_cgroup2(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_cgroup2(pure), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_cgroup2(legacy), None);
    }
}
