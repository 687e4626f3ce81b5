//! Reads logs of any size: one thread takes them apart into blocks of whole lines, others read these.

use std::{
    collections::{BTreeSet, HashSet},
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use jiff::Timestamp;
use serde::de::IgnoredAny;

use super::{Line, Summary};
use crate::record::output;

/// How names of logs end, in folders.
const SUFFIX: &str = ".jsonl";

/// Bytes in a block, more or less.
const BLOCK: usize = 1024 * 1024;
/// Longest line; what is longer is no event.
const MAX_LINE: usize = 4 * 1024 * 1024;
/// Blocks that may wait for a thread.
const WAITING: usize = 4;

/// Logs, each with what it has put away.
#[derive(Clone, Debug, Default)]
pub struct Logs {
    logs: Vec<Log>,
}

/// A log. What it has put away lies beside it, under names that begin with its own.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    /// What was put away before is not wanted, but for the last file.
    since: Option<String>,
}

/// How far reading has come.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
}

impl Progress {
    /// Bytes of files that were read, as they are on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

impl Logs {
    /// The logs at these places: files, and folders with all that is in them. What was put away so long
    /// before a time that no line of that time can be in it is left out, but for one file: what came last
    /// before that time is in it.
    ///
    /// # Errors
    /// A place is not there, or cannot be read.
    pub fn at(places: &[PathBuf], since: Option<Timestamp>) -> io::Result<Self> {
        let mut paths = Vec::new();
        for place in places {
            let named = |error: io::Error| named(place, &error);
            if fs::metadata(place).map_err(named)?.is_dir() {
                within(place, &mut paths).map_err(named)?;
            } else {
                paths.push(place.clone());
            }
        }
        let mut known = HashSet::new();
        paths.retain(|path| known.insert(path.clone()));
        let since = since.map(output::in_names);
        let log = |path| Log {
            path,
            since: since.clone(),
        };
        Ok(Self {
            logs: paths.into_iter().map(log).collect(),
        })
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Log> {
        self.logs.iter()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty()
    }

    /// Bytes in all files, as they are on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let older = self.logs.iter().flat_map(Log::older);
        let files = older.chain(self.logs.iter().map(|log| log.path.clone()));
        files
            .filter_map(|file| Some(fs::metadata(file).ok()?.len()))
            .sum()
    }
}

impl Log {
    /// Tells each line, without its line end, in order: the file that it is in, its number there, and the line.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn each_line(&self, mut tell: impl FnMut(&Path, u64, &[u8])) -> io::Result<()> {
        self.each_file(|path, file| {
            let mut reader = BufReader::with_capacity(BLOCK, output::plain(path, file)?);
            let mut line = Vec::new();
            for number in 1.. {
                line.clear();
                let mut limited = (&mut reader).take(MAX_LINE as u64);
                if limited.read_until(b'\n', &mut line)? == 0 {
                    break;
                }
                match line.strip_suffix(b"\n") {
                    Some(line) => tell(path, number, line),
                    None if is_half(&line) => {}
                    None => tell(path, number, &line),
                }
            }
            Ok(())
        })
    }

    /// Tells each file, the oldest first.
    fn each_file(&self, mut tell: impl FnMut(&Path, File) -> io::Result<()>) -> io::Result<()> {
        // First: what is put away from now on is this file still, and what was before is found beside it.
        let current = open(&self.path)?;
        for mut path in self.older() {
            let mut file = open(&path)?;
            if file.is_none() {
                path.as_mut_os_string().push(output::COMPRESSED);
                file = open(&path)?;
            }
            match file {
                Some(file) => tell(&path, file).map_err(|error| named(&path, &error))?,
                None => log::warn!("{} was removed meanwhile", path.display()),
            }
        }
        match current {
            Some(file) => tell(&self.path, file).map_err(|error| named(&self.path, &error)),
            None => Ok(()),
        }
    }

    /// The files that were put away, the oldest first.
    fn older(&self) -> Vec<PathBuf> {
        let name = self.path.file_name().and_then(|name| name.to_str());
        let (Some(folder), Some(name)) = (self.path.parent(), name) else {
            return Vec::new();
        };
        let folder = match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        };
        let mut files = output::segments(folder, name);
        if let Some(since) = &self.since {
            let until = |file: &Path| {
                let file = file.file_name()?.to_str()?;
                Some(output::until(file, name)? < since.as_str())
            };
            let before = files.iter().take_while(|file| until(file) == Some(true));
            files.drain(..before.count().saturating_sub(1));
        }
        files
    }
}

