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

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

pub use archive::{in_names, read, segments, until};
pub use chain::{Broken, Links, Verified};
pub use file::{LogFile, Rotation, Sync};
pub use fold::Fold;
pub use journald::{Journald, SOCKET as JOURNALD};
pub use lines::{Format, Lines};
pub use otlp::{Collector, Otlp};

use super::{Event, Kind};

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
}

/// Events that could not be passed on.
#[derive(Debug)]
pub struct Lost {
    /// How many.
    pub events: u64,
    /// How many were lost earlier, and should have been told of now.
    pub untold: u64,
    /// Why.
    pub error: io::Error,
}

impl Lost {
    /// This event.
    #[must_use]
    pub fn event(event: &Event, error: io::Error) -> Self {
        let mut lost = Self {
            events: 0,
            untold: 0,
            error,
        };
        lost.count(event);
        lost
    }

    fn count(&mut self, event: &Event) {
        match event.kind {
            Kind::EventsLost { count } => self.untold += count,
            _ => self.events += 1,
        }
    }
}

/// All outputs of a guard.
#[derive(Default)]
pub struct Outputs {
    outputs: Vec<Tracked>,
    fold: Option<Fold>,
}

/// How many events an output has lost.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Which output: the name of its key in the configuration.
    pub output: &'static str,
    /// How many since the start.
    pub events: Arc<AtomicU64>,
}

/// An output, and what it has lost.
struct Tracked {
    output: Box<dyn Output>,
    loss: Loss,
    /// What it has not been told of.
    unreported: u64,
    fails: bool,
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
    pub fn with(self, name: &'static str, output: impl Output + 'static) -> Self {
        self.counting(name, output, Arc::default())
    }

    /// With one more that counts by itself what it loses later.
    #[must_use]
    pub fn counting(
        mut self,
        output: &'static str,
        taker: impl Output + 'static,
        lost: Arc<AtomicU64>,
    ) -> Self {
        self.outputs.push(Tracked {
            output: Box::new(taker),
            loss: Loss {
                output,
                events: lost,
            },
            unreported: 0,
            fails: false,
        });
        self
    }

    /// What each has lost, now and from now on.
    #[must_use]
    pub fn losses(&self) -> Vec<Loss> {
        self.outputs.iter().map(|it| it.loss.clone()).collect()
    }

    /// Tells all of events that never reached them.
    pub fn missed(&mut self, events: u64) {
        for output in &mut self.outputs {
            output.unreported += events;
        }
    }

    /// Passes on an event.
    pub fn write(&mut self, event: Event, line: &[u8]) {
        let Some(fold) = &mut self.fold else {
            return self.pass_on(&event, line);
        };
        if let Some(event) = fold.keep(event) {
            self.pass_on(&event, line);
        }
    }

    /// Passes on what was kept.
    pub fn flush(&mut self, now: Instant) {
        let due = self.fold.as_mut().map(|fold| fold.due(now));
        self.pass_on_all(due.unwrap_or_default());
        for output in &mut self.outputs {
            let flushed = output.output.flush();
            output.note(flushed);
        }
    }

    /// Passes on the last.
    pub fn finish(&mut self) {
        let rest = self.fold.as_mut().map(Fold::rest);
        self.pass_on_all(rest.unwrap_or_default());
        self.flush(Instant::now());
    }

    fn pass_on_all(&mut self, events: Vec<Event>) {
        for event in events {
            if let Some(line) = line(&event) {
                self.pass_on(&event, &line);
            }
        }
    }

    fn pass_on(&mut self, event: &Event, line: &[u8]) {
        for output in &mut self.outputs {
            output.write(event, line);
        }
    }
}

impl Tracked {
    fn write(&mut self, event: &Event, json: &[u8]) {
        if self.unreported > 0 {
            let count = std::mem::take(&mut self.unreported);
            let lost = Event::now(&event.host, Kind::EventsLost { count });
            if let Some(json) = line(&lost) {
                let told = self.output.write(&lost, &json);
                self.note(told);
            }
        }
        let written = self.output.write(event, json);
        self.note(written);
    }

    /// Counts what is lost; says once that it is, and once that it is not any more.
    fn note(&mut self, result: Result<(), Lost>) {
        let name = self.loss.output;
        match result {
            Ok(()) if self.fails => log::warn!("{name}: events can be written again"),
            Ok(()) => return,
            Err(lost) => {
                self.unreported += lost.events + lost.untold;
                self.loss.events.fetch_add(lost.events, Relaxed);
                if self.fails {
                    return;
                }
                log::error!(
                    "{name}: events cannot be written and are counted as lost: {}",
                    lost.error
                );
            }
        }
        self.fails = !self.fails;
    }
}

/// An event as it is written; `None` if it cannot be.
pub fn line(event: &Event) -> Option<Vec<u8>> {
    let mut line = serde_json::to_vec(event).ok()?;
    line.push(b'\n');
    Some(line)
}
