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
    Request as HttpRequest, Response, StatusCode,
    body::{Body as _, Bytes, Incoming},
    header::{CONTENT_LENGTH, HeaderName, HeaderValue, USER_AGENT},
    http::request::Parts,
};
use imds_guard_common::flow::Family;
use tokio::net::TcpStream;

use super::{
    Upstream,
    answer::{self, Answer},
    fallback::Fallbacks,
    gate::Refused,
    ttl,
    upstream::{Reply, Token},
};
use crate::{
    config::Limits,
    identify::Resolver,
    kernel::FlowTable,
    policy::{
        Action, Caller, Decision, Imds, MAX_TTL, Malformed, Mode, Policy, Request, SessionToken,
        TTL_HEADER, Terms, caller::Netns, reply_ttl, shortened,
    },
    record::{self, AnsweredBy, Kind, Latency, Recorder, UpstreamFailure},
    tokens::Tokens,
};

/// Longest method in an event, in bytes.
const MAX_METHOD: usize = 32;
/// Longest path in an event, in bytes.
const MAX_PATH: usize = 512;
/// Longest user agent in an event, in bytes.
const MAX_USER_AGENT: usize = 256;

/// Says why the guard answered itself, if that is wanted.
const REASON_HEADER: HeaderName = HeaderName::from_static("x-imds-guard");

/// Everything a request meets on its way.
pub struct Proxy {
    /// Who opened which connection.
    pub flows: Box<dyn FlowTable>,
    /// Names them.
    pub resolver: Arc<Resolver>,
    /// Judges what they ask.
    pub policy: Policy,
    /// Binds session tokens to where they were issued.
    pub tokens: Tokens,
    /// Where a request is forwarded to.
    pub upstream: Upstream,
    /// Who was refused a token.
    pub fallbacks: Fallbacks,
    /// Where it is recorded.
    pub recorder: Recorder,
    /// Whether answers of the guard's own say so in a header.
    pub marks_answers: bool,
    /// Bounds.
    pub limits: Limits,
}

/// What is known of a connection before its first request.
pub struct Connection {
    caller: Arc<Caller>,
    terms: Terms,
    /// Where the caller's session tokens are valid.
    scope: Option<String>,
    family: Family,
    hops: u8,
    /// Microseconds that naming the caller took, until the first request takes them on itself.
    naming: AtomicU64,
}

/// What became of a request.
struct Outcome {
    /// `None` if it is never answered.
    answer: Option<Answer>,
    by: AnsweredBy,
    decision: Decision,
    malformed: Option<Malformed>,
    upstream_failure: Option<UpstreamFailure>,
    upstream_time: Duration,
}

/// What an event tells of a request.
struct Asked {
    imds: Option<Imds>,
    method: String,
    path: String,
    user_agent: Option<String>,
}

impl Connection {
    pub(super) fn new(
        caller: Caller,
        policy: &Policy,
        family: Family,
        hops: u8,
        naming: Duration,
    ) -> Self {
        let terms = policy.terms(&caller);
        Self {
            scope: terms.token_binding.scope(&caller),
            terms,
            caller: Arc::new(caller),
            family,
            hops,
            naming: micros(naming).into(),
        }
    }
}

impl Proxy {
    /// Answers one request, whatever it is; `None` if it is not to be answered.
    pub(super) async fn answer(
        &self,
        from: &Connection,
        stream: &TcpStream,
        request: HttpRequest<Incoming>,
    ) -> Option<Answer> {
        let begun = Instant::now();
        let (parts, body) = request.into_parts();
        let request = Request::classify(&parts.method, &parts.uri, &parts.headers);
        let outcome = match &request {
            Ok(request) => self.judge(from, stream, &parts, request, body).await,
            Err(malformed) => Outcome::malformed(*malformed),
        };
        let guard = begun.elapsed().saturating_sub(outcome.upstream_time);
        let user_agent = parts.headers.get(USER_AGENT).map(|value| value.as_bytes());
        let asked = Asked {
            imds: request.as_ref().ok().map(|request| request.imds),
            method: shortened(parts.method.as_str(), MAX_METHOD),
            path: shortened(parts.uri.path(), MAX_PATH),
            user_agent: user_agent
                .map(|text| shortened(&String::from_utf8_lossy(text), MAX_USER_AGENT)),
        };
        self.record(from, asked, &outcome, guard);
        self.mark(outcome)
    }

    /// Records what was no request, and says what to answer.
    pub(super) fn refuse(&self, from: &Connection, refused: &Refused) -> StatusCode {
        let outcome = Outcome::malformed(refused.malformed);
        // What is no request line may be anything, a body with a secret in it, too.
        let line = str::from_utf8(&refused.line).unwrap_or_default();
        let (method, rest) = line.split_once(' ').unwrap_or_default();
        let is_request = method.bytes().all(|byte| byte.is_ascii_uppercase());
        let (method, rest) = if is_request { (method, rest) } else { ("", "") };
        let target = rest.split([' ', '?']).next().unwrap_or_default();
        let target = if target.starts_with('/') { target } else { "" };
        let asked = Asked {
            imds: None,
            method: shortened(method, MAX_METHOD),
            path: shortened(target, MAX_PATH),
            user_agent: None,
        };
        let status = outcome.status();
        self.record(from, asked, &outcome, Duration::ZERO);
        status
    }

