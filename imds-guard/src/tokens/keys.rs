//! The keys that tokens are sealed with, and the file in which they outlive the guard.
//!
//! The file belongs in memory (`/run`): it is needed for as long as the processes live that hold
//! tokens, and never gets into a snapshot or an image of the machine.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use chacha20poly1305::{Key, aead::Generate as _};

/// Seconds for which a key is used: longer than any token lives, so that the key before is enough to
/// open all that are valid.
pub const ROTATION: u64 = 12 * 3600;

const FILE: &str = "token.keys";
/// Seconds of the boot clock, and the key.
const RECORD: usize = 8 + 32;

/// The key in use, and the one before.
pub struct Keys {
    newest: Entry,
    before: Entry,
    file: Option<PathBuf>,
}

#[derive(Clone, Copy)]
struct Entry {
    made: u64,
    key: Key,
}

impl Keys {
    /// Those of an earlier guard in a directory, or new ones.
    pub fn load(directory: &Path, now: u64) -> Self {
        let file = directory.join(FILE);
        match make(directory).and_then(|()| read(&file)) {
            Ok(Some([newest, before])) if newest.made <= now => Self {
                newest,
                before,
                file: Some(file),
            },
            Ok(_) => {
                let mut keys = Self::new(now, Some(file));
                keys.save();
                keys
            }
            Err(error) => {
                log::warn!(
                    "{error:#}: session tokens will have to be fetched anew when the guard restarts"
                );
                Self::new(now, None)
            }
        }
    }

    fn new(now: u64, file: Option<PathBuf>) -> Self {
        Self {
            newest: Entry::new(now),
            before: Entry::new(now),
            file,
        }
    }

    /// The key to seal with.
    pub fn newest(&self) -> Key {
        self.newest.key
    }

    /// The keys to open with.
    pub fn all(&self) -> [Key; 2] {
        [self.newest.key, self.before.key]
    }

    /// Takes a new key when the time has come.
    pub fn rotate(&mut self, now: u64) {
        if now < self.newest.made + ROTATION {
            return;
        }
        self.before = self.newest;
        self.newest = Entry::new(now);
        self.save();
    }

    fn save(&mut self) {
        let Some(file) = &self.file else { return };
        if let Err(error) = write(file, [self.newest, self.before]) {
            log::warn!(
                "the keys of session tokens cannot be kept in {}: {error}",
                file.display()
            );
        }
    }
}

impl Entry {
    fn new(made: u64) -> Self {
        let key = Key::generate();
        Self { made, key }
    }
}

/// The directory, for root alone.
fn make(directory: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(0o700).create(directory);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", directory.display()));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(directory)
        .with_context(|| format!("cannot look at {}", directory.display()))?;
    ensure!(
        found.is_dir() && is_ours(&found) && found.mode() & 0o022 == 0,
        "{} is not a directory that only its owner, the guard's user, can write to",
        directory.display()
    );
    Ok(())
}

fn is_ours(found: &fs::Metadata) -> bool {
    found.uid() == nix::unistd::geteuid().as_raw()
}

fn read(file: &Path) -> Result<Option<[Entry; 2]>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(file);
    let mut opened = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("cannot open {}", file.display()))?,
    };
    let found = opened.metadata()?;
    ensure!(
        found.is_file() && is_ours(&found) && found.mode() & 0o077 == 0,
        "{} is not a file that only its owner, the guard's user, can read",
        file.display()
    );
    // Half-written ones are of no use.
    let mut bytes = [0; 2 * RECORD];
    if found.len() != bytes.len() as u64 || opened.read_exact(&mut bytes).is_err() {
        return Ok(None);
    }
    let (newest, before) = bytes.split_at(RECORD);
    Ok(entry(newest).zip(entry(before)).map(<[Entry; 2]>::from))
}

fn entry(record: &[u8]) -> Option<Entry> {
    let (made, key) = record.split_first_chunk()?;
    Some(Entry {
        made: u64::from_be_bytes(*made),
        key: Key::try_from(key).ok()?,
    })
}

/// Under another name first, so that nobody finds half of it.
fn write(file: &Path, entries: [Entry; 2]) -> io::Result<()> {
    let unfinished = file.with_extension("new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut output: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)?;
    for entry in entries {
        output.write_all(&entry.made.to_be_bytes())?;
        output.write_all(&entry.key)?;
    }
    fs::rename(unfinished, file)
}
