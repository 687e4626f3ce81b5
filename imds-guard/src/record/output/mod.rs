//! Where events go: each output takes them in its own form.

mod archive;
mod chain;
mod emf;
mod file;
mod fold;
mod journald;
mod lines;
mod ocsf;
mod otlp;
mod spread;
mod tracked;

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
};

pub use archive::{COMPRESSED, Removed, in_names, plain, read, segments, until};
pub use chain::{Broken, Links, Verified};
pub use file::{LogFile, Rotation, Sync};
pub use fold::Fold;
pub use journald::{Journald, SOCKET as JOURNALD};
pub use lines::{Format, Lines};
pub use otlp::{Collector, Otlp};

use super::{
    Event, Kind,
    queue::{Ending, Queue},
    to_json,
};
pub(super) use spread::Spread;
use tracked::Tracked;

/// Takes events, and may keep some of them until it is flushed.
pub trait Output: Send {
    /// Takes an event; `line` is its JSON, with a line end.
    ///
    /// # Errors
    /// This one, or some that it had kept, are lost.
    fn write(&mut self, event: &Event, line: &[u8]) -> Result<(), Lost>;

    /// Passes on what it has kept. Called when nothing more is waiting, and every second.
    ///
    /// # Errors
    /// What it had kept is lost.
    fn flush(&mut self) -> Result<(), Lost>;

    /// Passes on what it has kept, as nothing more will come.
    ///
    /// # Errors
    /// What it had kept is lost.
    fn finish(&mut self) -> Result<(), Lost> {
        self.flush()
    }

    /// What it removes to make room, counted as it does; `None` if it keeps no files.
    fn removed(&self) -> Option<Arc<Removed>> {
        None
    }
}

/// Events that could not be passed on.
#[derive(Debug)]
pub struct Lost {
    /// What they stood for.
    pub kept: Kept,
    /// Why.
    pub error: io::Error,
}

/// What an output has kept, and loses if it cannot pass it on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// How many events; a line of calls that were folded stands for as many.
    pub events: u64,
    /// How many were lost earlier, and are told of by what is kept.
    pub told: u64,
}

impl Kept {
    /// With one more.
    pub fn add(&mut self, event: &Event) {
        match event.kind {
            Kind::EventsLost { count } => self.told += count,
            _ => self.events += event.calls(),
        }
    }

    /// None of it could be passed on.
    #[must_use]
    pub fn lost(&mut self, error: io::Error) -> Lost {
        let kept = std::mem::take(self);
        Lost { kept, error }
    }
}

impl Lost {
    /// This event.
    #[must_use]
    pub fn event(event: &Event, error: io::Error) -> Self {
        let mut kept = Kept::default();
        kept.add(event);
        Self { kept, error }
    }
}

/// All outputs of a guard. The first is the event log.
#[derive(Default)]
pub struct Outputs {
    outputs: Vec<Tracked>,
    fold: Option<Fold>,
}

/// What an output has lost.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Which output: the name of its key in the configuration.
    pub output: &'static str,
    /// Events that it could not write, since the start.
    pub events: Arc<AtomicU64>,
    /// Old files of it that were removed to make room, if it keeps files.
    pub removed: Option<Arc<Removed>>,
}

impl Outputs {
    /// None yet.
    #[must_use]
    pub fn new(fold: Option<Fold>) -> Self {
        Self {
            outputs: Vec::new(),
            fold,
        }
    }

    /// Events as lines of JSON.
    #[must_use]
    pub fn to(out: impl io::Write + Send + 'static) -> Self {
        Self::default().with("events", Lines::to(Format::Json, Box::new(out)))
    }

    /// With one more.
    #[must_use]
    pub fn with(mut self, name: &'static str, output: impl Output + 'static) -> Self {
        self.outputs.push(Tracked::new(name, Box::new(output)));
        self
    }

    /// What each has lost, now and from now on.
    #[must_use]
    pub fn losses(&self) -> Vec<Loss> {
        self.outputs.iter().map(|it| it.loss().clone()).collect()
    }

    /// Starts a thread for each but the first, which is the caller's to write to.
    pub(super) fn start(self) -> io::Result<(Spread, Vec<Ending>)> {
        let mut outputs = self.outputs.into_iter();
        let first = outputs.next();
        let (mut others, mut endings) = (Vec::new(), Vec::new());
        for output in outputs {
            let loss = output.loss().clone();
            let (queue, ending) = Queue::start(loss.output, loss.events, output)?;
            others.push(queue);
            endings.push(ending);
        }
        let spread = Spread {
            fold: self.fold,
            first,
            others,
        };
        Ok((spread, endings))
    }
}

/// An event as it is written; `None` if it cannot be.
pub fn line(event: &Event) -> Option<Vec<u8>> {
    let mut line = to_json(event).ok()?;
    line.push('\n');
    Some(line.into_bytes())
}
