//! Events leave the request path through a bounded queue and are written by a thread of their own.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::broadcast;

use super::{
    Event, Kind,
    output::{Loss, Outputs, line},
};

/// Events that may wait to be written, by number and by bytes; more are counted as lost.
const QUEUE: usize = 8192;
const QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// Events that a listener may be behind.
const LISTENED: usize = 4096;

/// How often outputs are flushed, whether or not more is waiting.
const SETTLE: Duration = Duration::from_secs(1);

/// How long the last events may take to be written: whoever reads them may have stopped doing so.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// Hands events to the writer. Never blocks, never fails: what cannot be queued is counted.
#[derive(Clone)]
pub struct Recorder {
    queue: SyncSender<(Event, Vec<u8>)>,
    host: Arc<str>,
    backlog: Arc<Backlog>,
    listeners: broadcast::Sender<Arc<[u8]>>,
    losses: Arc<[Loss]>,
}

/// Events as they happen, each a line of JSON. Whoever is too slow misses some, and is told how many.
pub type Lines = broadcast::Receiver<Arc<[u8]>>;

/// Ends the writing thread.
pub struct Writer {
    ended: Receiver<()>,
}

/// What waits to be written, and what could not wait.
#[derive(Default)]
struct Backlog {
    bytes: AtomicUsize,
    events: AtomicUsize,
    unreported: AtomicU64,
    lost: AtomicU64,
}

impl Recorder {
    /// Starts the writing thread. It ends when the last recorder is dropped and everything is
    /// written.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(host: &str, mut outputs: Outputs) -> io::Result<(Self, Writer)> {
        let (queue, lines) = sync_channel(QUEUE);
        let (ends, ended) = channel();
        let backlog = Arc::new(Backlog::default());
        let losses = outputs.losses().into();
        thread::Builder::new().name("events".into()).spawn({
            let backlog = Arc::clone(&backlog);
            move || {
                write_all(&lines, &mut outputs, &backlog);
                drop(outputs);
                // Dropped, and so noticed, also by a panic.
                drop(ends);
            }
        })?;
        let recorder = Self {
            queue,
            host: host.into(),
            backlog,
            listeners: broadcast::Sender::new(LISTENED),
            losses,
        };
        Ok((recorder, Writer { ended }))
    }

    /// Records that something happened just now.
    pub fn record(&self, kind: Kind) {
        let event = Event::now(&self.host, kind);
        let Some(line) = line(&event) else {
            return self.backlog.lose(1);
        };
        if self.listeners.receiver_count() > 0 {
            // Nobody may have stayed.
            let _heard = self.listeners.send(Arc::from(line.as_slice()));
        }
        let bytes = line.len();
        let waiting = self.backlog.bytes.fetch_add(bytes, Relaxed);
        self.backlog.events.fetch_add(1, Relaxed);
        if waiting + bytes > QUEUE_BYTES || self.queue.try_send((event, line)).is_err() {
            self.backlog.take(bytes);
            self.backlog.lose(1);
        }
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
        self.backlog.lost.load(Relaxed)
    }

    /// What each output has lost by itself.
    #[must_use]
    pub fn losses(&self) -> &[Loss] {
        &self.losses
    }

    /// Events that wait to be written.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.backlog.events.load(Relaxed)
    }
}

impl Writer {
    /// Waits until everything that was recorded is written, or can't be within [`LAST_WRITES`]. All
    /// recorders must be dropped before.
    pub fn finish(self) {
        if self.ended.recv_timeout(LAST_WRITES) == Err(RecvTimeoutError::Timeout) {
            log::error!("the last events are lost: nobody takes them within {LAST_WRITES:?}");
        }
    }
}

impl Backlog {
    fn take(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.events.fetch_sub(1, Relaxed);
    }

    fn lose(&self, count: u64) {
        self.unreported.fetch_add(count, Relaxed);
        self.lost.fetch_add(count, Relaxed);
    }
}

fn write_all(queue: &Receiver<(Event, Vec<u8>)>, outputs: &mut Outputs, backlog: &Backlog) {
    let mut settled = Instant::now();
    loop {
        // Batches while more is waiting, and lets readers see an event at once when nothing is.
        let (event, line) = match queue.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                outputs.flush(Instant::now());
                settled = Instant::now();
                match queue.recv_timeout(SETTLE) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
        };
        if settled.elapsed() > SETTLE {
            outputs.flush(Instant::now());
            settled = Instant::now();
        }
        let lost = backlog.unreported.swap(0, Relaxed);
        outputs.missed(lost);
        outputs.write(event, &line);
        backlog.take(line.len());
    }
    outputs.finish();
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Mutex, mpsc::Sender},
    };

    use super::*;
    use crate::{
        policy::Mode,
        record::{Started, Stopped},
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
}
