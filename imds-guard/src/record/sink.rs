//! Events leave the request path through a bounded queue and are written by threads of their own.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::sync::broadcast;

use super::{
    Event, Host, Kind,
    output::{Loss, Outputs},
    queue::{Ending, Queue, Recorded},
};

/// Events that a listener may be behind.
const LISTENED: usize = 4096;

/// How long the last events may take to be written: whoever reads them may have stopped doing so.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// Hands events to the outputs. Never blocks, never fails: what cannot be queued is counted.
#[derive(Clone)]
pub struct Recorder {
    queue: Queue,
    host: Arc<Host>,
    listeners: broadcast::Sender<Arc<[u8]>>,
    losses: Arc<[Loss]>,
}

/// Events as they happen, each a line of JSON. Whoever is too slow misses some, and is told how many.
pub type Lines = broadcast::Receiver<Arc<[u8]>>;

/// Ends the writing threads.
pub struct Writer {
    endings: Vec<Ending>,
}

impl Recorder {
    /// Starts the writing threads. They end when the last recorder is dropped and everything is
    /// written.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(host: impl Into<Host>, outputs: Outputs) -> io::Result<(Self, Writer)> {
        let losses = outputs.losses().into();
        let (spread, mut endings) = outputs.start()?;
        let (queue, ending) = Queue::start("events", Arc::default(), spread)?;
        endings.insert(0, ending);
        let recorder = Self {
            queue,
            host: Arc::new(host.into()),
            listeners: broadcast::Sender::new(LISTENED),
            losses,
        };
        Ok((recorder, Writer { endings }))
    }

    /// Records that something happened just now.
    pub fn record(&self, kind: Kind) {
        let Some(recorded) = Recorded::new(Event::now(&self.host, kind)) else {
            return self.queue.lose(1);
        };
        if self.listeners.receiver_count() > 0 {
            // Nobody may have stayed.
            let _heard = self.listeners.send(Arc::from(recorded.line.as_slice()));
        }
        self.queue.put(recorded);
    }

    /// Listens to what is recorded from now on.
    #[must_use]
    pub fn listen(&self) -> Lines {
        self.listeners.subscribe()
    }

    /// Events that no output got since the start, as they came too fast, and those that the first
    /// output could not write.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let first = self.losses.first();
        self.missed() + first.map_or(0, |loss| loss.events.load(Relaxed))
    }

    /// Events that no output got since the start, as they came too fast.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.queue.lost()
    }

    /// What each output has lost by itself.
    #[must_use]
    pub fn losses(&self) -> &[Loss] {
        &self.losses
    }

    /// Events that wait for the first output.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }
}

