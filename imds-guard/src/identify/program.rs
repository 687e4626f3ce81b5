//! Which file a process runs, as far as it does not say so itself.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

/// How many files are digested at once.
pub const DIGESTERS: usize = 2;
/// How long a client waits for the digest of its program; it is finished for the next one.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest file that is digested.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// How many digests are remembered.
const REMEMBERED: usize = 1024;

/// Whether the host has the file that a process runs under this name. The name is the process's view,
/// in which it can mount anything anywhere; device and inode are the kernel's.
pub fn is_hosts(proc: &Path, pid: u32, name: &str) -> bool {
    let Ok(running) = fs::metadata(proc.join(pid.to_string()).join("exe")) else {
        return false;
    };
    let same = |at: &Path| {
        let found = fs::metadata(at);
        found.is_ok_and(|found| (found.dev(), found.ino()) == (running.dev(), running.ino()))
    };
    // Where the service manager hides parts of the host from the guard, init still sees them.
    let inits = || proc.join("1/root").join(name.trim_start_matches('/'));
    name.starts_with('/') && (same(Path::new(name)) || same(&inits()))
}

/// A file, and that it has not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// Digests of programs, each read once.
pub struct Digests {
    proc: PathBuf,
    known: Arc<Mutex<Known>>,
    readers: Arc<Semaphore>,
}

#[derive(Default)]
struct Known {
    digests: HashMap<Version, String>,
    order: VecDeque<Version>,
}

impl Digests {
    /// Of processes in this `/proc`; nothing is read yet.
    #[must_use]
    pub fn new(proc: PathBuf) -> Self {
        Self {
            proc,
            known: Arc::default(),
            readers: Arc::new(Semaphore::new(DIGESTERS)),
        }
    }

    /// The digest of the file that a process runs, in hexadecimal; `None` if it cannot be had in time.
    pub async fn of(&self, pid: u32) -> Option<String> {
        let exe = self.proc.join(pid.to_string()).join("exe");
        let version = Version::of(&fs::metadata(&exe).ok()?);
        if let Some(digest) = lock(&self.known).digests.get(&version) {
            return Some(digest.clone());
        }
        let file = File::open(&exe).ok()?;
        let opened = Version::of(&file.metadata().ok()?);
        let (known, readers) = (Arc::clone(&self.known), Arc::clone(&self.readers));
        let digest = tokio::spawn(async move {
            let place = readers.acquire_owned().await.ok()?;
            tokio::task::spawn_blocking(move || {
                let digest = digest(&file).ok()?;
                // Written to while it was read, it was neither the one nor the other.
                let unchanged = Version::of(&file.metadata().ok()?) == opened;
                drop(place);
                unchanged.then(|| lock(&known).add(opened, digest))
            })
            .await
            .ok()?
        });
        tokio::time::timeout(DIGEST_TIMEOUT, digest)
            .await
            .ok()?
            .ok()?
    }
}

impl Known {
    fn add(&mut self, version: Version, digest: String) -> String {
        if self.digests.insert(version, digest.clone()).is_none() {
            self.order.push_back(version);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.digests.remove(&oldest);
        }
        digest
    }
}

fn lock(known: &Mutex<Known>) -> std::sync::MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn digest(file: &File) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut bytes = vec![0; 64 * 1024];
    let mut file = file.take(MAX_BYTES + 1);
    let mut total = 0;
    loop {
        match file.read(&mut bytes)? {
            0 => break,
            read => {
                digest.update(&bytes[..read]);
                total += read as u64;
            }
        }
    }
    if total > MAX_BYTES {
        return Err(io::Error::other("too large"));
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// C3: where the service manager hides a directory from the guard (`PrivateTmp=`, `ProtectHome=`), what
    /// runs there is still known, as init sees it.
    #[test]
    fn c3_a_program_that_is_hidden_from_the_guard_is_found_through_init() {
        let proc = std::env::temp_dir().join(format!("imds-guard-{}-proc", std::process::id()));
        let inits = proc.join("init");
        fs::create_dir_all(inits.join("hidden")).unwrap();
        fs::create_dir_all(proc.join("1")).unwrap();
        fs::create_dir_all(proc.join("42")).unwrap();
        symlink(&inits, proc.join("1/root")).unwrap();
        for name in ["program", "other"] {
            fs::write(inits.join("hidden").join(name), name).unwrap();
        }
        symlink(inits.join("hidden/program"), proc.join("42/exe")).unwrap();
        assert!(is_hosts(&proc, 42, "/hidden/program"));
        assert!(!is_hosts(&proc, 42, "/hidden/other"));
        assert!(!is_hosts(&proc, 42, "hidden/program"));
        assert!(!is_hosts(&proc, 43, "/hidden/program"));
        fs::remove_dir_all(&proc).unwrap();
    }
}
