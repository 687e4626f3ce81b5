//! What outlives the daemon: links and maps under `/sys/fs/bpf/imds-guard/LAYOUT/`.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::programs::links::FdLink;
use nix::{
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};

use crate::failure::Failure;

/// Where pins are unless configured otherwise.
pub const DIRECTORY: &str = "/sys/fs/bpf/imds-guard";

/// Names the layout of maps and links. It changes with any map's types or size, and with the meaning
/// of what is in them; a test compares.
pub const LAYOUT: &str = "v1";

/// The maps that one daemon hands to the next.
pub const SHARED_MAPS: [&str; 9] = [
    "CONTROL",
    "ALIVE_UNTIL",
    "EXEMPT",
    "PENDING",
    "FLOWS",
    "PACKETS",
    "BUDGETS",
    "CALLERS",
    "COUNTERS",
];

/// Links are named `link-NAME`, those of the perimeter `link-perimeter-INDEX`.
const LINK: &str = "link-";

/// The directory of pins, of which one daemon at a time is in charge.
pub struct Pins {
    directory: PathBuf,
}

/// As long as this lives, no other daemon takes charge of the same pins: a lock on their directory. A
/// copy of its descriptor in another process is the same lock.
pub struct Charge(#[expect(dead_code, reason = "held, not read")] File);

impl Pins {
    /// Whether a directory, or the one it is to be made in, is in a BPF file system.
    #[must_use]
    pub fn can_be_at(root: &Path) -> bool {
        let parent = root.parent().unwrap_or(root);
        [root, parent]
            .iter()
            .any(|path| statfs(*path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC))
    }

    /// The pins below a directory of a BPF file system.
    ///
    /// # Errors
    /// [`Failure::Bpffs`] if it is none; [`Failure::Layout`] if there are pins of another layout.
    pub fn open(root: &Path) -> Result<Self, Failure> {
        if !Self::can_be_at(root) {
            return Err(Failure::Bpffs { path: root.into() });
        }
        make_directory(root)?;
        let others =
            fs::read_dir(root).with_context(|| format!("cannot read {}", root.display()))?;
        for other in others.flatten() {
            let name = other.file_name().to_string_lossy().into_owned();
            if name.starts_with('v') && name != LAYOUT {
                return Err(Failure::Layout {
                    found: other.path(),
                    known: LAYOUT,
                });
            }
        }
        let directory = root.join(LAYOUT);
        make_directory(&directory)?;
        Ok(Self { directory })
    }

    /// Takes charge; `None` if somebody else is in charge.
    ///
    /// # Errors
    /// The directory cannot be locked.
    pub fn take_charge(&self) -> Result<Option<Charge>, Failure> {
        let file = File::open(&self.directory)
            .with_context(|| format!("cannot open {}", self.directory.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Charge(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", self.directory.display()))?
            }
        }
    }

    /// Takes part in the charge of another daemon, with a copy of a descriptor of its; `None` if that is
    /// not its lock.
    #[must_use]
    pub fn share_charge(&self, copy: OwnedFd) -> Option<Charge> {
        let copy = File::from(copy);
        let (theirs, ours) = (copy.metadata().ok()?, fs::metadata(&self.directory).ok()?);
        let is_lock = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
        is_lock.then_some(Charge(copy))
    }

    /// Where a map is pinned.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn link(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{LINK}{name}"))
    }

    /// Pins a link, in place of the one of that name, if any: the new program is attached before the
    /// old one goes.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn keep(&self, name: &str, link: FdLink) -> anyhow::Result<()> {
        let path = self.link(name);
        let new = self.directory.join(format!("new-{name}"));
        // Left behind by a daemon that was killed in between.
        let _absent = fs::remove_file(&new);
        link.pin(&new)
            .with_context(|| format!("cannot pin {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("cannot replace {}", path.display()))
    }

    /// Removes a link, and with it the attachment.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.link(name))
    }

    /// Names of the links that are there.
    #[must_use]
    pub fn links(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let mut links: Vec<String> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix(LINK).map(str::to_owned)
            })
            .collect();
        links.sort();
        links
    }

    /// Removes the directories again if nothing is in them.
    pub fn remove_if_empty(&self) {
        if fs::remove_dir(&self.directory).is_ok()
            && let Some(root) = self.directory.parent()
        {
            let _kept = fs::remove_dir(root);
        }
    }

    /// Removes everything, links first, so that nobody is redirected without the rest.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove_all(&self) -> io::Result<()> {
        // Connections first: whoever was redirected before still needs the other programs.
        let mut links = self.links();
        links.sort_by_key(|name| !name.starts_with("connect"));
        for name in links {
            self.remove(&name)?;
        }
        for entry in fs::read_dir(&self.directory)? {
            fs::remove_file(entry?.path())?;
        }
        fs::remove_dir(&self.directory)?;
        // The root may be a mount point, or somebody else's.
        if let Some(root) = self.directory.parent() {
            let _kept = fs::remove_dir(root);
        }
        Ok(())
    }
}

/// Makes a directory, or makes sure that the one that is there is nobody else's: a BPF file system
/// is open to everybody unless it was mounted otherwise.
fn make_directory(path: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", path.display()));
        }
        _ => {}
    }
    let found =
        fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    let others_may_replace = found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || others_may_replace {
        bail!(
            "{} must be a directory that nobody but this user may change: remove it",
            path.display()
        );
    }
    Ok(())
}
