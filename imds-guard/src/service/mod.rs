//! The composition root: takes what it needs from the system, gives up what it no longer needs, serves
//! until it is told to stop, and hands over or leaves nothing behind.

mod files;
mod handover;
mod host;
mod metrics;
mod outputs;
mod privileges;
mod steering;
mod watch;

use std::{net::TcpListener, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    config::{Configuration, Layers, OnStop, Settings, Uplinks},
    control::{Desk, Order, Server, What},
    failure::Failure,
    identify::{DIGESTERS, READERS, Resolver, workload::Workloads},
    kernel::{Charge, Control, Counters, Heartbeat, Kernel, Maps, Packets, Pins, probe},
    net::Addresses,
    proxy::{Acceptor, Backlog, Fallbacks, Proxy, Rates, Upstream, adopt, listen},
    record::{ALIVE, Counts, Kind, Recorder, Started, Stopped, Tally, Unwatched},
    tokens::Tokens,
};
use files::FileWatch;
use steering::Steering;
use watch::UplinkWatch;

/// Threads that serve connections.
const WORKERS: usize = 2;

/// Threads that read the state files of containers.
const LOOKUPS: usize = 8;

/// How long connections may wait for the next daemon while systemd keeps the listeners.
const SUCCESSION: Duration = Duration::from_secs(30);

/// Orders that may wait for the main loop.
const ORDERS: usize = 8;

/// Runs the guard until SIGTERM or SIGINT. `replace` takes over from one that is running.
///
/// # Errors
/// Why it could not start; see [`Failure`].
pub fn run(layers: Layers, replace: bool) -> Result<(), Failure> {
    let configuration = layers.read()?;
    let settings = &Settings {
        replace,
        ..configuration.settings()?
    };
    probe::capabilities()?;
    let release = probe::kernel()?;
    probe::pid_namespace()?;
    let cgroup = probe::cgroup(settings.cgroup.as_deref())?;
    log::debug!("kernel {release}, cgroup {}", cgroup.display());
    let pins = Pins::open(&settings.pins)?;
    let post = Post::take(&pins, settings.replace)?;
    let served = serve_from((layers, configuration, settings), &cgroup, &pins, post);
    if served.is_err() && pins.links().is_empty() {
        // Maps without programs are of no use to anybody.
        if let Err(error) = pins.remove_all() {
            log::warn!("pins stay behind: {error}");
        }
    }
    served
}

/// The charge of the pins, and what the daemon that had it hands over.
struct Post {
    _charge: Charge,
    listeners: Vec<TcpListener>,
    /// A daemon that still runs, and is to end.
    takes_over_from: Option<u32>,
}

impl Post {
    fn take(pins: &Pins, replace: bool) -> Result<Self, Failure> {
        let listeners = handover::from_systemd()?;
        if let Some(charge) = pins.take_charge()? {
            return Ok(Self {
                _charge: charge,
                listeners,
                takes_over_from: None,
            });
        }
        let pid = Control::open(pins).map_or(0, |control| control.get().owner);
        if !replace {
            return Err(Failure::Running { pid });
        }
        let legacy = handover::from_process(pid, pins)?;
        Ok(Self {
            _charge: legacy.charge,
            listeners: legacy.listeners,
            takes_over_from: Some(legacy.from),
        })
    }
}

