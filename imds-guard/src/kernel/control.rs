//! What the daemon tells the kernel programs while they run, and that it is there at all.

use std::{
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use aya::{
    Pod,
    maps::{Array, Map, MapData},
};
use imds_guard_common::control;
use nix::time::{ClockId, clock_gettime};

use super::Pins;

/// How often the daemon says that it is there.
const BEAT: Duration = Duration::from_millis(100);

/// For how long that counts: without a daemon, the kernel programs follow `--on-failure` within a
/// second.
const COUNTS_FOR: Duration = Duration::from_millis(900);

/// The settings of the kernel programs.
pub struct Control(pub(super) Array<MapData, control::Control>);

impl Control {
    /// That of pinned programs.
    ///
    /// # Errors
    /// The map is not there.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self(array(pins, "CONTROL")?))
    }

    /// What is in force.
    #[must_use]
    pub fn get(&self) -> control::Control {
        self.0.get(&0, 0).unwrap_or_default()
    }

    /// Puts new settings in force, all at once.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set(&mut self, control: control::Control) -> anyhow::Result<()> {
        self.0
            .set(0, control, 0)
            .context("the kernel programs cannot be told what to do")
    }

    /// Whether this process is in charge; otherwise another one has taken over.
    #[must_use]
    pub fn is_mine(&self) -> bool {
        self.get().owner == std::process::id()
    }
}

/// Until when a daemon vouches that it is there.
pub struct AliveUntil(pub(super) Array<MapData, u64>);

impl AliveUntil {
    /// That of pinned programs.
    ///
    /// # Errors
    /// The map is not there.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self(array(pins, "ALIVE_UNTIL")?))
    }

    fn put_off(&mut self, by: Duration) -> anyhow::Result<()> {
        let until = now()?.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX));
        self.0.set(0, until, 0).context("no sign of life")
    }

    /// Whether a daemon was there a moment ago.
    #[must_use]
    pub fn is_attended(&self) -> bool {
        let until = self.0.get(&0, 0).unwrap_or_default();
        now().is_ok_and(|now| now < until)
    }
}

fn array<T: Pod>(pins: &Pins, name: &str) -> anyhow::Result<Array<MapData, T>> {
    let map = MapData::from_pin(pins.map(name)).with_context(|| format!("map {name}"))?;
    Ok(Array::try_from(Map::Array(map))?)
}

/// `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` has it.
fn now() -> anyhow::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("no clock")?;
    Ok(u64::try_from(now.tv_sec())? * 1_000_000_000 + u64::try_from(now.tv_nsec())?)
}

/// Says that the daemon is there, from a thread of its own, until it is dropped or the process ends.
pub struct Heartbeat {
    stop: Option<Sender<Duration>>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// The first sign of life is given before this returns.
    ///
    /// # Errors
    /// The map cannot be written, or the thread not be started.
    pub fn start(mut alive: AliveUntil) -> anyhow::Result<Self> {
        alive.put_off(COUNTS_FOR)?;
        let (stop, stopped) = channel();
        let thread = thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                loop {
                    let last = match stopped.recv_timeout(BEAT) {
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return,
                        Ok(by) => Some(by),
                    };
                    if let Err(error) = alive.put_off(last.unwrap_or(COUNTS_FOR)) {
                        log::error!("{error:#}");
                    }
                    if last.is_some() {
                        return;
                    }
                }
            })
            .context("the heartbeat cannot be started")?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The last sign of life, for so long: until a successor is expected to be there.
    pub fn stop(mut self, counts_for: Duration) {
        if let Some(stop) = self.stop.take() {
            let _ended = stop.send(counts_for);
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the heartbeat had ended early");
        }
    }
}
