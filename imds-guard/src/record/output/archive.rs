//! The files that a log has put away: `NAME.TIME`, and compressed `NAME.TIME.zst`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
};

use jiff::Timestamp;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};

use super::file::held;

/// How hard zstd tries.
const LEVEL: i32 = 3;
/// How the names of compressed files end.
pub const COMPRESSED: &str = ".zst";
const UNFINISHED: &str = ".zst.unfinished";

/// A folder, and the log in it.
pub struct Archive {
    folder: PathBuf,
    _held: File,
    name: String,
    removed: Arc<Removed>,
    /// The thread that compresses, once there was something to do.
    compressor: Option<(Sender<Work>, JoinHandle<()>)>,
}

/// What was removed to make room, since the start.
#[derive(Debug, Default)]
pub struct Removed {
    files: AtomicU64,
    bytes: AtomicU64,
}

struct Work {
    folder: File,
    name: String,
    prefix: String,
}

impl Removed {
    /// Files, and bytes in them.
    #[must_use]
    pub fn now(&self) -> (u64, u64) {
        (self.files.load(Relaxed), self.bytes.load(Relaxed))
    }

    fn add(&self, bytes: u64) {
        self.files.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

impl Archive {
    pub fn new(held_folder: File, name: &str) -> Self {
        Self {
            folder: held(&held_folder),
            _held: held_folder,
            name: name.to_owned(),
            removed: Arc::default(),
            compressor: None,
        }
    }

    /// What it has removed, now and from now on.
    pub fn removed(&self) -> &Arc<Removed> {
        &self.removed
    }

    /// The log itself.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Opens the log, never through a link, and never waiting for whoever reads a pipe.
    pub fn open_current(&self) -> io::Result<File> {
        // Command lines and paths are nobody else's business.
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(self.path())
    }

    /// The file that is locked by whoever writes.
    pub fn lock_file(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(self.folder.join(format!(".{}.lock", self.name)))
    }

    /// Renames the log, under the time until which it goes. Returns its new name.
    pub fn put_away(&self, until: Timestamp) -> io::Result<PathBuf> {
        let time = in_names(until);
        let away = self.folder.join(format!("{}.{time}", self.name));
        let renamed = renameat2(
            AT_FDCWD,
            &self.path(),
            AT_FDCWD,
            &away,
            RenameFlags::RENAME_NOREPLACE,
        );
        match renamed {
            // Not every file system can rename without replacing; the folder is ours alone.
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP)
                if fs::symlink_metadata(&away).is_err() =>
            {
                fs::rename(self.path(), &away)?;
            }
            renamed => renamed?,
        }
        Ok(away)
    }

    /// Removes the oldest files until all have less than so many bytes.
    pub fn keep_below(&self, total: u64) {
        let mut files = self.files();
        let mut sum: u64 = files.iter().map(|(_, size)| size).sum();
        files.reverse();
        while sum > total
            && let Some((path, size)) = files.pop()
        {
            match self.remove(&path, size) {
                Ok(()) => log::info!("events of {} are old, and removed", name_of(&path)),
                Err(error) => log::warn!("{} cannot be removed: {error}", name_of(&path)),
            }
            sum -= size;
        }
    }

    /// Removes the oldest file. Returns whether there was one.
    pub fn remove_oldest(&self) -> io::Result<bool> {
        let Some((path, size)) = self.files().into_iter().next() else {
            return Ok(false);
        };
        self.remove(&path, size).map(|()| true)
    }

    fn remove(&self, path: &Path, size: u64) -> io::Result<()> {
        fs::remove_file(path)?;
        self.removed.add(size);
        Ok(())
    }

    /// Has the files that are not compressed compressed, by a thread of its own.
    pub fn compress_all(&mut self) -> io::Result<()> {
        let files = self.files();
        let compressor = match &self.compressor {
            Some((compressor, _)) => compressor,
            None => &self.compressor.insert(start_compressor()?).0,
        };
        for (path, _) in files {
            let name = name_of(&path);
            if name.ends_with(COMPRESSED) {
                continue;
            }
            let folder = File::open(&self.folder)?;
            let prefix = self.name.clone();
            // It ends with this process.
            let _sent = compressor.send(Work {
                folder,
                name,
                prefix,
            });
        }
        Ok(())
    }

    /// The last line of the newest file.
    pub fn last_line(&self) -> io::Result<Option<Vec<u8>>> {
        let Some((path, _)) = self.files().pop() else {
            return Ok(None);
        };
        let mut last = None;
        for line in read(&path)?.split(b'\n') {
            last = Some(line?);
        }
        Ok(last)
    }

    /// The files, oldest first, and their sizes.
    fn files(&self) -> Vec<(PathBuf, u64)> {
        let files = segments(&self.folder, &self.name);
        files
            .into_iter()
            .filter_map(|path| {
                let size = fs::symlink_metadata(&path).ok()?.len();
                Some((path, size))
            })
            .collect()
    }
}

/// The files that the log of this name in this folder has put away, oldest first. One that is being
/// compressed comes once.
#[must_use]
pub fn segments(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let file = entry.file_name().into_string().ok()?;
            until(&file, name)?;
            entry.file_type().ok()?.is_file().then(|| entry.path())
        })
        .collect();
    found.sort();
    found.dedup_by(|later, before| {
        later.to_str().and_then(|it| it.strip_suffix(COMPRESSED)) == before.to_str()
    });
    found
}

