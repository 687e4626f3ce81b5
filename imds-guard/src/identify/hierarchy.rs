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
    known: Mutex<(Option<Instant>, HashMap<u64, String>)>,
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
        let directory = self.mount.join(path.trim_start_matches('/'));
        Some(fs::metadata(directory).ok()?.ino())
    }

    /// The path of a cgroup below the mount point, beginning with a slash.
    pub fn path(&self, id: u64) -> Option<String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (searched, paths) = &mut *known;
        let is_still_there = |path: &String| {
            let path = self.mount.join(path.trim_start_matches('/'));
            fs::metadata(path).is_ok_and(|meta| meta.ino() == id)
        };
        if let Some(path) = paths.get(&id).filter(|path| is_still_there(path)) {
            return Some(path.clone());
        }
        if searched.is_none_or(|at| at.elapsed() >= PAUSE) {
            *paths = search(&self.mount);
            *searched = Some(Instant::now());
        }
        paths.get(&id).cloned()
    }
}

fn search(mount: &Path) -> HashMap<u64, String> {
    let mut found = HashMap::new();
    let mut waiting = vec![PathBuf::from("/")];
    while let Some(path) = waiting.pop()
        && found.len() < MAX_CGROUPS
    {
        let directory = mount.join(path.strip_prefix("/").unwrap_or(&path));
        let Ok(meta) = fs::metadata(&directory) else {
            continue;
        };
        found.insert(meta.ino(), path.to_string_lossy().into_owned());
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
    use super::*;

    #[test]
    fn a_directory_is_found_by_its_inode_until_it_is_gone() {
        let root = std::env::temp_dir().join(format!("imds-guard-{}-h", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        let id = fs::metadata(root.join("a/b")).unwrap().ino();
        let hierarchy = Hierarchy::at(&root);
        assert_eq!(hierarchy.path(id).as_deref(), Some("/a/b"));
        let top = fs::metadata(&root).unwrap().ino();
        assert_eq!(hierarchy.path(top).as_deref(), Some("/"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(hierarchy.path(u64::MAX), None);
    }
}
