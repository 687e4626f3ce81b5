//! A line for each event, in a file or on a stream.

use std::{
    io::{self, Write},
    sync::Arc,
};

use super::{Kept, Lost, Output, Removed, chain::Chained, emf::Emf, file::LogFile, ocsf};
use crate::record::Event;

/// Bytes that are written at once, more or less.
const BATCH: usize = 64 * 1024;

/// Writes lines.
pub struct Lines {
    format: Format,
    out: Out,
    batch: Vec<u8>,
    kept: Kept,
}

/// What a line looks like.
pub enum Format {
    /// An [`Event`] as JSON.
    Json,
    /// The same, chained to the last line of the file, once that is known.
    Chained(Option<Chained>),
    /// An HTTP Activity of the Open Cybersecurity Schema Framework; for requests alone.
    Ocsf,
    /// CloudWatch's embedded metric format; for requests without a session token alone.
    Emf(Emf),
}

enum Out {
    Stream(Box<dyn Write + Send>),
    File(Box<LogFile>),
}

impl Format {
    /// JSON, chained to the last line of a file.
    #[must_use]
    pub const fn chained() -> Self {
        Self::Chained(None)
    }

    /// CloudWatch's embedded metric format.
    #[must_use]
    pub fn emf() -> Self {
        Self::Emf(Emf::default())
    }
}

impl Lines {
    /// Lines to a stream.
    #[must_use]
    pub fn to(format: Format, stream: Box<dyn Write + Send>) -> Self {
        Self::new(format, Out::Stream(stream))
    }

    /// Lines to a file that is rotated.
    #[must_use]
    pub fn to_file(format: Format, file: LogFile) -> Self {
        Self::new(format, Out::File(Box::new(file)))
    }

    fn new(format: Format, out: Out) -> Self {
        Self {
            format,
            out,
            batch: Vec::new(),
            kept: Kept::default(),
        }
    }

    fn write_batch(&mut self) -> Result<(), Lost> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let written = match &mut self.out {
            Out::Stream(stream) => stream.write_all(&self.batch).and_then(|()| stream.flush()),
            Out::File(file) => file.append(&self.batch),
        };
        self.batch.clear();
        let mut kept = std::mem::take(&mut self.kept);
        if let Format::Chained(Some(chain)) = &mut self.format {
            match written {
                Ok(()) => chain.commit(),
                Err(_) => chain.roll_back(),
            }
        }
        written.map_err(|error| kept.lost(error))
    }
}

/// The chain that goes on where the file ends.
fn begin(out: &mut Out) -> io::Result<Chained> {
    match out {
        Out::Stream(_) => Ok(Chained::after(None)),
        Out::File(file) => {
            file.claim();
            Ok(Chained::after(file.last_line()?.as_deref()))
        }
    }
}

impl Output for Lines {
    fn write(&mut self, event: &Event, line: &[u8]) -> Result<(), Lost> {
        let before = self.batch.len();
        match &mut self.format {
            Format::Json => self.batch.extend_from_slice(line),
            Format::Chained(chain) => {
                let chain = match chain {
                    Some(chain) => chain,
                    None => chain
                        .insert(begin(&mut self.out).map_err(|error| Lost::event(event, error))?),
                };
                chain.link(line, &mut self.batch);
            }
            Format::Ocsf => ocsf::write(event, &mut self.batch),
            Format::Emf(emf) => emf.write(event, &mut self.batch),
        }
        if self.batch.len() > before {
            self.kept.add(event);
        }
        if self.batch.len() < BATCH {
            return Ok(());
        }
        self.write_batch()
    }

    fn flush(&mut self) -> Result<(), Lost> {
        self.write_batch()?;
        if let Out::File(file) = &mut self.out {
            file.settle();
        }
        Ok(())
    }

    fn removed(&self) -> Option<Arc<Removed>> {
        match &self.out {
            Out::Stream(_) => None,
            Out::File(file) => Some(Arc::clone(file.removed())),
        }
    }
}
