//! Which file a process runs, as far as it does not say so itself.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, Metadata},
    io::{self, ErrorKind, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::{
    shares::{Party, Shares},
    workload::Wait,
};

/// How many files are digested at once.
pub const DIGESTERS: usize = 2;
/// How many of one cgroup or user.
const DIGESTERS_EACH: usize = 1;
/// How many files wait to be digested, each of them open.
const QUEUE: usize = 32;
/// How many of one cgroup or user.
const QUEUE_EACH: usize = 8;
/// How long a client waits for the digest of its program; it is finished for the next one.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest file that is digested.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// How many digests are remembered.
const REMEMBERED: usize = 1024;
/// How long it is remembered that a file could not be digested.
const FAILED: Duration = Duration::from_secs(10);

/// Whether the host has the file that a process runs under this name; `None` if the guard may not look. The
/// name is the process's view, in which it can mount anything anywhere; device and inode are the kernel's. May
/// block: file and name can be in a file system that does not answer.
pub fn is_hosts(proc: &Path, pid: i32, name: &str) -> Option<bool> {
    let Ok(running) = fs::metadata(proc.join(pid.to_string()).join("exe")) else {
        return Some(false);
    };
    let same = |at: &Path| match fs::metadata(at) {
        Ok(found) => Some((found.dev(), found.ino()) == (running.dev(), running.ino())),
        Err(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Some(false),
            _ => None,
        },
    };
    if !name.starts_with('/') {
        return Some(false);
    }
    // Where the service manager hides parts of the host from the guard, init still sees them.
    match same(Path::new(name)) {
        Some(true) => Some(true),
        _ => same(&proc.join("1/root").join(name.trim_start_matches('/'))),
    }
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

/// A program to be digested.
pub struct Program {
    file: File,
    version: Version,
}

/// The file that a process runs, unless it is too large. May block, as [`is_hosts`].
pub fn open(proc: &Path, pid: i32) -> Option<Program> {
    let exe = proc.join(pid.to_string()).join("exe");
    if fs::metadata(&exe).ok()?.len() > MAX_BYTES {
        return None;
    }
    let file = File::open(&exe).ok()?;
    let version = Version::of(&file.metadata().ok()?);
    Some(Program { file, version })
}

/// Digests of programs, each read once.
pub struct Digests {
    known: Mutex<Known>,
    queue: Shares,
    digesters: Arc<Shares>,
}

/// Digests that are known or under way, the oldest first in `order`.
#[derive(Default)]
struct Known {
    digests: HashMap<Version, Asked>,
    order: VecDeque<Version>,
}

#[derive(Clone)]
struct Asked {
    begun: Instant,
    /// The digest, when it is there; none within it if there cannot be one.
    found: watch::Receiver<Option<Option<String>>>,
}

impl Digests {
    /// Nothing is read yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            known: Mutex::default(),
            queue: Shares::new(QUEUE, QUEUE_EACH),
            digesters: Arc::new(Shares::new(DIGESTERS, DIGESTERS_EACH)),
        }
    }

    /// The digest of a program, in hexadecimal; `None` if it cannot be had, or not in time.
    pub async fn of(&self, program: Program, parties: Vec<Party>, wait: Wait) -> Option<String> {
        let mut found = self.ask(program, parties)?;
        if wait == Wait::No {
            return found.borrow().clone().flatten();
        }
        let found = tokio::time::timeout(DIGEST_TIMEOUT, found.wait_for(Option::is_some));
        found.await.ok()?.ok()?.clone().flatten()
    }

    /// Who asks for the same file asks once.
    fn ask(
        &self,
        program: Program,
        parties: Vec<Party>,
    ) -> Option<watch::Receiver<Option<Option<String>>>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asked) = known.digests.get(&program.version)
            && asked.is_good()
        {
            return Some(asked.found.clone());
        }
        let queued = self.queue.try_take(&parties)?;
        let (tell, found) = watch::channel(None);
        known.add(program.version, found.clone());
        drop(known);
        let digesters = Arc::clone(&self.digesters);
        tokio::spawn(async move {
            let place = digesters.take(&parties).await;
            let read = tokio::task::spawn_blocking(move || {
                let _held = (queued, place);
                program.digest()
            });
            tell.send_replace(Some(read.await.ok().flatten()));
        });
        Some(found)
    }
}