impl Writer {
    /// Waits until everything that was recorded is written, or can't be within [`LAST_WRITES`]. All
    /// recorders must be dropped before.
    pub fn finish(self) {
        let until = Instant::now() + LAST_WRITES;
        for ending in self.endings {
            ending.wait(until);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{
            Mutex,
            mpsc::{Receiver, Sender, channel},
        },
        thread,
    };

    use super::*;
    use crate::{
        policy::Mode,
        record::{
            Started, Stopped,
            output::{Format, Lines as Written},
            queue::QUEUE,
        },
    };

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Does not return from its first write before it is told to.
    struct Stuck {
        entered: Sender<()>,
        release: Receiver<()>,
        out: Shared,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ended = self.entered.send(());
            let _ended = self.release.recv();
            self.out.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines(out: &Shared) -> Vec<Event> {
        let bytes = out.0.lock().unwrap().clone();
        String::from_utf8(bytes)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn everything_recorded_is_written_in_order() {
        let out = Shared::default();
        let (recorder, writer) = Recorder::start("h", Outputs::to(out.clone())).unwrap();
        for count in 0..100 {
            recorder.record(Kind::EventsLost { count });
        }
        drop(recorder);
        writer.finish();
        let kinds: Vec<Kind> = lines(&out).into_iter().map(|event| event.kind).collect();
        let expected: Vec<Kind> = (0..100).map(|count| Kind::EventsLost { count }).collect();
        assert_eq!(kinds, expected);
    }

    #[test]
    fn what_waits_is_bounded_in_bytes_too() {
        let (entered, has_entered) = channel();
        let (release, released) = channel();
        let out = Shared::default();
        let stuck = Stuck {
            entered,
            release: released,
            out: out.clone(),
        };
        let (recorder, writer) = Recorder::start("h", Outputs::to(stuck)).unwrap();
        let megabyte = || {
            Kind::Started(Started {
                version: String::new(),
                mode: Mode::Audit,
                cgroup: "x".repeat(1 << 20),
                listeners: Vec::new(),
                on_failure: String::new(),
                backstop: true,
                uplinks: Vec::new(),
                adopted: false,
                counts: crate::record::Counts::default(),
                took_over_from: None,
            })
        };
        recorder.record(megabyte());
        has_entered.recv().unwrap();
        for _ in 0..20 {
            recorder.record(megabyte());
        }
        assert_eq!(
            recorder.lost(),
            20 - 14,
            "one is being written, 14 fit beside it"
        );
        drop(release);
        drop(recorder);
        writer.finish();
        assert_eq!(lines(&out).len(), 1 + 14 + 1);
    }

    #[test]
    fn events_that_find_no_place_are_counted_and_reported() {
        let out = Shared::default();
        let (entered, has_entered) = channel();
        let (release, released) = channel();
        let stuck = Stuck {
            entered,
            release: released,
            out: out.clone(),
        };
        let (recorder, writer) = Recorder::start("h", Outputs::to(stuck)).unwrap();
        let event = || Kind::Stopped(Stopped::default());
        recorder.record(event());
        has_entered.recv().unwrap();
        let surplus = 10;
        for _ in 0..QUEUE + surplus {
            recorder.record(event());
        }
        assert_eq!(recorder.lost(), surplus as u64);
        drop(release);
        drop(recorder);
        writer.finish();
        let events = lines(&out);
        assert_eq!(events.len(), 1 + 1 + QUEUE);
        assert_eq!(
            events[1].kind,
            Kind::EventsLost {
                count: surplus as u64
            }
        );
    }

    #[test]
    fn an_output_that_is_stuck_holds_up_nobody_else() {
        let (log, slow) = (Shared::default(), Shared::default());
        let (entered, has_entered) = channel();
        let (release, released) = channel();
        let stuck = Stuck {
            entered,
            release: released,
            out: slow.clone(),
        };
        let outputs =
            Outputs::to(log.clone()).with("ocsf", Written::to(Format::Json, Box::new(stuck)));
        let (recorder, writer) = Recorder::start("h", outputs).unwrap();
        let event = || Kind::Stopped(Stopped::default());
        recorder.record(event());
        has_entered.recv().unwrap();
        let surplus = 10;
        let all = 1 + QUEUE + surplus;
        for _ in 1..all {
            recorder.record(event());
            while recorder.waiting() > QUEUE / 2 {
                thread::yield_now();
            }
        }
        let begun = Instant::now();
        while lines(&log).len() < all {
            assert!(begun.elapsed() < LAST_WRITES, "the log waits, too");
            thread::sleep(Duration::from_millis(10));
        }
        let lost: Vec<_> = recorder
            .losses()
            .iter()
            .map(|loss| (loss.output, loss.events.load(Relaxed)))
            .collect();
        assert_eq!(lost, [("events", 0), ("ocsf", surplus as u64)]);
        assert_eq!(recorder.lost(), 0, "the log has everything");
        drop(release);
        drop(recorder);
        writer.finish();
        let events = lines(&slow);
        assert_eq!(events.len(), 1 + 1 + QUEUE);
        let count = surplus as u64;
        assert_eq!(events[1].kind, Kind::EventsLost { count });
    }
}
