//! Anonymous network namespaces.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::{fs, io, panic, thread};

use nix::sched::{CloneFlags, setns, unshare};

use super::links;

/// A network namespace. One that was made here has no name: it ends with its last file descriptor and
/// process, also when this process is killed.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
}

impl NetNs {
    /// Makes an empty namespace with its loopback device up, and without duplicate address detection:
    /// nobody else is there, and for its two seconds a link could not look up IPv6 neighbours.
    ///
    /// # Errors
    /// When the kernel refuses (this needs `CAP_SYS_ADMIN`).
    pub fn new() -> io::Result<Self> {
        // Namespaces belong to threads. One that then ends leaves all others where they were.
        let fd = on_a_thread(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        })??;
        let ns = Self { fd };
        links::up(&ns, "lo").map_err(io::Error::other)?;
        // The parameter of a link counts only where both of these leave it to the link.
        for links in ["all", "default"] {
            ns.sysctl(&format!("ipv6/conf/{links}/accept_dad"), "0")?;
        }
        Ok(ns)
    }

    /// One that is there already, by a file such as `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// There is no such file. Whether it is a namespace shows when it is entered.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = File::open(path)?.into();
        Ok(Self { fd })
    }

    /// Runs `task` on a fresh thread inside the namespace. Sockets and processes made there belong to
    /// the namespace for good.
    ///
    /// # Errors
    /// When the thread cannot be made or cannot enter the namespace. A panic of `task` is passed on.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok(task())
        })?
    }

    /// Sets a kernel parameter of the namespace, named as below `/proc/sys/net`, for example
    /// `ipv4/ip_forward`.
    ///
    /// # Errors
    /// When there is no such parameter or the value is refused.
    pub fn sysctl(&self, name: &str, value: &str) -> io::Result<()> {
        // `/proc/sys/net` shows the namespace of the thread that looks.
        self.run(|| fs::write(format!("/proc/sys/net/{name}"), value))?
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(task: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, task)?;
        thread
            .join()
            .map_or_else(|panicked| panic::resume_unwind(panicked), Ok)
    })
}
