//! What is counted for Prometheus as it happens. What can be asked for is read when it is asked.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::{Endpoint, RefusedConnection, Request, UpstreamFailureKind, label};
use crate::policy::{Imds, Verdict};

/// Callers that have a series of their own; the others share one. Callers choose their names.
const MOST_CALLERS: usize = 200;
/// What the others are called.
const OTHER: &str = "other";

/// All that a request can be counted as.
const VERSIONS: [Option<Imds>; 4] = [Some(Imds::V1), Some(Imds::V2), Some(Imds::Token), None];
const VERDICTS: [Verdict; 4] = [
    Verdict::Allow,
    Verdict::Audit,
    Verdict::Upgrade,
    Verdict::Deny,
];
const ENDPOINTS: [Endpoint; 3] = [Endpoint::Ipv4, Endpoint::Ipv6, Endpoint::Ipv4Mapped];

/// Counters and histograms.
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    v1: Family<CallerLabels, Counter>,
    callers: Mutex<HashSet<String>>,
    tokens: Family<VerdictLabels, Counter>,
    refused: Family<ReasonLabels, Counter>,
    failures: Family<ReasonLabels, Counter>,
    guard: Histogram,
    upstream: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    version: &'static str,
    verdict: String,
    endpoint: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallerLabels {
    caller: String,
    verdict: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    verdict: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        // 50 µs to 1.6 s.
        let buckets = || exponential_buckets(0.000_05, 2.0, 16);
        let requests = Family::<RequestLabels, Counter>::default();
        let tokens = Family::<VerdictLabels, Counter>::default();
        let (refused, failures) = (Family::default(), Family::default());
        // What is to be alerted of must be there before it happens.
        for reason in ["not_redirected", "no_syn", "too_many"] {
            let _zero: Counter = refused.get_or_create_owned(&ReasonLabels { reason });
        }
        for reason in ["unreachable", "timed_out", "broken"] {
            let _zero: Counter = failures.get_or_create_owned(&ReasonLabels { reason });
        }
        for verdict in VERDICTS.map(|it| it.to_string()) {
            for (imds, endpoint) in VERSIONS
                .into_iter()
                .flat_map(|imds| ENDPOINTS.map(|endpoint| (imds, endpoint)))
            {
                let _zero = requests.get_or_create_owned(&RequestLabels {
                    version: version_of(imds),
                    verdict: verdict.clone(),
                    endpoint: endpoint.as_str(),
                });
            }
            let _zero = tokens.get_or_create_owned(&VerdictLabels { verdict });
        }
        Self {
            requests,
            v1: Family::default(),
            callers: Mutex::default(),
            tokens,
            refused,
            failures,
            guard: Histogram::new(buckets()),
            upstream: Histogram::new(buckets()),
        }
    }
}

impl Metrics {
    /// Counts a request.
    pub fn request(&self, request: &Request) {
        let verdict = request.verdict.to_string();
        let labels = RequestLabels {
            version: version_of(request.imds),
            verdict: verdict.clone(),
            endpoint: request.endpoint.as_str(),
        };
        self.requests.get_or_create(&labels).inc();
        match request.imds {
            Some(Imds::V1) => {
                // As status shows it.
                let label = label(&request.caller).escape_default().to_string();
                let caller = self.caller(label);
                let labels = CallerLabels { caller, verdict };
                self.v1.get_or_create(&labels).inc();
            }
            Some(Imds::Token) => {
                self.tokens.get_or_create(&VerdictLabels { verdict }).inc();
            }
            Some(Imds::V2) | None => {}
        }
        let seconds = |micros: u64| micros as f64 / 1e6;
        self.guard.observe(seconds(request.latency_us.guard));
        if request.latency_us.upstream > 0 {
            self.upstream.observe(seconds(request.latency_us.upstream));
        }
        if let Some(failure) = &request.upstream_failure {
            let reason = match failure.kind {
                UpstreamFailureKind::Unreachable => "unreachable",
                UpstreamFailureKind::TimedOut => "timed_out",
                UpstreamFailureKind::Broken => "broken",
            };
            self.failures.get_or_create(&ReasonLabels { reason }).inc();
        }
    }

    /// Counts a connection that was closed before any request.
    pub fn refused(&self, refused: &RefusedConnection) {
        let reason = refused.reason.as_str();
        self.refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Registers them under their names.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "requests",
            "Requests, by version of the protocol, verdict and address form",
            self.requests.clone(),
        );
        registry.register(
            "v1_requests",
            "Requests without a session token, by who made them; more than 200 callers are \"other\"",
            self.v1.clone(),
        );
        registry.register(
            "token_requests",
            "Requests for session tokens, by verdict",
            self.tokens.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections closed before any request was read",
            self.refused.clone(),
        );
        registry.register(
            "upstream_failures",
            "Requests that the metadata service did not answer",
            self.failures.clone(),
        );
        registry.register_with_unit(
            "guard_duration",
            "Time taken by the guard: naming the caller, reading, judging",
            Unit::Seconds,
            self.guard.clone(),
        );
        registry.register_with_unit(
            "upstream_duration",
            "Time waiting for the metadata service",
            Unit::Seconds,
            self.upstream.clone(),
        );
    }

    fn caller(&self, name: String) -> String {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.contains(&name) {
            return name;
        }
        if callers.len() >= MOST_CALLERS {
            return OTHER.into();
        }
        callers.insert(name.clone());
        name
    }
}

fn version_of(imds: Option<Imds>) -> &'static str {
    imds.map_or("malformed", Imds::as_str)
}
