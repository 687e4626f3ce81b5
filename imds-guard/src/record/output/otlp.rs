//! Events as OpenTelemetry logs, sent to a collector as protobuf over HTTP (OTLP 1.x, `/v1/logs`).

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use http_body_util::Full;
use hyper::{Method, Request, StatusCode, Uri, body::Bytes, header::CONTENT_TYPE};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jiff::Timestamp;
use opentelemetry_proto::tonic::{
    collector::logs::v1::ExportLogsServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber},
    resource::v1::Resource,
};
use prost::Message as _;

use super::{Lost, Output};
use crate::{
    policy::{Imds, Verdict},
    record::{Event, Kind, words},
};

/// Events that may wait for the collector.
const QUEUE: usize = 8192;
/// Events in one message, and how long they wait for each other.
const BATCH: usize = 512;
const BATCH_TIME: Duration = Duration::from_secs(1);
/// How long the collector may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a message is sent, and how long it is put off the first time; twice as long each time.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);

/// Where OpenTelemetry logs go, such as `http://127.0.0.1:4318`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector(Uri);

/// Hands events to the thread that sends them.
pub struct Otlp {
    queue: Option<SyncSender<LogRecord>>,
    sender: Option<JoinHandle<()>>,
}

impl Collector {
    /// The collector at this address: `http://` and a host, with `/v1/logs` unless another path is given.
    ///
    /// # Errors
    /// It is something else. TLS is for the collector on the host to speak.
    pub fn at(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{error}"))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err("only http:// to a collector near by, which may pass on by TLS".into());
        }
        if uri.path() != "/" {
            return Ok(Self(uri));
        }
        let whole = format!("{}/v1/logs", url.trim_end_matches('/'));
        let uri = whole.parse().map_err(|error| format!("{error}"))?;
        Ok(Self(uri))
    }
}

impl Otlp {
    /// Starts the thread that sends. What it cannot deliver is counted.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(host: &str, collector: Collector, lost: Arc<AtomicU64>) -> io::Result<Self> {
        let (queue, records) = sync_channel(QUEUE);
        let resource = Resource {
            attributes: vec![
                text("service.name", "imds-guard"),
                text("service.version", env!("CARGO_PKG_VERSION")),
                text("host.name", host),
            ],
            ..Resource::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let sender = thread::Builder::new().name("otlp".into()).spawn(move || {
            let client = Client::builder(TokioExecutor::new()).build_http();
            runtime.block_on(send_all(&records, &client, &collector, &resource, &lost));
        })?;
        Ok(Self {
            queue: Some(queue),
            sender: Some(sender),
        })
    }
}

impl Output for Otlp {
    fn write(&mut self, event: &Event, _line: &[u8]) -> Result<(), Lost> {
        let queue = self.queue.as_ref();
        let sent = queue.is_some_and(|queue| queue.try_send(record(event)).is_ok());
        match sent {
            true => Ok(()),
            false => Err(Lost::event(
                event,
                io::Error::other("the collector is too slow, or does not answer"),
            )),
        }
    }

    fn flush(&mut self) -> Result<(), Lost> {
        Ok(())
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(sender) = self.sender.take() {
            // Its tries are bounded.
            let _panicked = sender.join();
        }
    }
}

async fn send_all(
    records: &Receiver<LogRecord>,
    client: &Client<HttpConnector, Full<Bytes>>,
    collector: &Collector,
    resource: &Resource,
    lost: &AtomicU64,
) {
    let mut fails = false;
    loop {
        let Ok(first) = records.recv() else { return };
        let mut batch = vec![first];
        let until = Instant::now() + BATCH_TIME;
        let is_last = loop {
            if batch.len() == BATCH {
                break false;
            }
            match records.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(record) => batch.push(record),
                Err(RecvTimeoutError::Timeout) => break false,
                Err(RecvTimeoutError::Disconnected) => break true,
            }
        };
        let events = batch.len() as u64;
        match send(client, collector, message(resource, batch), is_last).await {
            Ok(()) if fails => {
                log::warn!("otlp: events can be sent again");
                fails = false;
            }
            Ok(()) => {}
            Err(why) => {
                lost.fetch_add(events, Relaxed);
                if !fails {
                    log::error!("otlp: events cannot be sent and are counted as lost: {why}");
                }
                fails = true;
            }
        }
    }
}

