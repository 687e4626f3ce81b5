//! Cgroups that clean up after themselves.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io, process, thread};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Begins the name of every lab's cgroup: `imds-guard-lab-PID-COUNTER`.
const PREFIX: &str = "imds-guard-lab-";

/// How long killed processes may take to go.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A cgroup v2 directory. Dropping it kills what runs in it, and removes it with its children: whoever
/// made the processes need not outlive them, so neither a panic nor a killed thread leaves any behind.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup below `root`, the place where cgroup v2 is mounted.
    ///
    /// # Errors
    /// When it exists already or cannot be made.
    pub fn create(root: &Path, name: &str) -> io::Result<Self> {
        let path = root.join(name);
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    /// Makes a cgroup in this one.
    ///
    /// # Errors
    /// When it exists already or cannot be made.
    pub fn child(&self, name: &str) -> io::Result<Self> {
        Self::create(&self.path, name)
    }

    /// Where it is in the file system.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for Cgroup {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            log::warn!("cannot remove cgroup {}: {error}", self.path.display());
        }
    }
}

/// The name of this process's lab number `counter`.
pub(super) fn lab_name(counter: u32) -> String {
    format!("{PREFIX}{}-{counter}", process::id())
}

/// Removes the cgroups of labs whose process is gone, with all that still runs in them. Labs of other
/// pid namespaces below the same root would be taken for dead.
///
/// # Errors
/// When `root` cannot be read or a cgroup cannot be removed.
pub fn sweep(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_abandoned) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn is_abandoned(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.split_once('-'))
        .and_then(|(pid, _)| pid.parse().ok())
        .is_some_and(|pid| pid > 0 && kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH))
}

/// Kills what runs below `path` and removes the directories, the innermost first. What is gone
/// already counts as removed.
fn remove(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + REMOVAL_TIMEOUT;
    while path.exists() {
        match kill_all(path).and_then(|()| remove_tree(path)) {
            Err(error) if is_passing(&error) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
    Ok(())
}

/// Killed processes take a moment to leave (EBUSY), and somebody else may be removing the same
/// directories (ENOENT, ENODEV).
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EBUSY | Errno::ENOENT | Errno::ENODEV)
    )
}

/// Kills everything that runs in a cgroup and below it.
///
/// # Errors
/// When it is gone.
pub fn kill_all(path: &Path) -> io::Result<()> {
    match fs::OpenOptions::new()
        .write(true)
        .open(path.join("cgroup.kill"))
    {
        Ok(mut file) => file.write_all(b"1"),
        // Kernels before 5.14 have no such file.
        Err(_) => kill_each(path),
    }
}

fn kill_each(path: &Path) -> io::Result<()> {
    for pid in fs::read_to_string(path.join("cgroup.procs"))?.lines() {
        // 0 stands for a process of another pid namespace, but as a target for our own group.
        if let Ok(pid @ 1..) = pid.parse() {
            // It may be gone by now, which is what we want.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    children(path)?
        .iter()
        .try_for_each(|child| kill_each(child))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    children(path)?
        .iter()
        .try_for_each(|child| remove_tree(child))?;
    fs::remove_dir(path)
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}