impl Asked {
    fn is_good(&self) -> bool {
        match &*self.found.borrow() {
            // Whatever is under way is bounded, and may take as long as it likes.
            None | Some(Some(_)) => true,
            Some(None) => self.begun.elapsed() < FAILED,
        }
    }
}

impl Known {
    fn add(&mut self, version: Version, found: watch::Receiver<Option<Option<String>>>) {
        let begun = Instant::now();
        let asked = Asked { begun, found };
        if self.digests.insert(version, asked).is_none() {
            self.order.push_back(version);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.digests.remove(&oldest);
        }
    }
}

impl Program {
    fn digest(&self) -> Option<String> {
        let digest = digest(&self.file).ok()?;
        // Written to while it was read, it was neither the one nor the other.
        (Version::of(&self.file.metadata().ok()?) == self.version).then_some(digest)
    }
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
        symlink("loop", inits.join("hidden/loop")).unwrap();
        for (pid, name, expected) in [
            (42, "/hidden/program", Some(true)),
            (42, "/hidden/other", Some(false)),
            (42, "/hidden/none", Some(false)),
            (42, "hidden/program", Some(false)),
            (43, "/hidden/program", Some(false)),
            // As where the guard has no right to look.
            (42, "/hidden/loop", None),
        ] {
            assert_eq!(is_hosts(&proc, pid, name), expected, "{pid} {name}");
        }
        fs::remove_dir_all(&proc).unwrap();
    }

    fn program(path: &Path) -> Program {
        let file = File::open(path).unwrap();
        let version = Version::of(&file.metadata().unwrap());
        Program { file, version }
    }

    #[tokio::test]
    async fn a_file_is_digested_once_and_others_queue_in_bounds() {
        let folder = std::env::temp_dir().join(format!("imds-guard-{}-digest", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = |number: usize| folder.join(number.to_string());
        for number in 0..=QUEUE_EACH {
            fs::write(path(number), number.to_string()).unwrap();
        }
        let digests = Digests::new();
        let party = vec![Party::Cgroup(1)];
        // Nothing is read before the first wait, as there is one thread.
        let ask = |number| digests.ask(program(&path(number)), party.clone());
        let first = ask(0).unwrap();
        assert!(first.same_channel(&ask(0).unwrap()));
        assert!((1..QUEUE_EACH).all(|number| ask(number).is_some()));
        assert!(ask(QUEUE_EACH).is_none());
        let others = digests.ask(program(&path(QUEUE_EACH)), vec![Party::Cgroup(2)]);
        assert!(others.is_some());
        let of = |number, wait| digests.of(program(&path(number)), party.clone(), wait);
        let digest = of(0, Wait::Bounded).await.unwrap();
        let expected = "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9";
        assert_eq!(digest, expected);
        assert_eq!(of(0, Wait::No).await.as_deref(), Some(expected));

        // One that changes while it is read has no digest, and is not read again at once.
        let changing = program(&path(1));
        fs::write(path(1), "changed").unwrap();
        let version = changing.version;
        digests.known.lock().unwrap().digests.remove(&version);
        let wait = Wait::Bounded;
        assert_eq!(
            digests.of(changing, vec![Party::Cgroup(3)], wait).await,
            None
        );
        assert!(digests.known.lock().unwrap().digests[&version].is_good());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_that_is_too_large_is_not_opened() {
        let proc = std::env::temp_dir().join(format!("imds-guard-{}-large", std::process::id()));
        fs::create_dir_all(proc.join("7")).unwrap();
        let exe = File::create(proc.join("7/exe")).unwrap();
        exe.set_len(MAX_BYTES).unwrap();
        assert!(open(&proc, 7).is_some());
        exe.set_len(MAX_BYTES + 1).unwrap();
        assert!(open(&proc, 7).is_none());
        fs::remove_dir_all(&proc).unwrap();
    }
}
