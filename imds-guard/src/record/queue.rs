//! A bounded queue of events, and the thread that takes them from it.

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

use super::{Event, output::line};

/// Events that may wait, by number and by bytes; more are counted as lost.
pub const QUEUE: usize = 8192;
const QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// How often what takes events is flushed, whether or not more is waiting.
const SETTLE: Duration = Duration::from_secs(1);

/// An event as all outputs share it.
pub struct Recorded {
    /// The event.
    pub event: Event,
    /// Its JSON, with a line end.
    pub line: Vec<u8>,
}

/// What events are taken for, on the queue's thread.
pub trait Taker: Send + 'static {
    /// So many did not come, as they found no place.
    fn missed(&mut self, events: u64);

    /// The next one.
    fn take(&mut self, recorded: Arc<Recorded>);

    /// Nothing more is waiting, or a second has gone by.
    fn flush(&mut self);

    /// Nothing more will come.
    fn finish(&mut self);
}

/// Never blocks, never fails: what cannot wait is counted. The thread ends when the last clone is
/// dropped and everything is taken.
#[derive(Clone)]
pub struct Queue {
    sender: SyncSender<Arc<Recorded>>,
    backlog: Arc<Backlog>,
}

/// The end of a queue's thread.
pub struct Ending {
    name: &'static str,
    ended: Receiver<()>,
}

/// What waits, and what could not wait.
struct Backlog {
    bytes: AtomicUsize,
    events: AtomicUsize,
    untold: AtomicU64,
    lost: Arc<AtomicU64>,
}

impl Recorded {
    /// An event, and its JSON; `None` if it has none.
    pub fn new(event: Event) -> Option<Arc<Self>> {
        let line = line(&event)?;
        Some(Arc::new(Self { event, line }))
    }
}

impl Queue {
    /// Starts the thread. `lost` counts what finds no place.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn start(
        name: &'static str,
        lost: Arc<AtomicU64>,
        mut taker: impl Taker,
    ) -> io::Result<(Self, Ending)> {
        let (sender, queue) = sync_channel(QUEUE);
        let (ends, ended) = channel();
        let backlog = Arc::new(Backlog {
            bytes: AtomicUsize::new(0),
            events: AtomicUsize::new(0),
            untold: AtomicU64::new(0),
            lost,
        });
        thread::Builder::new().name(name.into()).spawn({
            let backlog = Arc::clone(&backlog);
            move || {
                take_all(&queue, &mut taker, &backlog);
                drop(taker);
                // Dropped, and so noticed, also by a panic.
                drop(ends);
            }
        })?;
        Ok((Self { sender, backlog }, Ending { name, ended }))
    }

    /// Puts an event at the end.
    pub fn put(&self, recorded: Arc<Recorded>) {
        let bytes = recorded.line.len();
        let calls = recorded.event.calls();
        let waiting = self.backlog.bytes.fetch_add(bytes, Relaxed);
        self.backlog.events.fetch_add(1, Relaxed);
        if waiting + bytes > QUEUE_BYTES || self.sender.try_send(recorded).is_err() {
            self.backlog.leave(bytes);
            self.lose(calls);
        }
    }

    /// Counts events that cannot be put here.
    pub fn lose(&self, events: u64) {
        self.backlog.lost.fetch_add(events, Relaxed);
        self.missed(events);
    }

    /// Tells of events that were lost, and counted, before they came here.
    pub fn missed(&self, events: u64) {
        self.backlog.untold.fetch_add(events, Relaxed);
    }

    /// Events that found no place.
    pub fn lost(&self) -> u64 {
        self.backlog.lost.load(Relaxed)
    }

    /// Events that wait.
    pub fn waiting(&self) -> usize {
        self.backlog.events.load(Relaxed)
    }
}

impl Ending {
    /// Waits until everything is taken, but no longer than that.
    pub fn wait(self, until: Instant) {
        let patience = until.saturating_duration_since(Instant::now());
        if self.ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            log::error!("{}: the last events are lost: nobody takes them", self.name);
        }
    }
}

impl Backlog {
    fn leave(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.events.fetch_sub(1, Relaxed);
    }
}

fn take_all(queue: &Receiver<Arc<Recorded>>, taker: &mut impl Taker, backlog: &Backlog) {
    let mut settled = Instant::now();
    loop {
        // Batches while more is waiting, and lets readers see an event at once when nothing is.
        let recorded = match queue.try_recv() {
            Ok(recorded) => recorded,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                taker.flush();
                settled = Instant::now();
                match queue.recv_timeout(SETTLE) {
                    Ok(recorded) => recorded,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
        };
        if settled.elapsed() > SETTLE {
            taker.flush();
            settled = Instant::now();
        }
        let bytes = recorded.line.len();
        taker.missed(backlog.untold.swap(0, Relaxed));
        taker.take(recorded);
        backlog.leave(bytes);
    }
    taker.finish();
}
