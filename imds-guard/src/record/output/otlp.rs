//! Events as OpenTelemetry logs, sent to a collector as protobuf over HTTP (OTLP 1.x, `/v1/logs`).

use std::{
    io, thread,
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
use tokio::runtime::Runtime;

use super::{Kept, Lost, Output};
use crate::{
    policy::{Imds, Verdict},
    record::{Event, Host, Kind, words},
};

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

/// Sends events to a collector, some at a time.
pub struct Otlp {
    runtime: Runtime,
    client: Client<HttpConnector, Full<Bytes>>,
    collector: Collector,
    resource: Resource,
    batch: Vec<LogRecord>,
    kept: Kept,
    /// When the oldest of the batch came.
    begun: Instant,
}

/// Why the collector has not taken a message.
struct Refused {
    why: String,
    /// Whether it will not take it later, either.
    is_final: bool,
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
    /// Sends to this collector. It may come later.
    ///
    /// # Errors
    /// The system does not let it.
    pub fn to(host: &Host, collector: Collector) -> io::Result<Self> {
        let mut attributes = vec![
            text("service.name", "imds-guard"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("host.name", &host.name),
        ];
        attributes.extend(host.instance.iter().map(|id| text("host.id", id)));
        Ok(Self {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
            client: Client::builder(TokioExecutor::new()).build_http(),
            collector,
            resource: Resource {
                attributes,
                ..Resource::default()
            },
            batch: Vec::new(),
            kept: Kept::default(),
            begun: Instant::now(),
        })
    }

    /// Sends the batch, again if the collector says that it may take it later.
    fn send(&mut self, tries: u32) -> Result<(), Lost> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let message = message(&self.resource, std::mem::take(&mut self.batch));
        let mut pause = PAUSE;
        for tries_left in (0..tries).rev() {
            match self.runtime.block_on(self.post(&message)) {
                Ok(()) => break,
                Err(Refused { why, is_final }) if is_final || tries_left == 0 => {
                    return Err(self.kept.lost(io::Error::other(why)));
                }
                Err(_) => thread::sleep(pause),
            }
            pause *= 2;
        }
        self.kept = Kept::default();
        Ok(())
    }

    async fn post(&self, message: &Bytes) -> Result<(), Refused> {
        let again = |why| Refused {
            why,
            is_final: false,
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.collector.0)
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::new(message.clone()))
            .map_err(|error| again(error.to_string()))?;
        let answer = tokio::time::timeout(PATIENCE, self.client.request(request))
            .await
            .map_err(|_elapsed| again(format!("no answer within {PATIENCE:?}")))?
            .map_err(|error| again(error.to_string()))?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(Refused {
            why: format!("the collector answers {}", answer.status()),
            // All but those that a client may try again (OTLP, "Failures").
            is_final: !matches!(
                answer.status(),
                StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
        })
    }
}

impl Output for Otlp {
    fn write(&mut self, event: &Event, _line: &[u8]) -> Result<(), Lost> {
        if self.batch.is_empty() {
            self.begun = Instant::now();
        }
        self.batch.push(record(event));
        self.kept.add(event);
        if self.batch.len() < BATCH {
            return Ok(());
        }
        self.send(TRIES)
    }

    fn flush(&mut self) -> Result<(), Lost> {
        if self.begun.elapsed() < BATCH_TIME {
            return Ok(());
        }
        self.send(TRIES)
    }

    fn finish(&mut self) -> Result<(), Lost> {
        self.send(1)
    }
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
