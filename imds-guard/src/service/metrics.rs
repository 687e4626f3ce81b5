//! Serves metrics as Prometheus reads them, on loopback or a Unix socket.

use std::{
    fmt, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::{
    config::MetricsAt,
    failure::Failure,
    kernel::{Counters, MapFill},
    policy::Mode,
    proxy::InForce,
    record::{Recorder, Tally, output::Loss},
};

/// Scrapes at once, and those that may wait.
pub const SCRAPES: usize = 4;
const BACKLOG: i32 = 16;
/// How long a scrape may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The text format of Prometheus that OpenMetrics grew out of.
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What metrics are read from.
pub struct Sources {
    pub in_force: Arc<InForce>,
    pub tally: Arc<Tally>,
    pub recorder: Recorder,
    pub counters: Arc<Counters>,
    pub maps: MapFill,
}

/// The listener, bound.
pub enum Door {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Door {
    /// Binds it.
    ///
    /// # Errors
    /// The port is busy, or the socket cannot be made.
    pub fn open(at: &MetricsAt) -> Result<Self, Failure> {
        let failure = |error: io::Error| {
            Failure::Settings(match at {
                MetricsAt::Address(address) => format!("metrics: {address}: {error}"),
                MetricsAt::Socket(path) => format!("metrics: {}: {error}", path.display()),
            })
        };
        match at {
            MetricsAt::Address(address) => {
                let listener = shared(*address).map_err(failure)?;
                Ok(Self::Tcp(listener))
            }
            MetricsAt::Socket(path) => Ok(Self::Unix(socket(path).map_err(failure)?)),
        }
    }

    /// Serves until the task is aborted. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The listener cannot be watched.
    pub fn serve(self, sources: Sources) -> io::Result<JoinHandle<()>> {
        let mut registry = Registry::with_prefix("imds_guard");
        sources.tally.metrics().register(&mut registry);
        registry.register_collector(Box::new(Read(sources)));
        let registry = Arc::new(registry);
        Ok(match self {
            Self::Tcp(listener) => {
                let listener = TcpListener::from_std(listener)?;
                tokio::spawn(async move {
                    let places = Arc::new(Semaphore::new(SCRAPES));
                    loop {
                        let taken = listener.accept().await;
                        taken_in(taken.map(|(stream, _)| stream), &registry, &places).await;
                    }
                })
            }
            Self::Unix(listener) => {
                let listener = UnixListener::from_std(listener)?;
                tokio::spawn(async move {
                    let places = Arc::new(Semaphore::new(SCRAPES));
                    loop {
                        let taken = listener.accept().await;
                        taken_in(taken.map(|(stream, _)| stream), &registry, &places).await;
                    }
                })
            }
        })
    }
}

/// One that the next guard can listen on, too, before this one has ended.
fn shared(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // The kernel lets only sockets of the same user share a port.
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// For root alone, in place of one that an earlier guard has left.
fn socket(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use std::os::unix::fs::FileTypeExt as _;
    match std::fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::other("something else is there")),
        Err(_) => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn taken_in(
    stream: io::Result<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
    registry: &Arc<Registry>,
    places: &Arc<Semaphore>,
) {
    let Ok(stream) = stream else {
        return tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let Ok(place) = Arc::clone(places).acquire_owned().await else {
        return;
    };
    let registry = Arc::clone(registry);
    tokio::spawn(async move {
        let answer = service_fn(async |request: Request<Incoming>| {
            Ok::<_, std::convert::Infallible>(answer(&request, Arc::clone(&registry)).await)
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answer);
        // Whoever scrapes may have gone, or be too slow.
        let _served = tokio::time::timeout(PATIENCE, served).await;
        drop(place);
    });
}

async fn answer(request: &Request<Incoming>, registry: Arc<Registry>) -> Response<Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics" | "/") => {
            // Not on the threads that serve connections: maps are counted.
            let read = tokio::task::spawn_blocking(move || {
                let mut text = String::new();
                encode(&mut text, &registry).map(|()| text)
            });
            match read.await {
                Ok(Ok(text)) => (StatusCode::OK, text),
                _ => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
            }
        }
        (&Method::GET, _) => (StatusCode::NOT_FOUND, String::new()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    if let Ok(kind) = TEXT.parse() {
        response.headers_mut().insert(CONTENT_TYPE, kind);
    }
    response
}

/// What is read when it is asked for.
struct Read(Sources);

impl fmt::Debug for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Read")
    }
}

impl Collector for Read {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sources = &self.0;
        let totals = sources.tally.totals();
        let counts = sources.counters.read();
        let force = sources.in_force.now();

        let mut counters = |name, help, label: &str, values: &[(&str, u64)]| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (value, count) in values {
                let labels = [(label, *value)];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
            fmt::Result::Ok(())
        };
        counters(
            "connections",
            "Connections to a metadata address, by what the kernel programs did",
            "outcome",
            &[
                ("redirected", counts.redirected),
                ("refused", counts.refused),
                ("bypassed", counts.bypassed),
                ("publish_failed", counts.publish_failed),
                ("unattended_refused", counts.unattended_refused),
                ("unattended_bypassed", counts.unattended_bypassed),
            ],
        )?;
        counters(
            "packets_dropped",
            "Packets for a metadata address that were dropped, by layer",
            "layer",
            &[
                ("backstop", totals.backstop_dropped),
                ("perimeter", totals.perimeter_dropped),
            ],
        )?;
        let losses = sources.recorder.losses();
        let mut lost = vec![("queue", sources.recorder.missed())];
        lost.extend(losses.iter().map(|it| (it.output, it.events.load(Relaxed))));
        counters(
            "events_lost",
            "Events that were lost: in the queue, for all outputs, or by one output",
            "output",
            &lost,
        )?;
        let removed = |which: fn((u64, u64)) -> u64| -> Vec<(&str, u64)> {
            let of = |loss: &Loss| Some((loss.output, which(loss.removed.as_ref()?.now())));
            losses.iter().filter_map(of).collect()
        };
        counters(
            "events_removed_files",
            "Old files of events that were removed to make room",
            "output",
            &removed(|(files, _)| files),
        )?;
        counters(
            "events_removed_bytes",
            "Bytes in old files of events that were removed to make room",
            "output",
            &removed(|(_, bytes)| bytes),
        )?;
        let hits = sources.tally.rule_hits();
        let hits: Vec<_> = hits
            .iter()
            .map(|(rule, hits)| (rule.as_str(), *hits))
            .collect();
        counters(
            "rule_hits",
            "Requests that a rule has decided",
            "rule",
            &hits,
        )?;

        let mut gauges = |name, help, label: &str, values: &[(&str, u64)]| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (value, number) in values {
                let number = i64::try_from(*number).unwrap_or(i64::MAX);
                let labels = [(label, *value)];
                ConstGauge::new(number).encode(family.encode_family(&labels)?)?;
            }
            fmt::Result::Ok(())
        };
        let fill = sources.maps.read();
        let entries: Vec<_> = fill.iter().map(|fill| (fill.map, fill.entries)).collect();
        let capacity: Vec<_> = fill.iter().map(|fill| (fill.map, fill.capacity)).collect();
        gauges(
            "map_entries",
            "Entries in a map of the kernel programs",
            "map",
            &entries,
        )?;
        gauges(
            "map_capacity",
            "Entries that such a map has room for",
            "map",
            &capacity,
        )?;
        let version = env!("CARGO_PKG_VERSION");
        gauges(
            "build_info",
            "Always 1; its label is the version of imds-guard",
            "version",
            &[(version, 1)],
        )?;
        let is = |mode| u64::from(force.policy.mode == mode);
        gauges(
            "mode",
            "1 for the mode that is in force",
            "mode",
            &[("audit", is(Mode::Audit)), ("enforce", is(Mode::Enforce))],
        )?;

        let mut gauge = |name, help, value: u64| {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            let gauge = ConstGauge::new(value);
            let one = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode(one)
        };
        gauge(
            "queue_events",
            "Events that wait to be written",
            sources.recorder.waiting() as u64,
        )?;
        gauge(
            "rules",
            "Rules that are in force",
            force.policy.rules.list().len() as u64,
        )?;
        gauge(
            "config_version",
            "How often the configuration in force was changed since the start",
            sources.in_force.version(),
        )?;
        gauge(
            "upstream_connections",
            "The guard's own connections to the metadata service",
            fill.iter()
                .find(|it| it.map == "EXEMPT")
                .map_or(0, |it| it.entries),
        )
    }
}