fn serve_from(
    (layers, configuration, settings): (Layers, Configuration, &Settings),
    cgroup: &Path,
    pins: &Pins,
    mut post: Post,
) -> Result<(), Failure> {
    let host = host::this();
    let outputs = outputs::open(&settings.outputs, &host)?;
    let metrics = settings.metrics.as_ref().map(metrics::Door::open);
    let metrics = metrics.transpose()?;
    let (mut addresses, ipv6) = Addresses::claim(settings)?;
    let listeners = listeners(settings, ipv6, &mut post.listeners)?;
    let netns_cookie = netns_cookie(&listeners);
    let mut kernel = Kernel::load(settings, ipv6, netns_cookie, pins)?;
    let maps = kernel.take_maps()?;
    for listener in &listeners {
        kernel.shield(listener)?;
    }
    // Others' are not ours to remove if this start fails.
    let added = addresses.bits() | maps.control.get().addresses;
    if post.takes_over_from.is_none() {
        maps.exempt.forget_all();
    }
    privileges::raise_file_limit(settings.limits.connections);
    privileges::reduce().context("privileges cannot be given up")?;

    // After the privileges, as threads inherit them.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(READERS + DIGESTERS + LOOKUPS + metrics::SCRAPES)
        .enable_all()
        .build()
        .context("the threads cannot be started")?;
    let (recorder, writer) =
        Recorder::start(host, outputs).context("the event writer cannot be started")?;
    let hierarchy = probe::cgroup2_mount()?;
    let workloads = {
        let _within = runtime.enter();
        Workloads::new(settings.workloads.clone())
    };
    let resolver = Arc::new(Resolver::new(
        "/proc",
        ("/etc/passwd", "/etc/group"),
        hierarchy,
        workloads,
        netns_cookie,
        settings.command_lines,
    ));
    let tokens = Arc::new(Tokens::new(&settings.run_dir));
    let steering = Steering::new(
        layers,
        configuration,
        settings.clone(),
        Arc::clone(&tokens),
        recorder.clone(),
    );
    let guard = Guard {
        settings,
        steering,
        tokens,
        cgroup,
        pins,
        kernel,
        resolver,
        recorder: recorder.clone(),
        metrics,
    };
    let ended = runtime.block_on(guard.serve(maps, listeners, post.takes_over_from, added));
    // Ends every task, and with them the last recorders. A thread that reads the command line of a
    // process that does not let it is left behind.
    runtime.shutdown_timeout(settings.limits.drain);
    drop(recorder);
    writer.finish();
    match ended? {
        Ended::Detached => addresses.take_on(settings.listeners, added),
        Ended::Kept | Ended::HandedOver => addresses.leave(),
    }
    Ok(())
}

/// What became of the kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// They are gone.
    Detached,
    /// They stay, and nobody is there.
    Kept,
    /// Another daemon has them.
    HandedOver,
}

/// Everything that lasts from the start to the end.
struct Guard<'a> {
    settings: &'a Settings,
    steering: Steering,
    tokens: Arc<Tokens>,
    cgroup: &'a Path,
    pins: &'a Pins,
    kernel: Kernel,
    resolver: Arc<Resolver>,
    recorder: Recorder,
    metrics: Option<metrics::Door>,
}

