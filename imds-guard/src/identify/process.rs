//! One process, read from `/proc`.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use imds_guard_common::flow::Origin;
use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};
use procfs::{
    ProcError,
    process::{Process as ProcProcess, Stat},
};

use super::cgroup::Cgroups;
use crate::policy::{
    caller::{Parent, Unresolved},
    shortened,
};

/// Longest chain of parents that is followed.
const MAX_PARENTS: usize = 32;
/// Longest command line that is read, in bytes.
const MAX_COMMAND_LINE: u64 = 4096;
/// Most that is read of the cgroups it is in, in bytes.
const MAX_CGROUPS: u64 = 64 * 1024;
/// Longest line of these. Who may make cgroups can nest them without end; the kernel refuses to tell a path of
/// more than 4096 bytes (PATH_MAX), or cuts it off.
const MAX_CGROUP: usize = 4096;
/// Longest path of an executable, in bytes.
const MAX_EXE: usize = 1024;
/// Flag of a kernel thread in `/proc/PID/stat` (kernel: PF_KTHREAD, include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;

/// A handle on one process: what is read through it never belongs to another process, even if the
/// pid is used again (`/proc/PID` stays tied to the process it was opened for).
pub struct Process {
    inner: ProcProcess,
    stat: Stat,
}

impl Process {
    /// Opens the process that made a connection.
    ///
    /// # Errors
    /// It is gone, or its pid now belongs to a process that started only after the connection.
    pub fn open(proc: &Path, origin: &Origin) -> Result<Self, Unresolved> {
        let is_younger = |stat: &Stat| since_boot(stat) > i128::from(origin.connected_at);
        let (inner, stat) = open(proc, origin.pid)?;
        // Start times are rounded down to a clock tick, so a process that connected never seems
        // to have started later.
        if is_younger(&stat) {
            return Err(Unresolved::PidReused);
        }
        if stat.flags & PF_KTHREAD != 0 {
            return Err(Unresolved::KernelThread);
        }
        if !has_ended(&stat) {
            return Ok(Self { inner, stat });
        }
        // Its main thread may have ended alone: the one that connected shows the same process.
        let threads = proc.join(origin.pid.to_string()).join("task");
        let (inner, stat) = open(&threads, origin.tid)?;
        if has_ended(&stat) || is_younger(&stat) {
            return Err(Unresolved::Gone);
        }
        Ok(Self { inner, stat })
    }

    /// Number under which `/proc` has it, or its thread.
    pub fn number(&self) -> i32 {
        self.stat.pid
    }

    /// Whether it has not ended since it was opened.
    pub fn is_alive(&self) -> bool {
        self.inner
            .stat()
            .is_ok_and(|stat| stat.starttime == self.stat.starttime && !has_ended(&stat))
    }

    /// The running program.
    pub fn exe(&self) -> Option<String> {
        exe(&self.inner)
    }

    /// When it started.
    pub fn started(&self) -> Option<String> {
        let now_since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        let now_since_boot =
            SignedDuration::new(now_since_boot.tv_sec(), now_since_boot.tv_nsec() as i32);
        let age = now_since_boot - SignedDuration::from_nanos_i128(since_boot(&self.stat));
        let started = Timestamp::now().checked_sub(age).ok()?;
        Some(format!("{started:.2}"))
    }

    /// The command line, without redaction. May block: see [`super::COMMAND_LINE_TIMEOUT`].
    pub fn command_line(&self) -> Option<Vec<String>> {
        let file = self.inner.open_relative("cmdline").ok()?;
        let mut bytes = Vec::new();
        file.take(MAX_COMMAND_LINE).read_to_end(&mut bytes).ok()?;
        let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        (!text.is_empty()).then(|| {
            text.split(|byte| *byte == 0)
                .map(|argument| String::from_utf8_lossy(argument).into_owned())
                .collect()
        })
    }

    /// Its working directory.
    pub fn cwd(&self) -> Option<PathBuf> {
        self.inner.cwd().ok()
    }

    /// User id of the login it is in, whoever it has become since (`/proc/PID/loginuid`).
    pub fn login(&self) -> Option<u32> {
        self.read_number("loginuid")
    }

    /// Number of that login (`/proc/PID/sessionid`).
    pub fn login_session(&self) -> Option<u32> {
        self.read_number("sessionid").filter(|id| *id != u32::MAX)
    }

    fn read_number(&self, file: &str) -> Option<u32> {
        let mut text = String::new();
        let mut file = self.inner.open_relative(file).ok()?;
        file.read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    /// Its ancestors, nearest first, up to init.
    pub fn parents(&self, proc: &Path) -> Vec<Parent> {
        let mut parents = Vec::new();
        let mut child = self.stat.clone();
        while let Ok(pid) = u32::try_from(child.ppid)
            && pid != 0
            && parents.len() < MAX_PARENTS
        {
            let Ok((process, stat)) = open(proc, pid) else {
                break;
            };
            // A parent that is younger than its child is somebody else under the same pid.
            if stat.starttime > child.starttime {
                break;
            }
            parents.push(Parent {
                pid,
                exe: exe(&process),
                exe_verified: false,
            });
            child = stat;
        }
        parents
    }

    /// The cgroups it is in. Their names are bytes of somebody's choice, and need not be text.
    ///
    /// # Errors
    /// It is gone, or its cgroup is nested too deep for the kernel to tell.
    pub fn cgroup(&self) -> Result<Cgroups, Unresolved> {
        let file = self.inner.open_relative("cgroup").map_err(|e| why(&e))?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_CGROUPS).read_to_end(&mut bytes);
        read.map_err(|e| why(&e.into()))?;
        if bytes
            .split(|byte| *byte == b'\n')
            .any(|line| line.len() >= MAX_CGROUP)
        {
            return Err(Unresolved::Unreadable);
        }
        Ok(Cgroups::parse(&String::from_utf8_lossy(&bytes)))
    }

