//! Calls that are alike become one line, after the first of them.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    mem,
    time::{Duration, Instant},
};

use crate::record::{Event, Folded, Host, Kind, Request};

/// Kinds of call that are kept in mind. Others are not folded.
const MOST: usize = 4096;

/// Keeps calls that are alike for some time, and then tells of them in one line.
pub struct Fold {
    window: Duration,
    calls: HashMap<u64, Calls>,
}

struct Calls {
    since: Instant,
    host: Host,
    first: Box<Request>,
    repeated: Option<Folded>,
}

impl Fold {
    /// Folds what is alike within this time.
    #[must_use]
    pub fn new(window: Duration) -> Self {
        Self {
            window,
            calls: HashMap::new(),
        }
    }

    /// Keeps an event that is like an earlier one. Returns whether it does.
    pub fn keep(&mut self, event: &Event) -> bool {
        let Kind::Request(request) = &event.kind else {
            return false;
        };
        let key = key(request);
        let Some(calls) = self.calls.get_mut(&key) else {
            if self.calls.len() < MOST {
                let calls = Calls {
                    since: Instant::now(),
                    host: event.host.clone(),
                    first: request.clone(),
                    repeated: None,
                };
                self.calls.insert(key, calls);
            }
            return false;
        };
        // Calls that are alike differ in their latency, and that of the last one is kept.
        let before = mem::replace(&mut calls.first.latency_us, request.latency_us);
        if calls.first != *request {
            calls.first.latency_us = before;
            return false;
        }
        let repeated = calls.repeated.get_or_insert_with(|| Folded {
            count: 0,
            first: event.time.clone(),
            last: String::new(),
        });
        repeated.count += 1;
        repeated.last.clone_from(&event.time);
        true
    }

    /// What has been kept for long enough.
    pub fn due(&mut self, now: Instant) -> Vec<Event> {
        let window = self.window;
        self.take(|calls| now.duration_since(calls.since) >= window)
    }

    /// What is still kept.
    pub fn rest(&mut self) -> Vec<Event> {
        self.take(|_| true)
    }

    fn take(&mut self, mut which: impl FnMut(&Calls) -> bool) -> Vec<Event> {
        let taken = self.calls.extract_if(|_, calls| which(calls));
        let mut events: Vec<_> = taken
            .filter_map(|(_, calls)| {
                let repeated = calls.repeated?;
                let time = repeated.last.clone();
                let request = Request {
                    folded: Some(repeated),
                    ..*calls.first
                };
                let kind = Kind::Request(Box::new(request));
                Some(Event {
                    time,
                    ..Event::now(&calls.host, kind)
                })
            })
            .collect();
        events.sort_by(|one, other| one.time.cmp(&other.time));
        events
    }
}

fn key(request: &Request) -> u64 {
    let mut hasher = DefaultHasher::new();
    let caller = &request.caller;
    (caller.pid, caller.tid, &caller.started).hash(&mut hasher);
    (&request.method, &request.path, request.status).hash(&mut hasher);
    (&request.user_agent, &request.rule, request.imds).hash(&mut hasher);
    hasher.finish()
}