impl Guard<'_> {
    async fn serve(
        mut self,
        maps: Maps,
        listeners: Vec<TcpListener>,
        takes_over_from: Option<u32>,
        addresses: u32,
    ) -> Result<Ended, Failure> {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
        let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be caught")?;
        let settings = self.settings;
        let Maps {
            flows,
            exempt,
            counters,
            mut control,
            alive_until,
            packets,
            fill,
        } = maps;
        let counters = Arc::new(counters);
        let tally = Arc::new(Tally::default());
        let mut acceptor = Acceptor::new(Proxy {
            flows: Box::new(flows),
            resolver: Arc::clone(&self.resolver),
            in_force: self.steering.in_force(),
            rates: Rates::default(),
            tokens: Arc::clone(&self.tokens),
            fallbacks: Fallbacks::default(),
            upstream: Upstream::new(settings.upstreams, exempt, settings.limits),
            recorder: self.recorder.clone(),
            tally: Arc::clone(&tally),
            limits: settings.limits,
        });
        let names = listeners
            .iter()
            .filter_map(|listener| Some(listener.local_addr().ok()?.to_string()))
            .collect();
        let stored = handover::store(&listeners);
        for listener in listeners {
            acceptor
                .serve(listener)
                .context("a listener cannot be watched")?;
        }
        self.kernel.forward_log()?;
        let mut packets = Packets::watch(packets).context("the packets cannot be watched")?;
        let mut uplinks = UplinkWatch::start(&settings.uplinks)?;

        let heartbeat = Heartbeat::start(alive_until)?;
        control.set(self.steering.control(addresses))?;
        // Last: whoever is redirected is served.
        let adopted = self.pins.links().iter().any(|name| name == "connect4");
        let before = counters.read();
        self.kernel.attach(self.cgroup, self.pins)?;
        let mut guarded = uplinks.follow(&mut self.kernel, self.pins).await;
        let mut files = FileWatch::start(&self.steering.layers().file);
        let (sender, mut orders) = mpsc::channel(ORDERS);
        let server = self.open_desk(&tally, &counters, sender);
        let metrics = match self.metrics.take() {
            Some(door) => Some(
                door.serve(metrics::Sources {
                    in_force: self.steering.in_force(),
                    tally: Arc::clone(&tally),
                    recorder: self.recorder.clone(),
                    counters: Arc::clone(&counters),
                    maps: fill,
                })
                .context("the metrics cannot be served")?,
            ),
            None => None,
        };
        self.announce(names, guarded.clone(), (adopted, before), takes_over_from);
        self.steering.notice_expiry();
        handover::tell_systemd(NotifyState::Ready);

        if let Some(pid) = takes_over_from {
            log::info!("taking over from pid {pid}");
            let pid = i32::try_from(pid).context("a pid beyond all bounds")?;
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM) {
                log::warn!("pid {pid} cannot be told to stop: {error}");
            }
        }
        let mut alive = tokio::time::interval_at(tokio::time::Instant::now() + ALIVE, ALIVE);
        loop {
            tokio::select! {
                _ = alive.tick() => {
                    self.recorder.record(Kind::Alive(self.has_seen(&counters, &guarded)));
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => self.reload(&mut control),
                () = files.changed() => self.reload(&mut control),
                () = self.steering.due() => self.steering.catch_up(&mut control),
                Some(order) = orders.recv() => {
                    if self.obey(order, &mut control) {
                        break;
                    }
                }
                () = uplinks.changed() => {
                    guarded = uplinks.follow(&mut self.kernel, self.pins).await;
                }
                seen = packets.next(|packet| {
                    let packet = watch::describe(packet, &self.resolver);
                    tally.packet(&packet);
                    self.recorder.record(Kind::Packet(packet));
                }) => seen.context("the packets are not watched any more")?,
            }
        }
        handover::tell_systemd(NotifyState::Stopping);
        drop((server, orders));
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        let ended = self
            .stop(acceptor, heartbeat, &control, &uplinks, stored)
            .await?;
        self.recorder
            .record(Kind::Stopped(self.has_seen(&counters, &guarded)));
        Ok(ended)
    }

    /// What has happened up to now.
    fn has_seen(&self, counters: &Counters, uplinks: &[String]) -> Stopped {
        let watched = [
            (Unwatched::OtherCgroups, probe::is_host_root(self.cgroup)),
            (Unwatched::Backstop, self.steering.settings().backstop),
            (Unwatched::Perimeter, !uplinks.is_empty()),
        ];
        let unwatched = watched.into_iter().filter(|(_, is_watched)| !is_watched);
        Stopped {
            counts: counters.read(),
            events_lost: self.recorder.lost(),
            pid: std::process::id(),
            unwatched: unwatched.map(|(what, _)| what).collect(),
        }
    }

    fn open_desk(
        &self,
        tally: &Arc<Tally>,
        counters: &Arc<Counters>,
        orders: mpsc::Sender<Order>,
    ) -> Option<Server> {
        let desk = Desk {
            in_force: self.steering.in_force(),
            standing: self.steering.standing(),
            resolver: Arc::clone(&self.resolver),
            tally: Arc::clone(tally),
            recorder: self.recorder.clone(),
            counters: Arc::clone(counters),
            orders,
        };
        let run_dir = &self.settings.run_dir;
        Server::start(run_dir, desk)
            .inspect_err(|error| {
                log::error!(
                    "there is no control socket in {}, so status and mode do not work: {error}",
                    run_dir.display()
                );
            })
            .ok()
    }

    /// On a signal, or as a file has changed.
    fn reload(&mut self, control: &mut Control) {
        // What is wrong is logged and recorded.
        let _told = self.steering.reload(None, control);
    }

    /// Does what the control socket was told. Returns whether that was to end.
    fn obey(&mut self, order: Order, control: &mut Control) -> bool {
        let by = Some(order.by);
        let outcome = match order.what {
            What::Reload => self.steering.reload(by, control),
            What::Mode(mode, lasts) => self.steering.switch(mode, lasts, by, control),
            What::Drain => Ok(serde_json::json!({})),
        };
        // Whoever asked may have gone.
        let _heard = order.reply.send(outcome);
        order.what == What::Drain
    }

    fn announce(
        &self,
        listeners: Vec<String>,
        uplinks: Vec<String>,
        (adopted, counts): (bool, Counts),
        took_over_from: Option<u32>,
    ) {
        let settings = self.settings;
        let mode = settings.policy.mode;
        log::info!("watching {} in {mode} mode", self.cgroup.display());
        if uplinks.is_empty() && settings.uplinks != Uplinks::None {
            log::warn!(
                "no uplink is guarded: packets of virtual machines and packet sockets pass; name the \
                 interface that leads out with --uplink"
            );
        }
        self.recorder.record(Kind::Started(Started {
            version: env!("CARGO_PKG_VERSION").into(),
            mode,
            cgroup: self.cgroup.display().to_string(),
            listeners,
            on_failure: steering::when_gone(settings).into(),
            backstop: settings.backstop,
            uplinks,
            adopted,
            counts,
            took_over_from,
        }));
    }

    async fn stop(
        &self,
        acceptor: Acceptor,
        heartbeat: Heartbeat,
        control: &Control,
        uplinks: &UplinkWatch,
        stored: bool,
    ) -> Result<Ended, Failure> {
        let drain = self.settings.limits.drain;
        let settings = self.steering.settings();
        log::info!("stopping: requests in flight may take up to {drain:?}");
        let (ended, backlog) = if !control.is_mine() {
            drop(heartbeat);
            (Ended::HandedOver, Backlog::Leave)
        } else if settings.on_stop() == OnStop::Detach {
            // First: nobody is redirected to a listener that is about to close. Whoever was redirected
            // before still needs the other programs.
            for name in ["connect4", "connect6"] {
                self.pins.remove(name).context("a program stays attached")?;
            }
            (Ended::Detached, Backlog::Serve)
        } else if stored {
            heartbeat.stop(SUCCESSION);
            (Ended::Kept, Backlog::Leave)
        } else {
            log::info!(
                "the kernel programs stay and follow --on-failure {:?}; `imds-guard detach` removes them",
                settings.on_failure()
            );
            heartbeat.stop(Duration::ZERO);
            (Ended::Kept, Backlog::Serve)
        };
        let cut_off = acceptor.drain(backlog).await;
        if cut_off > 0 {
            log::warn!("{cut_off} connections were cut off");
        }
        if ended == Ended::Detached {
            self.pins.remove_all().context("pins stay behind")?;
            uplinks.remove_filters().await;
        }
        Ok(ended)
    }
}

/// The listeners: those that were handed over, and new ones for the rest.
fn listeners(
    settings: &Settings,
    ipv6: bool,
    handed_over: &mut Vec<TcpListener>,
) -> Result<Vec<TcpListener>, Failure> {
    let [v4, v6] = settings.listeners.both();
    let mut listeners = Vec::new();
    for address in if ipv6 { vec![v4, v6] } else { vec![v4] } {
        listeners.push(match handover::take(handed_over, address) {
            Some(listener) => adopt(listener, &settings.limits)
                .with_context(|| format!("the listener on {address} cannot be taken over"))?,
            None => listen(address, &settings.limits)?,
        });
    }
    handover::none_left(handed_over)?;
    Ok(listeners)
}

/// Cookie of the network namespace that the listeners are in, from Linux 5.14 on.
fn netns_cookie(listeners: &[TcpListener]) -> Option<u64> {
    listeners
        .first()
        .and_then(|listener| privileges::netns_cookie(listener).ok())
}
