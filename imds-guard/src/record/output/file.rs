//! An event log on disk: rotated by size and age, whole lines only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use jiff::Timestamp;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::archive::{Archive, Removed};

/// How much of the end of a file is read at once, in search of its last line.
const TAIL: u64 = 64 * 1024;
/// How long another guard may take to end, before both write.
const HANDOVER: Duration = Duration::from_secs(30);
const HANDOVER_STEP: Duration = Duration::from_millis(20);

/// When a log begins a new file, and how many old ones are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Bytes in one file.
    pub size: u64,
    /// Age of its oldest line.
    pub age: Duration,
    /// Bytes in all files, old ones as they are compressed. The oldest goes first.
    pub total: u64,
    /// When it is made sure that lines survive a crash of the machine.
    pub sync: Sync,
}

/// When events are brought to the disk itself, beyond the memory of the kernel.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// When the kernel sees fit.
    Never,
    /// Once a second.
    #[default]
    Second,
    /// Before the next ones are written.
    Batch,
}

/// The file that is written to, and those before it.
pub struct LogFile {
    path: PathBuf,
    archive: Archive,
    file: File,
    /// Whether it is one that can be cut and rotated: no device, no pipe.
    is_regular: bool,
    length: u64,
    begun: Timestamp,
    rotation: Rotation,
    synced: Instant,
    is_synced: bool,
    is_claimed: bool,
    /// What does not work, and was said.
    troubles: Vec<Trouble>,
    /// Held for as long as this writes. Without it, another guard may be writing.
    lock: Option<Flock<File>>,
}

/// What can fail without a line being lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Rotating,
    Syncing,
}

#[derive(Deserialize)]
struct Dated {
    time: Timestamp,
}

