//! Reads logs of any size: one thread takes them apart into blocks of whole lines, others read these.

use std::{
    fs,
    io::{self, BufRead, Read},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use super::{Line, Summary};
use crate::record::output;

/// Bytes in a block, more or less.
const BLOCK: usize = 1024 * 1024;
/// Longest line; what is longer is no event.
const MAX_LINE: usize = 4 * 1024 * 1024;
/// Blocks that may wait for a thread.
const WAITING: usize = 4;

/// The files of logs, in the order they were written.
#[derive(Clone, Debug, Default)]
pub struct Logs {
    files: Vec<PathBuf>,
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
    /// The logs at these places: folders with all that is in them, and files with the older ones that
    /// were put away beside them.
    ///
    /// # Errors
    /// A place is not there, or cannot be read.
    pub fn at(places: &[PathBuf]) -> io::Result<Self> {
        let mut files = Vec::new();
        for place in places {
            let named = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", place.display()))
            };
            if fs::metadata(place).map_err(named)?.is_dir() {
                within(place, &mut files).map_err(named)?;
            } else {
                add_log(place, &mut files);
            }
        }
        let mut known = std::collections::HashSet::new();
        files.retain(|file| known.insert(file.clone()));
        Ok(Self { files })
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Bytes in all of them, as they are on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let sizes = self.files.iter().filter_map(|file| fs::metadata(file).ok());
        sizes.map(|it| it.len()).sum()
    }

    /// Tells each line, without its line end, in order.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn each_line(&self, mut tell: impl FnMut(&Path, u64, &[u8])) -> io::Result<()> {
        for file in &self.files {
            let named = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", file.display()))
            };
            let mut reader = output::read(file).map_err(named)?;
            let mut line = Vec::new();
            for number in 1.. {
                line.clear();
                let mut limited = (&mut reader).take(MAX_LINE as u64);
                if limited.read_until(b'\n', &mut line).map_err(named)? == 0 {
                    break;
                }
                tell(file, number, line.strip_suffix(b"\n").unwrap_or(&line));
            }
        }
        Ok(())
    }
}

/// All logs in a folder and below.
fn within(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() {
            within(&path, files)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_hidden = name.starts_with('.');
        if is_hidden || name.ends_with(".unfinished") {
            continue;
        }
        // A log comes after what it has put away, which sorts behind it.
        if name.ends_with(".jsonl") {
            add_log(&path, files);
        } else if name.contains(".jsonl.") || name.ends_with(".zst") {
            files.push(path);
        }
    }
    Ok(())
}

fn add_log(log: &Path, files: &mut Vec<PathBuf>) {
    if let (Some(folder), Some(name)) = (log.parent(), log.file_name().and_then(|it| it.to_str())) {
        let folder = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        files.extend(output::segments(folder, name));
    }
    files.push(log.to_owned());
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
    file: fs::File,
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
    for path in &logs.files {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = fs::File::open(path).map_err(named)?;
        let counted = Counted { file, progress };
        let mut plain: Box<dyn Read> = match path.extension() {
            Some(extension) if extension == "zst" => {
                Box::new(zstd::Decoder::new(counted).map_err(named)?)
            }
            _ => Box::new(counted),
        };
        let mut rest = Vec::new();
        loop {
            let mut block = empty.try_recv().unwrap_or_default();
            block.clear();
            block.append(&mut rest);
            let wanted = BLOCK.saturating_sub(block.len()).max(BLOCK / 4) as u64;
            let read = (&mut plain).take(wanted).read_to_end(&mut block);
            let is_end = read.map_err(named)? == 0;
            if !is_end {
                // Half a line waits for its other half.
                let whole = block.iter().rposition(|byte| *byte == b'\n');
                rest = block.split_off(whole.map_or(0, |end| end + 1));
                if rest.len() > MAX_LINE {
                    rest.clear();
                }
            }
            // They end only with a panic, which is seen where they are joined.
            let _sent = blocks.send(block);
            if is_end {
                break;
            }
        }
    }
    Ok(())
}