/// The time until which a file goes that a log of this name has put away, as [`in_names`] writes it; `None`
/// if it is none of these.
#[must_use]
pub fn until<'a>(file: &'a str, log: &str) -> Option<&'a str> {
    let time = file.strip_prefix(log)?.strip_prefix('.')?;
    let time = time.strip_suffix(COMPRESSED).unwrap_or(time);
    let is_time = time.ends_with('Z') && time.starts_with(|it: char| it.is_ascii_digit());
    is_time.then_some(time)
}

/// A time as it is in names of files, which sort by it.
#[must_use]
pub fn in_names(time: Timestamp) -> String {
    time.strftime("%Y%m%dT%H%M%S%.6fZ").to_string()
}

/// Reads a file, whether it is compressed or not.
pub fn read(path: &Path) -> io::Result<Box<dyn io::BufRead>> {
    let plain = plain(path, File::open(path)?)?;
    Ok(Box::new(BufReader::with_capacity(256 * 1024, plain)))
}

/// What is in a file of this name, whether it is compressed or not.
///
/// # Errors
/// It cannot be decompressed.
pub fn plain<'a>(path: &Path, file: impl io::Read + 'a) -> io::Result<Box<dyn io::Read + 'a>> {
    let is_compressed = path
        .as_os_str()
        .as_encoded_bytes()
        .ends_with(COMPRESSED.as_bytes());
    Ok(match is_compressed {
        true => Box::new(zstd::Decoder::new(file)?),
        false => Box::new(file),
    })
}

impl Drop for Archive {
    fn drop(&mut self) {
        if let Some((sender, compressor)) = self.compressor.take() {
            drop(sender);
            let _panicked = compressor.join();
        }
    }
}

fn start_compressor() -> io::Result<(Sender<Work>, JoinHandle<()>)> {
    let (sender, work) = channel::<Work>();
    let compressor = thread::Builder::new()
        .name("compress".into())
        .spawn(move || {
            for work in work {
                if let Err(error) = compress(&held(&work.folder), &work.name) {
                    // It may have been the oldest, and removed meanwhile.
                    if error.kind() != io::ErrorKind::NotFound {
                        log::warn!(
                            "{}: {} stays as it is, as it cannot be compressed: {error}",
                            work.prefix,
                            work.name
                        );
                    }
                }
            }
        })?;
    Ok((sender, compressor))
}

fn compress(folder: &Path, name: &str) -> io::Result<()> {
    let from = folder.join(name);
    let unfinished = folder.join(format!("{name}{UNFINISHED}"));
    let mut plain = File::open(&from)?;
    // What a crash has left.
    let _none = fs::remove_file(&unfinished);
    let out = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&unfinished)?;
    let packed = (|| {
        let mut encoder = zstd::Encoder::new(out, LEVEL)?;
        io::copy(&mut plain, &mut encoder)?;
        let mut out = encoder.finish()?;
        out.flush()?;
        out.sync_all()
    })();
    if let Err(error) = packed {
        let _none = fs::remove_file(&unfinished);
        return Err(error);
    }
    if !from.exists() {
        return fs::remove_file(&unfinished);
    }
    fs::rename(&unfinished, folder.join(format!("{name}{COMPRESSED}")))?;
    fs::remove_file(&from)
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