impl LogFile {
    /// Opens a log, makes it if it is not there, and cuts off a line that a crash has left half written.
    ///
    /// # Errors
    /// It cannot be opened, is a symbolic link, or its folder is one where others can put files.
    pub fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        let (archive, file) = open(path)?;
        let kind = file.metadata()?.file_type();
        let mut log = Self {
            path: path.to_owned(),
            archive,
            file,
            is_regular: kind.is_file(),
            length: 0,
            begun: Timestamp::now(),
            rotation,
            synced: Instant::now(),
            is_synced: true,
            is_claimed: false,
            troubles: Vec::new(),
            lock: None,
        };
        if kind.is_dir() || kind.is_block_device() {
            return Err(io::Error::other("it is no file"));
        }
        if log.is_regular {
            log.lock = log.locked(Duration::ZERO);
            if log.lock.is_some() {
                log.repair()?;
            }
        }
        Ok(log)
    }

    /// Appends whole lines. All of them are written, or none.
    ///
    /// # Errors
    /// There is no room even without the old files, or the file cannot be written.
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if !self.is_regular {
            return self.file.write_all(lines);
        }
        self.claim();
        let is_old =
            || Timestamp::now().duration_since(self.begun).unsigned_abs() > self.rotation.age;
        let is_large = self.length + lines.len() as u64 > self.rotation.size;
        if self.length > 0 && (is_large || is_old()) {
            let rotated = self.rotate();
            self.note(Trouble::Rotating, rotated);
        }
        while let Err(error) = self.file.write_all(lines) {
            // What was written of them would be half a line.
            self.file.set_len(self.length)?;
            let is_full = matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            );
            if !is_full || !self.archive.remove_oldest()? {
                return Err(error);
            }
            log::warn!("the disk is full: the oldest events are removed");
        }
        self.length += lines.len() as u64;
        self.is_synced = false;
        if self.rotation.sync == Sync::Batch {
            self.sync();
        }
        Ok(())
    }

    /// What it removes to make room.
    pub fn removed(&self) -> &Arc<Removed> {
        self.archive.removed()
    }

    /// Does what may wait until nothing more is to be written.
    pub fn settle(&mut self) {
        let is_due = self.synced.elapsed() >= Duration::from_secs(1);
        if self.rotation.sync == Sync::Second && is_due && !self.is_synced {
            self.sync();
        }
    }

    /// The last line of this file, or of the one before; `None` if there is none.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn last_line(&self) -> io::Result<Option<Vec<u8>>> {
        if !self.is_regular {
            return Ok(None);
        }
        if self.length == 0 {
            return self.archive.last_line();
        }
        let mut file = File::open(self.archive.path())?;
        let mut from = self.length;
        loop {
            from = from.saturating_sub(TAIL);
            file.seek(SeekFrom::Start(from))?;
            let mut tail = Vec::new();
            (&file).take(self.length - from).read_to_end(&mut tail)?;
            let lines = tail.strip_suffix(b"\n").unwrap_or(&tail);
            let begin = lines.iter().rposition(|byte| *byte == b'\n');
            if begin.is_some() || from == 0 {
                return Ok(Some(lines[begin.map_or(0, |it| it + 1)..].to_vec()));
            }
        }
    }

    /// Brings lines to the disk. They are written whether or not that works, so nothing is lost yet.
    fn sync(&mut self) {
        let synced = self.file.sync_data();
        (self.synced, self.is_synced) = (Instant::now(), synced.is_ok());
        self.note(Trouble::Syncing, synced);
    }

    /// Says once what does not work, and goes on without it.
    fn note(&mut self, trouble: Trouble, result: io::Result<()>) {
        let Err(error) = result else {
            return self.troubles.retain(|it| *it != trouble);
        };
        if self.troubles.contains(&trouble) {
            return;
        }
        let path = self.path.display();
        match trouble {
            Trouble::Rotating => {
                log::warn!("{path} stays in use, as it cannot be put away: {error}")
            }
            Trouble::Syncing => {
                log::warn!("{path} may not survive a crash of the machine: {error}");
            }
        }
        self.troubles.push(trouble);
    }

    /// Waits for another guard that still writes to this log to end, and looks at what it has written.
    pub fn claim(&mut self) {
        if self.is_claimed || !self.is_regular {
            return;
        }
        self.is_claimed = true;
        if self.lock.is_none() {
            self.lock = self.locked(HANDOVER);
            if let Err(error) = self.look_again() {
                log::warn!("{}: {error}", self.path.display());
            }
        }
        self.tidy();
    }

    /// Opens the file that is the log by now.
    fn look_again(&mut self) -> io::Result<()> {
        self.file = self.archive.open_current()?;
        if self.lock.is_some() {
            return self.repair();
        }
        // What looks like half a line may be one that is being written.
        self.length = self.file.metadata()?.size();
        Ok(())
    }

    /// Locks the log; `None` if that cannot be, or another process does not let go of it in time.
    fn locked(&self, patience: Duration) -> Option<Flock<File>> {
        let waits_until = Instant::now() + patience;
        let mut lock = self.archive.lock_file().ok()?;
        loop {
            match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Some(lock),
                Err(_) if patience.is_zero() => return None,
                Err(_) if Instant::now() > waits_until => {
                    log::warn!("another process writes to {}", self.path.display());
                    return None;
                }
                Err((file, _)) => lock = file,
            }
            std::thread::sleep(HANDOVER_STEP);
        }
    }

    /// Cuts off half a line at the end; finds out how old the first one is.
    fn repair(&mut self) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        self.length = metadata.size();
        let last = self.last_byte()?;
        if last.is_some_and(|byte| byte != b'\n') {
            let whole = self.whole_lines()?;
            let cut = self.length - whole;
            log::warn!(
                "{} ended in half a line: {cut} bytes were cut off",
                self.path.display()
            );
            self.file.set_len(whole)?;
            self.length = whole;
        }
        let mut first = Vec::new();
        io::BufRead::read_until(
            &mut io::BufReader::new(File::open(self.archive.path())?.take(TAIL)),
            b'\n',
            &mut first,
        )?;
        let dated: Option<Dated> = serde_json::from_slice(&first).ok();
        self.begun = dated.map_or_else(Timestamp::now, |dated| dated.time);
        Ok(())
    }

    fn last_byte(&self) -> io::Result<Option<u8>> {
        if self.length == 0 {
            return Ok(None);
        }
        let mut file = File::open(self.archive.path())?;
        file.seek(SeekFrom::Start(self.length - 1))?;
        let mut byte = [0];
        file.read_exact(&mut byte)?;
        Ok(Some(byte[0]))
    }

    /// Bytes up to the last line end.
    fn whole_lines(&self) -> io::Result<u64> {
        let mut file = File::open(self.archive.path())?;
        let mut to = self.length;
        while to > 0 {
            let from = to.saturating_sub(TAIL);
            file.seek(SeekFrom::Start(from))?;
            let mut part = Vec::new();
            (&file).take(to - from).read_to_end(&mut part)?;
            if let Some(end) = part.iter().rposition(|byte| *byte == b'\n') {
                return Ok(from + end as u64 + 1);
            }
            to = from;
        }
        Ok(0)
    }

    /// Begins a new file. Where that fails, the old one stays in use.
    fn rotate(&mut self) -> io::Result<()> {
        let away = match self.archive.put_away(Timestamp::now()) {
            // Somebody has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            done => Some(done?),
        };
        let next = match (self.archive.open_current(), away) {
            (Err(error), Some(away)) => {
                fs::rename(away, self.archive.path())?;
                return Err(error);
            }
            (next, _) => next?,
        };
        if self.rotation.sync != Sync::Never {
            self.sync();
        }
        self.file = next;
        self.length = 0;
        self.begun = Timestamp::now();
        self.tidy();
        Ok(())
    }

    /// Removes what is too much, and compresses what is left.
    fn tidy(&mut self) {
        let rest = self.rotation.total.saturating_sub(self.rotation.size);
        self.archive.keep_below(rest);
        if let Err(error) = self.archive.compress_all() {
            log::warn!("old events are not compressed: {error}");
        }
    }
}

/// The folder, held open, so that it stays the one that was looked at; and the file in it.
fn open(path: &Path) -> io::Result<(Archive, File)> {
    let folder = match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => return Err(io::Error::other("it is a folder")),
    };
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::other("its name is no text"))?;
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(folder)?;
    let metadata = held.metadata()?;
    let own = nix::unistd::geteuid().as_raw();
    if metadata.mode() & 0o022 != 0 || (metadata.uid() != own && metadata.uid() != 0) {
        return Err(io::Error::other(format!(
            "others can put files into {}, so they could put links or pipes in the way of the log",
            folder.display()
        )));
    }
    let archive = Archive::new(held, name);
    let opened = match archive.open_current() {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) && folder == Path::new("/dev") => {
            open_stream(path)
        }
        opened => opened,
    };
    match opened {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Err(io::Error::other(
            "nobody reads this pipe: start its reader first",
        )),
        Err(error) => Err(error),
        Ok(file) => {
            if !file.metadata()?.is_file() {
                // Whoever reads may take their time.
                fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND))?;
            }
            Ok((archive, file))
        }
    }
}

/// `/dev/stdout` and the like, which are links to what this process has open. A file would be rotated in
/// the wrong place.
fn open_stream(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() {
        return Err(io::Error::other(
            "it leads to a file: name that, or - for standard output",
        ));
    }
    OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
}

/// A folder that is held open, as a path that leads to it wherever it is moved.
pub fn held(folder: &File) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}