/// Sends a message, again if the collector says that it may take it later.
async fn send(
    client: &Client<HttpConnector, Full<Bytes>>,
    collector: &Collector,
    message: Bytes,
    is_last: bool,
) -> Result<(), String> {
    let mut pause = PAUSE;
    let mut why = String::new();
    for _try in 0..if is_last { 1 } else { TRIES } {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&collector.0)
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::new(message.clone()))
            .map_err(|error| error.to_string())?;
        match tokio::time::timeout(PATIENCE, client.request(request)).await {
            Ok(Ok(answer)) if answer.status().is_success() => return Ok(()),
            Ok(Ok(answer)) => {
                why = format!("the collector answers {}", answer.status());
                // Those that a client may try again (OTLP, "Failures").
                if !matches!(
                    answer.status(),
                    StatusCode::TOO_MANY_REQUESTS
                        | StatusCode::BAD_GATEWAY
                        | StatusCode::SERVICE_UNAVAILABLE
                        | StatusCode::GATEWAY_TIMEOUT
                ) {
                    return Err(why);
                }
            }
            Ok(Err(error)) => why = error.to_string(),
            Err(_elapsed) => why = format!("no answer within {PATIENCE:?}"),
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    Err(why)
}

fn message(resource: &Resource, log_records: Vec<LogRecord>) -> Bytes {
    let message = ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(resource.clone()),
            scope_logs: vec![ScopeLogs {
                scope: Some(InstrumentationScope {
                    name: "imds-guard".into(),
                    version: env!("CARGO_PKG_VERSION").into(),
                    ..InstrumentationScope::default()
                }),
                log_records,
                ..ScopeLogs::default()
            }],
            ..ResourceLogs::default()
        }],
    };
    message.encode_to_vec().into()
}

/// An event, with the attributes of OpenTelemetry's semantic conventions where they have a name for it.
fn record(event: &Event) -> LogRecord {
    let time = event.time.parse::<Timestamp>().unwrap_or_default();
    let time = u64::try_from(time.as_nanosecond()).unwrap_or_default();
    let mut attributes = Vec::new();
    let mut severity = SeverityNumber::Info;
    if let Kind::Request(request) = &event.kind {
        let caller = &request.caller;
        severity = match request.verdict {
            Verdict::Deny => SeverityNumber::Warn,
            Verdict::Audit => SeverityNumber::Info2,
            Verdict::Allow | Verdict::Upgrade => SeverityNumber::Info,
        };
        let container = caller.container.as_deref();
        let pod = caller.pod.as_deref();
        let fields = [
            ("http.request.method", Some(request.method.as_str())),
            ("url.path", Some(&request.path)),
            ("user_agent.original", request.user_agent.as_deref()),
            ("imds.version", request.imds.map(Imds::as_str)),
            ("imds.rule", request.rule.as_deref()),
            ("process.executable.path", caller.exe.as_deref()),
            ("process.user.name", caller.user.as_deref()),
            ("systemd.unit", caller.systemd_unit.as_deref()),
            ("container.id", caller.container_id.as_deref()),
            (
                "container.image.name",
                container.and_then(|it| it.image.as_deref()),
            ),
            ("k8s.pod.name", pod.map(|it| it.name.as_str())),
            ("k8s.namespace.name", pod.map(|it| it.namespace.as_str())),
        ];
        attributes.extend(
            fields
                .into_iter()
                .filter_map(|(key, value)| Some(text(key, value?))),
        );
        attributes.extend([
            text("imds.verdict", &request.verdict.to_string()),
            text("imds.reason", &request.reason.to_string()),
            text("process.command", &caller.comm),
            number("http.response.status_code", request.status.into()),
            number("process.pid", caller.pid.into()),
            number(
                "imds.calls",
                i64::try_from(request.calls()).unwrap_or(i64::MAX),
            ),
        ]);
    }
    LogRecord {
        time_unix_nano: time,
        observed_time_unix_nano: time,
        severity_number: severity.into(),
        body: Some(AnyValue {
            value: Some(Value::StringValue(words(event))),
        }),
        attributes,
        event_name: format!("imds_guard.{}", event.kind.name()),
        ..LogRecord::default()
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    pair(key, Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: i64) -> KeyValue {
    pair(key, Value::IntValue(value))
}

fn pair(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}
