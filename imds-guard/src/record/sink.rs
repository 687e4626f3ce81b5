//! Events leave the request path through a bounded queue and are written by a thread of their own.

use std::{
    io::{self, BufWriter, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
};

use super::{Event, Kind};

/// Events that may wait to be written; more are counted as lost.
const QUEUE: usize = 8192;

/// Hands events to the writer. Never blocks, never fails: what cannot be queued is counted.
#[derive(Clone)]
pub struct Recorder {
    queue: SyncSender<Event>,
    host: Arc<str>,
    lost: Arc<Lost>,
}

/// Ends the writing thread.
pub struct Writer {
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Lost {
    unreported: AtomicU64,
    total: AtomicU64,
}

impl Recorder {
    /// Starts the writing thread. It ends when the last recorder is dropped and everything is
    /// written.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(host: &str, out: impl Write + Send + 'static) -> io::Result<(Self, Writer)> {
        let (queue, events) = sync_channel(QUEUE);
        let lost = Arc::new(Lost::default());
        let host: Arc<str> = host.into();
        let thread = thread::Builder::new().name("events".into()).spawn({
            let (lost, host) = (Arc::clone(&lost), Arc::clone(&host));
            move || write_all(&events, out, &lost, &host)
        })?;
        Ok((Self { queue, host, lost }, Writer { thread }))
    }

    /// Records that something happened just now.
    pub fn record(&self, kind: Kind) {
        let event = Event::now(&self.host, kind);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.queue.try_send(event)
        {
            self.lost.add(1);
        }
    }

    /// Events lost since the start.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.total.load(Relaxed)
    }
}

impl Writer {
    /// Waits until everything that was recorded is written. All recorders must be dropped before.
    pub fn finish(self) {
        if self.thread.join().is_err() {
            log::error!("the event writer ended early; some events are missing");
        }
    }
}

impl Lost {
    fn add(&self, count: u64) {
        self.unreported.fetch_add(count, Relaxed);
        self.total.fetch_add(count, Relaxed);
    }
}

fn write_all(events: &Receiver<Event>, out: impl Write, lost: &Lost, host: &str) {
    let mut out = BufWriter::new(out);
    let mut failed = false;
    loop {
        // Batches while more is waiting, and lets readers see an event at once when nothing is.
        let event = match events.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                report(&mut failed, out.flush());
                match events.recv() {
                    Ok(event) => event,
                    Err(_) => break,
                }
            }
        };
        match lost.unreported.swap(0, Relaxed) {
            0 => {}
            count => report(
                &mut failed,
                write(&mut out, &Event::now(host, Kind::EventsLost { count })),
            ),
        }
        let written = write(&mut out, &event);
        if written.is_err() {
            lost.add(1);
        }
        report(&mut failed, written);
    }
    report(&mut failed, out.flush());
}

fn write(out: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// Says once that events cannot be written, and once that they can again.
fn report(failed: &mut bool, result: io::Result<()>) {
    match result {
        Ok(()) if *failed => log::warn!("events can be written again"),
        Err(error) if !*failed => {
            log::error!("events cannot be written and are counted as lost: {error}");
        }
        _ => return,
    }
    *failed = !*failed;
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        mpsc::{self, Sender},
    };

    use super::*;
    use crate::record::Stopped;

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
        let (recorder, writer) = Recorder::start("h", out.clone()).unwrap();
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
    fn events_that_find_no_place_are_counted_and_reported() {
        let out = Shared::default();
        let (entered, has_entered) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let stuck = Stuck {
            entered,
            release: released,
            out: out.clone(),
        };
        let (recorder, writer) = Recorder::start("h", stuck).unwrap();
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