    async fn judge(
        &self,
        from: &Connection,
        stream: &TcpStream,
        parts: &Parts,
        request: &Request<'_>,
        body: Incoming,
    ) -> Outcome {
        let (found, opened) = match request.token {
            Some(token) => self.tokens.open(token.as_bytes(), from.scope.as_deref()),
            None => (SessionToken::Plain, None),
        };
        let decision = from.terms.decide(request, from.hops, found);
        let token = match decision.action {
            Action::Refuse(_) | Action::Drop => return Outcome::refused(decision),
            Action::Upgrade => Token::Own,
            Action::Forward => match opened.map(HeaderValue::try_from) {
                Some(Ok(token)) => Token::Instead(token),
                Some(Err(_)) | None => Token::AsSent,
            },
        };
        if let Err(malformed) = self.discard(body).await {
            return Outcome::malformed(malformed);
        }
        let sent = Instant::now();
        let result = self.upstream.send(from.family, parts, token).await;
        let upstream_time = sent.elapsed();
        let outcome = match result {
            Ok(reply) if request.imds == Imds::Token => {
                self.hand_out(from, stream, decision, reply)
            }
            Ok(reply) => Outcome::answered(decision, reply.answer),
            Err((status, failure)) => Outcome {
                upstream_failure: Some(failure),
                ..Outcome::by_guard(decision, status)
            },
        };
        Outcome {
            upstream_time,
            ..outcome
        }
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

    /// What the service answered to a token request: how far may it go, and where is it valid?
    fn hand_out(
        &self,
        from: &Connection,
        stream: &TcpStream,
        decision: Decision,
        reply: Reply,
    ) -> Outcome {
        let instance_limit = reply.ttl.filter(|ttl| (1..=64).contains(ttl));
        let beyond = instance_limit.and_then(|ttl| from.terms.decide_answer(from.hops, ttl));
        if let Some(decision) = beyond {
            return Outcome::refused(decision);
        }
        let mut answer = reply.answer;
        if answer.status() != StatusCode::OK {
            return Outcome::answered(decision, answer);
        }
        if let Some(scope) = &from.scope {
            let lives = answer.headers().get(TTL_HEADER);
            let lives = lives.and_then(|value| value.to_str().ok()?.parse().ok());
            let lives = Duration::from_secs(lives.unwrap_or(MAX_TTL).into());
            if let Some(sealed) = self.tokens.seal(answer.body(), lives, scope) {
                answer.headers_mut().remove(CONTENT_LENGTH);
                *answer.body_mut() = sealed.into();
            } else {
                log::warn!(
                    "the service's answer to a token request is no token: passed on as it is"
                );
            }
        }
        if from.terms.mode == Mode::Enforce {
            let same_netns = from.caller.netns == Netns::Host;
            let limit = from.terms.hop_limit.min(instance_limit.unwrap_or(u8::MAX));
            if let Err(error) = ttl::set(stream, reply_ttl(same_netns, limit)) {
                log::error!("a token is not handed out, as its TTL cannot be set: {error}");
                return Outcome::by_guard(decision, StatusCode::INTERNAL_SERVER_ERROR);
            }
        }
        Outcome::answered(decision, answer)
    }

    fn record(&self, from: &Connection, asked: Asked, outcome: &Outcome, guard: Duration) {
        let status = outcome.status();
        let fallback = match asked.imds {
            Some(Imds::Token) if status.is_client_error() => {
                self.fallbacks.refused(&from.caller);
                false
            }
            Some(Imds::V1) => self.fallbacks.is_one(&from.caller),
            _ => false,
        };
        self.recorder
            .record(Kind::Request(Box::new(record::Request {
                verdict: outcome.decision.verdict,
                reason: outcome.decision.reason,
                malformed: outcome.malformed,
                rule: from.terms.rule.as_deref().map(str::to_owned),
                mode: from.terms.mode,
                imds: asked.imds,
                fallback,
                method: asked.method,
                path: asked.path,
                user_agent: asked.user_agent,
                status: status.as_u16(),
                answered_by: outcome.by,
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

    fn mark(&self, outcome: Outcome) -> Option<Answer> {
        let mut answer = outcome.answer?;
        if self.marks_answers && outcome.by == AnsweredBy::Guard {
            let reason = outcome.decision.reason.to_string();
            if let Ok(reason) = HeaderValue::try_from(reason) {
                answer.headers_mut().insert(REASON_HEADER, reason);
            }
        }
        Some(answer)
    }
}

impl Outcome {
    fn by_guard(decision: Decision, status: StatusCode) -> Self {
        Self {
            answer: Some(answer::error(status)),
            by: AnsweredBy::Guard,
            decision,
            malformed: None,
            upstream_failure: None,
            upstream_time: Duration::ZERO,
        }
    }

    fn answered(decision: Decision, answer: Response<Bytes>) -> Self {
        Self {
            answer: Some(answer.map(Full::new)),
            by: AnsweredBy::Service,
            ..Self::by_guard(decision, StatusCode::OK)
        }
    }

    fn refused(decision: Decision) -> Self {
        match decision.action {
            Action::Refuse(status) => Self::by_guard(decision, status),
            _ => Self {
                answer: None,
                by: AnsweredBy::Nobody,
                ..Self::by_guard(decision, StatusCode::FORBIDDEN)
            },
        }
    }

    fn malformed(malformed: Malformed) -> Self {
        Self {
            malformed: Some(malformed),
            ..Self::refused(Decision::malformed(malformed))
        }
    }

    /// The status of the answer; for one that is never given, what it would have been.
    fn status(&self) -> StatusCode {
        match &self.answer {
            Some(answer) => answer.status(),
            None => StatusCode::FORBIDDEN,
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