/// All logs in a folder and below.
fn within(folder: &Path, logs: &mut Vec<PathBuf>) -> io::Result<()> {
    // In the order of their names, and those once that have put away several files.
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            found.insert((name, true));
            continue;
        }
        if name.starts_with('.') || name.ends_with(".unfinished") {
            continue;
        }
        if name.ends_with(SUFFIX) {
            found.insert((name, false));
        } else if let Some((before, _)) = name.split_once(".jsonl.") {
            let log = format!("{before}{SUFFIX}");
            let is_put_away = output::until(&name, &log).is_some();
            found.insert((if is_put_away { log } else { name }, false));
        }
    }
    for (name, is_folder) in found {
        let path = folder.join(name);
        match is_folder {
            true => within(&path, logs)?,
            false => logs.push(path),
        }
    }
    Ok(())
}

/// `None` if it is not there.
fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(named(path, &error)),
    }
}

/// Whether the end of a file is a line that is just being written, or that a crash has cut off.
fn is_half(line: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(line).is_err()
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Reads all logs into a summary, with so many threads. `fresh` makes the summary that each begins with.
///
/// # Errors
/// A file cannot be read.
pub fn read(
    logs: &Logs,
    threads: usize,
    progress: &Progress,
    fresh: impl Fn() -> Summary + Sync,
) -> io::Result<Summary> {
    let (blocks, queue) = sync_channel::<Vec<u8>>(WAITING);
    let (spent, empty) = sync_channel::<Vec<u8>>(WAITING + threads + 1);
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads.max(1))
            .map(|_| {
                let (queue, spent, fresh) = (&queue, spent.clone(), &fresh);
                scope.spawn(move || {
                    let mut summary = fresh();
                    while let Some(block) = next(queue) {
                        read_block(&block, &mut summary);
                        // Nobody may need it any more.
                        let _kept = spent.try_send(block);
                    }
                    summary
                })
            })
            .collect();
        let taken = take_apart(logs, progress, &blocks, &empty);
        drop(blocks);
        let mut whole = fresh();
        for reader in readers {
            match reader.join() {
                Ok(summary) => whole.merge(summary),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        taken.map(|()| whole)
    })
}

fn next(queue: &Mutex<Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    queue.recv().ok()
}

fn read_block(block: &[u8], summary: &mut Summary) {
    for line in block.split(|byte| *byte == b'\n') {
        if line.is_empty() {
            continue;
        }
        match serde_json::from_slice::<Line<'_>>(line) {
            Ok(line) => summary.add(&line),
            Err(_) => summary.skip(),
        }
    }
}

/// Counts what is read of a file.
struct Counted<'a> {
    file: File,
    progress: &'a Progress,
}

impl Read for Counted<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(to)?;
        self.progress.bytes.fetch_add(read as u64, Relaxed);
        Ok(read)
    }
}

fn take_apart(
    logs: &Logs,
    progress: &Progress,
    blocks: &SyncSender<Vec<u8>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<()> {
    for log in logs.iter() {
        log.each_file(|path, file| {
            let mut plain = output::plain(path, Counted { file, progress })?;
            let mut rest = Vec::new();
            loop {
                let mut block = empty.try_recv().unwrap_or_default();
                block.clear();
                block.append(&mut rest);
                let wanted = BLOCK.saturating_sub(block.len()).max(BLOCK / 4) as u64;
                if (&mut plain).take(wanted).read_to_end(&mut block)? == 0 {
                    if !is_half(&block) {
                        // As below.
                        let _sent = blocks.send(block);
                    }
                    return Ok(());
                }
                // Half a line waits for its other half.
                let whole = block.iter().rposition(|byte| *byte == b'\n');
                rest = block.split_off(whole.map_or(0, |end| end + 1));
                if rest.len() > MAX_LINE {
                    rest.clear();
                }
                // They end only with a panic, which is seen where they are joined.
                let _sent = blocks.send(block);
            }
        })?;
    }
    Ok(())
}
