//! From a cgroup's number to its path.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Cgroups that are looked at in one search: more than hosts have.
const MAX_CGROUPS: usize = 20_000;

/// How long to wait before searching again for a cgroup that was not found: packets of one that is
/// gone must not keep the guard busy.
const PAUSE: Duration = Duration::from_secs(1);

/// A cgroup v2 hierarchy.
pub struct Hierarchy {
    mount: PathBuf,
    known: Mutex<(Option<Instant>, HashMap<u64, PathBuf>)>,
}

impl Hierarchy {
    /// The hierarchy that is mounted here; nothing is read yet.
    #[must_use]
    pub fn at(mount: impl Into<PathBuf>) -> Self {
        Self {
            mount: mount.into(),
            known: Mutex::default(),
        }
    }

    /// The number of a cgroup.
    pub fn id(&self, path: &str) -> Option<u64> {
        let directory = below(&self.mount, Path::new(path));
        Some(fs::metadata(directory).ok()?.ino())
    }

    /// The path of a cgroup below the mount point, beginning with a slash. What is not text in it is
    /// replaced.
    pub fn path(&self, id: u64) -> Option<String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (searched, paths) = &mut *known;
        let is_still_there = |path: &PathBuf| {
            let there = fs::metadata(below(&self.mount, path));
            there.is_ok_and(|meta| meta.ino() == id)
        };
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        if let Some(path) = paths.get(&id).filter(|path| is_still_there(path)) {
            return Some(text(path));
        }
        if searched.is_none_or(|at| at.elapsed() >= PAUSE) {
            *paths = search(&self.mount);
            *searched = Some(Instant::now());
        }
        paths.get(&id).map(text)
    }
}

fn below(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

fn search(mount: &Path) -> HashMap<u64, PathBuf> {
    let mut found = HashMap::new();
    let mut waiting = vec![PathBuf::from("/")];
    while let Some(path) = waiting.pop()
        && found.len() < MAX_CGROUPS
    {
        let directory = below(mount, &path);
        let Ok(meta) = fs::metadata(&directory) else {
            continue;
        };
        found.insert(meta.ino(), path.clone());
        for child in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(path.join(child.file_name()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    use super::*;

    #[test]
    fn a_directory_is_found_by_its_inode_until_it_is_gone() {
        let root = std::env::temp_dir().join(format!("imds-guard-{}-h", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        let no_text = root.join(OsStr::from_bytes(b"\xff\xfe"));
        fs::create_dir(&no_text).unwrap();
        let no_text = fs::metadata(no_text).unwrap().ino();
        let id = fs::metadata(root.join("a/b")).unwrap().ino();
        let hierarchy = Hierarchy::at(&root);
        assert_eq!(hierarchy.path(id).as_deref(), Some("/a/b"));
        // Twice: it is found again, too.
        for _ in 0..2 {
            assert_eq!(
                hierarchy.path(no_text).as_deref(),
                Some("/\u{fffd}\u{fffd}")
            );
        }
        let top = fs::metadata(&root).unwrap().ino();
        assert_eq!(hierarchy.path(top).as_deref(), Some("/"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(hierarchy.path(u64::MAX), None);
    }
}
