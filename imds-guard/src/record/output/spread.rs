//! Passes events on to all outputs, none of which can hold up the event log.

use std::{sync::Arc, time::Instant};

use super::{Fold, tracked::Tracked};
use crate::record::{
    Event,
    queue::{Queue, Recorded, Taker},
};

/// Folds events, writes them to the first output, and hands them to the threads of the others.
pub struct Spread {
    pub(super) fold: Option<Fold>,
    pub(super) first: Option<Tracked>,
    pub(super) others: Vec<Queue>,
}

impl Spread {
    fn pass_on(&mut self, recorded: &Arc<Recorded>) {
        for other in &self.others {
            other.put(Arc::clone(recorded));
        }
        if let Some(first) = &mut self.first {
            first.take(Arc::clone(recorded));
        }
    }

    fn pass_on_all(&mut self, events: Vec<Event>) {
        for recorded in events.into_iter().filter_map(Recorded::new) {
            self.pass_on(&recorded);
        }
    }
}

impl Taker for Spread {
    fn missed(&mut self, events: u64) {
        for other in &self.others {
            other.missed(events);
        }
        if let Some(first) = &mut self.first {
            first.missed(events);
        }
    }

    fn take(&mut self, recorded: Arc<Recorded>) {
        let fold = self.fold.as_mut();
        if !fold.is_some_and(|fold| fold.keep(&recorded.event)) {
            self.pass_on(&recorded);
        }
    }

    fn flush(&mut self) {
        let due = self.fold.as_mut().map(|fold| fold.due(Instant::now()));
        self.pass_on_all(due.unwrap_or_default());
        if let Some(first) = &mut self.first {
            first.flush();
        }
    }

    fn finish(&mut self) {
        let rest = self.fold.as_mut().map(Fold::rest);
        self.pass_on_all(rest.unwrap_or_default());
        // The others finish meanwhile.
        self.others.clear();
        if let Some(first) = &mut self.first {
            first.finish();
        }
    }
}
