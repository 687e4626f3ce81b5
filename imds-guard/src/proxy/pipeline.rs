//! One request: classify → decide → forward or refuse → record.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request as HttpRequest, StatusCode,
    body::{Body as _, Incoming},
    header::USER_AGENT,
    http::request::Parts,
};
use imds_guard_common::flow::Family;

use super::{
    Upstream,
    answer::{self, Answer},
};
use crate::{
    config::Limits,
    identify::Resolver,
    kernel::FlowTable,
    policy::{Caller, Decision, Imds, Malformed, Policy, Request, Verdict, shortened},
    record::{self, Kind, Latency, Recorder, UpstreamFailure},
};

/// Longest method in an event, in bytes.
const MAX_METHOD: usize = 32;
/// Longest path in an event, in bytes.
const MAX_PATH: usize = 512;
/// Longest user agent in an event, in bytes.
const MAX_USER_AGENT: usize = 256;

/// Everything a request meets on its way.
pub struct Proxy {
    /// Who opened which connection.
    pub flows: Box<dyn FlowTable>,
    /// Names them.
    pub resolver: Arc<Resolver>,
    /// Judges what they ask.
    pub policy: Policy,
    /// Where it is forwarded to.
    pub upstream: Upstream,
    /// Where it is recorded.
    pub recorder: Recorder,
    /// Bounds.
    pub limits: Limits,
}

/// What is known of a connection before its first request.
pub struct Connection {
    caller: Arc<Caller>,
    family: Family,
    hops: u8,
    /// Microseconds that naming the caller took, until the first request takes them on itself.
    naming: AtomicU64,
}

/// What became of a request.
struct Outcome {
    answer: Answer,
    decision: Decision,
    malformed: Option<Malformed>,
    upstream_failure: Option<UpstreamFailure>,
    upstream_time: Duration,
}

impl Connection {
    pub(super) fn new(caller: Caller, family: Family, hops: u8, naming: Duration) -> Self {
        Self {
            caller: Arc::new(caller),
            family,
            hops,
            naming: micros(naming).into(),
        }
    }
}

impl Proxy {
    /// Answers one request, whatever it is.
    pub(super) async fn answer(&self, from: &Connection, request: HttpRequest<Incoming>) -> Answer {
        let begun = Instant::now();
        let (parts, body) = request.into_parts();
        let asked = Request::classify(&parts.method, &parts.uri, &parts.headers);
        let outcome = match asked {
            Ok(request) => {
                let decision = self.policy.decide(&request, from.hops);
                match decision.verdict {
                    Verdict::Deny => Outcome::refused(decision),
                    Verdict::Allow | Verdict::Audit => match self.discard(body).await {
                        Ok(()) => self.forward(from, &parts, decision).await,
                        Err(malformed) => Outcome::malformed(malformed),
                    },
                }
            }
            Err(malformed) => Outcome::malformed(malformed),
        };
        let guard = begun.elapsed().saturating_sub(outcome.upstream_time);
        let imds = asked.ok().map(|request| request.imds);
        self.record(from, &parts, imds, &outcome, guard);
        outcome.answer
    }

    /// The service takes no bodies, so none is forwarded; a small one does no harm.
    async fn discard(&self, body: Incoming) -> Result<(), Malformed> {
        if body.is_end_stream() {
            return Ok(());
        }
        let whole = Limited::new(body, self.limits.request_body).collect();
        match tokio::time::timeout(self.limits.body_timeout, whole).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Malformed::Body),
        }
    }

    async fn forward(&self, from: &Connection, parts: &Parts, decision: Decision) -> Outcome {
        let sent = Instant::now();
        let result = self.upstream.send(from.family, parts).await;
        let (answer, upstream_failure) = match result {
            Ok(answer) => (answer.map(Full::new), None),
            Err((status, failure)) => (answer::error(status), Some(failure)),
        };
        Outcome {
            answer,
            decision,
            malformed: None,
            upstream_failure,
            upstream_time: sent.elapsed(),
        }
    }

    fn record(
        &self,
        from: &Connection,
        parts: &Parts,
        imds: Option<Imds>,
        outcome: &Outcome,
        guard: Duration,
    ) {
        let user_agent = parts
            .headers
            .get(USER_AGENT)
            .map(|value| shortened(&String::from_utf8_lossy(value.as_bytes()), MAX_USER_AGENT));
        self.recorder
            .record(Kind::Request(Box::new(record::Request {
                verdict: outcome.decision.verdict,
                reason: outcome.decision.reason,
                malformed: outcome.malformed,
                mode: self.policy.mode,
                imds,
                method: shortened(parts.method.as_str(), MAX_METHOD),
                path: shortened(parts.uri.path(), MAX_PATH),
                user_agent,
                status: outcome.answer.status().as_u16(),
                upstream_failure: outcome.upstream_failure.clone(),
                endpoint: from.family.into(),
                hops: from.hops,
                caller: Arc::clone(&from.caller),
                latency_us: Latency {
                    guard: micros(guard) + from.naming.swap(0, Relaxed),
                    upstream: micros(outcome.upstream_time),
                },
            })));
    }
}

impl Outcome {
    fn refused(decision: Decision) -> Self {
        let status = decision.refusal.unwrap_or(StatusCode::FORBIDDEN);
        Self {
            answer: answer::error(status),
            decision,
            malformed: None,
            upstream_failure: None,
            upstream_time: Duration::ZERO,
        }
    }

    fn malformed(malformed: Malformed) -> Self {
        Self {
            malformed: Some(malformed),
            ..Self::refused(Decision::malformed(malformed))
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