    /// Whether it is in the guard's own network namespace.
    pub fn shares_netns(&self, proc: &Path) -> bool {
        let own = std::fs::read_link(proc.join("self/ns/net"));
        let theirs = std::fs::read_link(proc.join(self.stat.pid.to_string()).join("ns/net"));
        matches!((own, theirs), (Ok(own), Ok(theirs)) if own == theirs) && self.is_alive()
    }
}

/// A process as if it had just connected.
pub fn origin(proc: &Path, pid: u32) -> Option<Origin> {
    let (process, _) = open(proc, pid).ok()?;
    let status = process.status().ok()?;
    let mut comm = [0; 16];
    for (to, from) in comm.iter_mut().zip(status.name.bytes()).take(15) {
        *to = from;
    }
    Some(Origin {
        cookie: 0,
        cgroup_id: 0,
        netns_cookie: 0,
        connected_at: u64::MAX,
        pid,
        tid: pid,
        uid: status.ruid,
        gid: status.rgid,
        comm,
        family: 1,
        sequence: 0,
    })
}

fn open(proc: &Path, pid: u32) -> Result<(ProcProcess, Stat), Unresolved> {
    let path: PathBuf = proc.join(pid.to_string());
    let process = ProcProcess::new_with_root(path).map_err(|e| why(&e))?;
    let stat = process.stat().map_err(|e| why(&e))?;
    Ok((process, stat))
}

fn exe(process: &ProcProcess) -> Option<String> {
    let path = process.exe().ok()?;
    Some(shortened(&path.to_string_lossy(), MAX_EXE))
}

/// Whether it waits for its parent to notice that it has ended: it has no executable any more.
fn has_ended(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

/// Start of a process in nanoseconds since boot.
fn since_boot(stat: &Stat) -> i128 {
    i128::from(stat.starttime) * 1_000_000_000 / i128::from(procfs::ticks_per_second())
}

fn why(error: &ProcError) -> Unresolved {
    match error {
        ProcError::NotFound(_) => Unresolved::Gone,
        ProcError::Io(error, _) if error.raw_os_error() == Some(libc::ESRCH) => Unresolved::Gone,
        _ => Unresolved::Unreadable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(pid: u32, connected_at: u64) -> Origin {
        Origin {
            cookie: 1,
            cgroup_id: 1,
            netns_cookie: 1,
            connected_at,
            pid,
            tid: pid,
            uid: 0,
            gid: 0,
            comm: [0; 16],
            family: 1,
            sequence: 0,
        }
    }

    fn now_since_boot() -> u64 {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap();
        u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + now.tv_nsec() as u64
    }

    #[test]
    fn this_process_is_named() {
        let me = Process::open(
            Path::new("/proc"),
            &origin(std::process::id(), now_since_boot()),
        )
        .unwrap();
        assert_eq!(
            me.exe().unwrap(),
            std::env::current_exe().unwrap().to_str().unwrap()
        );
        let arguments: Vec<String> = std::env::args().collect();
        assert_eq!(me.command_line().unwrap(), arguments);
        assert_eq!(
            me.parents(Path::new("/proc"))[0].pid,
            std::os::unix::process::parent_id()
        );
        assert!(me.is_alive());
        assert!(me.shares_netns(Path::new("/proc")));
    }

    #[test]
    fn a_process_younger_than_the_connection_is_somebody_else() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let an_hour_before = now_since_boot().saturating_sub(3600 * 1_000_000_000);
        let got = Process::open(
            Path::new("/proc"),
            &origin(child.id(), an_hour_before.min(1)),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(got.err(), Some(Unresolved::PidReused));
    }

    #[test]
    fn a_process_that_ended_is_gone_even_if_its_handle_is_open() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let open =
            Process::open(Path::new("/proc"), &origin(child.id(), now_since_boot())).unwrap();
        child.kill().unwrap();
        // Ended, though nobody has taken note of it yet.
        nix::sys::wait::waitid(
            nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(child.id() as i32)),
            nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
        )
        .unwrap();
        assert!(!open.is_alive());
        let zombie = Process::open(Path::new("/proc"), &origin(child.id(), now_since_boot()));
        assert_eq!(zombie.err(), Some(Unresolved::Gone));
        child.wait().unwrap();
        assert!(!open.is_alive());
        let again = Process::open(Path::new("/proc"), &origin(child.id(), now_since_boot()));
        assert_eq!(again.err(), Some(Unresolved::Gone));
    }
}
