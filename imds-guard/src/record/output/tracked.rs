//! An output, and what it has lost.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{Loss, Lost, Output, line};
use crate::record::{
    Event, Kind,
    queue::{Recorded, Taker},
};

/// Counts what an output loses, and tells it later.
pub struct Tracked {
    output: Box<dyn Output>,
    loss: Loss,
    /// What it has not been told of.
    untold: u64,
    fails: bool,
}

impl Tracked {
    pub fn new(name: &'static str, output: Box<dyn Output>) -> Self {
        Self {
            loss: Loss {
                output: name,
                events: Arc::default(),
                removed: output.removed(),
            },
            output,
            untold: 0,
            fails: false,
        }
    }

    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// Counts what is lost; says once that it is, and once that it is not any more.
    fn note(&mut self, result: Result<(), Lost>) {
        let name = self.loss.output;
        match result {
            Ok(()) if self.fails => log::warn!("{name}: events can be written again"),
            Ok(()) => return,
            Err(lost) => {
                self.untold += lost.kept.events + lost.kept.told;
                self.loss.events.fetch_add(lost.kept.events, Relaxed);
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

impl Taker for Tracked {
    fn missed(&mut self, events: u64) {
        self.untold += events;
    }

    fn take(&mut self, recorded: Arc<Recorded>) {
        if self.untold > 0 {
            let count = std::mem::take(&mut self.untold);
            let lost = Event::now(&recorded.event.host, Kind::EventsLost { count });
            if let Some(json) = line(&lost) {
                let told = self.output.write(&lost, &json);
                self.note(told);
            }
        }
        let written = self.output.write(&recorded.event, &recorded.line);
        self.note(written);
    }

    fn flush(&mut self) {
        let flushed = self.output.flush();
        self.note(flushed);
    }

    fn finish(&mut self) {
        let finished = self.output.finish();
        self.note(finished);
    }
}
