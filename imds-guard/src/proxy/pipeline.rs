//! One request: classify → decide → forward or refuse → record.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
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
use imds_guard_common::flow::{Family, Origin};
use jiff::Timestamp;
use tokio::net::TcpStream;

use super::{
    Upstream,
    answer::{self, Answer},
    fallback::Fallbacks,
    force::{InForce, View},
    gate::Refused,
    rate::Rates,
    ttl,
    upstream::{Reply, Token},
};
use crate::{
    config::Limits,
    identify::Resolver,
    kernel::FlowTable,
    policy::{
        Action, Ask, Caller, Decision, Imds, MAX_TTL, Malformed, Mode, Reason, Request, Rule,
        RuleAction, SessionToken, TTL_HEADER, Terms, Verdict, caller::Netns, reply_ttl, shortened,
    },
    record::{self, AnsweredBy, Kind, Latency, Recorder, Tally, UpstreamFailure},
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
    pub in_force: Arc<InForce>,
    /// How often some of them may ask.
    pub rates: Rates,
    /// Binds session tokens to where they were issued.
    pub tokens: Arc<Tokens>,
    /// Where a request is forwarded to.
    pub upstream: Upstream,
    /// Who was refused a token.
    pub fallbacks: Fallbacks,
    /// Where it is recorded.
    pub recorder: Recorder,
    /// Where it is counted.
    pub tally: Arc<Tally>,
    /// Bounds.
    pub limits: Limits,
}

/// What is known of a connection before its first request.
pub struct Connection {
    origin: Origin,
    family: Family,
    hops: u8,
    view: Mutex<Arc<View>>,
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
    mode: Mode,
    rule: Option<Arc<str>>,
}

/// What an event tells of a request.
struct Asked {
    imds: Option<Imds>,
    method: String,
    path: String,
    user_agent: Option<String>,
}

impl Proxy {
    /// Names who made a connection.
    pub(super) async fn meet(&self, origin: Origin, family: Family, syn_ttl: u8) -> Connection {
        let begun = Instant::now();
        let force = self.in_force.now();
        let view = View::meet(force, &self.resolver, &origin, (family, syn_ttl)).await;
        Connection {
            hops: view.hops,
            view: Mutex::new(Arc::new(view)),
            origin,
            family,
            naming: micros(begun.elapsed()).into(),
        }
    }

    /// A connection as the policy sees it now.
    async fn view(&self, from: &Connection) -> Arc<View> {
        let view = self.latest(from);
        if view.is_current(&self.in_force) {
            return view;
        }
        let renewed = view.renew(&self.in_force, &self.resolver, &from.origin);
        from.see(renewed.await)
    }

    /// The same, if nothing is to be waited for.
    fn latest(&self, from: &Connection) -> Arc<View> {
        let view = from.view();
        match view.news(&self.resolver) {
            Some(news) => from.see(news),
            None => view,
        }
    }
}

impl Connection {
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn see(&self, view: View) -> Arc<View> {
        let view = Arc::new(view);
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&view);
        view
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
        let view = self.view(from).await;
        let (parts, body) = request.into_parts();
        let request = Request::classify(&parts.method, &parts.uri, &parts.headers);
        let outcome = match &request {
            Ok(request) => self.judge(from, &view, stream, &parts, request, body).await,
            Err(malformed) => Outcome::malformed(*malformed, view.force.policy.mode),
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
        // Runtimes and Kubernetes may have told of the caller while the request was served.
        let caller = &self.latest(from).caller;
        self.record(from, caller, asked, &outcome, guard);
        Self::mark(outcome, view.force.marks_answers)
    }

    /// Records what was no request, and says what to answer.
    pub(super) fn refuse(&self, from: &Connection, refused: &Refused) -> StatusCode {
        let view = self.latest(from);
        let outcome = Outcome::malformed(refused.malformed, self.in_force.now().policy.mode);
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
        self.record(from, &view.caller, asked, &outcome, Duration::ZERO);
        status
    }

    async fn judge(
        &self,
        from: &Connection,
        view: &View,
        stream: &TcpStream,
        parts: &Parts,
        request: &Request<'_>,
        body: Incoming,
    ) -> Outcome {
        let now = Timestamp::now();
        let terms = view.terms(now);
        let (found, opened) = match request.token {
            Some(token) => self
                .tokens
                .open(token.as_bytes(), view.scope(terms.token_binding)),
            None => (SessionToken::Plain, None),
        };
        let ask = Ask {
            imds: request.imds,
            method: parts.method.as_str(),
            path: &request.path,
        };
        let policy = &view.force.policy;
        let judged = policy.judge(
            &view.candidates,
            terms,
            (request, &ask),
            from.hops,
            found,
            now,
        );
        let decision = match judged.rule {
            Some(rule) => self.within_rate(rule, &view.caller, judged.decision),
            None => judged.decision,
        };
        let outcome = match decision.action {
            Action::Refuse(_) | Action::Drop => Outcome::refused(decision, judged.mode),
            Action::Forward | Action::Upgrade => {
                let token = match opened.map(HeaderValue::try_from) {
                    _ if decision.action == Action::Upgrade => Token::Own,
                    Some(Ok(token)) => Token::Instead(token),
                    Some(Err(_)) | None => Token::AsSent,
                };
                let judged = (decision, judged.mode);
                self.forward(
                    from,
                    view,
                    stream,
                    (parts, request, body),
                    token,
                    judged,
                    terms,
                )
                .await
            }
        };
        Outcome {
            rule: judged.rule.map(|rule| Arc::clone(&rule.name)),
            ..outcome
        }
    }

    /// A decision, unless the caller asks more often than its rule lets it.
    fn within_rate(&self, rule: &Rule, caller: &Caller, decision: Decision) -> Decision {
        let is_forwarded = matches!(decision.action, Action::Forward | Action::Upgrade);
        if !is_forwarded || self.rates.allow(rule, caller) {
            return decision;
        }
        if rule.action == Some(RuleAction::Audit) {
            return Decision {
                verdict: Verdict::Audit,
                reason: Reason::Rate,
                ..decision
            };
        }
        Decision {
            verdict: Verdict::Deny,
            reason: Reason::Rate,
            action: Action::Refuse(StatusCode::TOO_MANY_REQUESTS),
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "it is one step of a request's way"
    )]
    async fn forward(
        &self,
        from: &Connection,
        view: &View,
        stream: &TcpStream,
        (parts, request, body): (&Parts, &Request<'_>, Incoming),
        token: Token,
        (decision, mode): (Decision, Mode),
        terms: Terms,
    ) -> Outcome {
        if let Err(malformed) = self.discard(body).await {
            return Outcome::malformed(malformed, mode);
        }
        let sent = Instant::now();
        let result = self.upstream.send(from.family, parts, token).await;
        let upstream_time = sent.elapsed();
        let outcome = match result {
            Ok(reply) if request.imds == Imds::Token => {
                let terms = Terms { mode, ..terms };
                self.hand_out(from, view, stream, decision, reply, &terms)
            }
            Ok(reply) => Outcome::answered(decision, mode, reply.answer),
            Err((status, failure)) => Outcome {
                upstream_failure: Some(failure),
                ..Outcome::by_guard(decision, mode, status)
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
        view: &View,
        stream: &TcpStream,
        decision: Decision,
        reply: Reply,
        terms: &Terms,
    ) -> Outcome {
        let mode = terms.mode;
        let instance_limit = reply.ttl.filter(|ttl| (1..=64).contains(ttl));
        let beyond = instance_limit.and_then(|ttl| terms.decide_answer(from.hops, ttl));
        if let Some(decision) = beyond {
            return Outcome::refused(decision, mode);
        }
        let mut answer = reply.answer;
        if answer.status() != StatusCode::OK {
            return Outcome::answered(decision, mode, answer);
        }
        if let Some(scope) = view.scope(terms.token_binding) {
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
        if mode == Mode::Enforce {
            let same_netns = view.caller.netns == Netns::Host;
            let limit = terms.hop_limit.min(instance_limit.unwrap_or(u8::MAX));
            if let Err(error) = ttl::set(stream, reply_ttl(same_netns, limit)) {
                log::error!("a token is not handed out, as its TTL cannot be set: {error}");
                return Outcome::by_guard(decision, mode, StatusCode::INTERNAL_SERVER_ERROR);
            }
        }
        Outcome::answered(decision, mode, answer)
    }

    fn record(
        &self,
        from: &Connection,
        caller: &Arc<Caller>,
        asked: Asked,
        outcome: &Outcome,
        guard: Duration,
    ) {
        let status = outcome.status();
        let fallback = match asked.imds {
            Some(Imds::Token) if status.is_client_error() => {
                self.fallbacks.refused(caller);
                false
            }
            Some(Imds::V1) => self.fallbacks.is_one(caller),
            _ => false,
        };
        let request = Box::new(record::Request {
            verdict: outcome.decision.verdict,
            reason: outcome.decision.reason,
            malformed: outcome.malformed,
            rule: outcome.rule.as_deref().map(str::to_owned),
            mode: outcome.mode,
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
            caller: Arc::clone(caller),
            latency_us: Latency {
                guard: micros(guard) + from.naming.swap(0, Relaxed),
                upstream: micros(outcome.upstream_time),
            },
            folded: None,
        });
        self.tally.request(&request, outcome.rule.as_ref());
        self.recorder.record(Kind::Request(request));
    }

    fn mark(outcome: Outcome, marks_answers: bool) -> Option<Answer> {
        let mut answer = outcome.answer?;
        if marks_answers && outcome.by == AnsweredBy::Guard {
            let reason = outcome.decision.reason.to_string();
            if let Ok(reason) = HeaderValue::try_from(reason) {
                answer.headers_mut().insert(REASON_HEADER, reason);
            }
        }
        Some(answer)
    }
}

impl Outcome {
    fn by_guard(decision: Decision, mode: Mode, status: StatusCode) -> Self {
        Self {
            answer: Some(answer::error(status)),
            by: AnsweredBy::Guard,
            decision,
            malformed: None,
            upstream_failure: None,
            upstream_time: Duration::ZERO,
            mode,
            rule: None,
        }
    }

    fn answered(decision: Decision, mode: Mode, answer: Response<Bytes>) -> Self {
        Self {
            answer: Some(answer.map(Full::new)),
            by: AnsweredBy::Service,
            ..Self::by_guard(decision, mode, StatusCode::OK)
        }
    }

    fn refused(decision: Decision, mode: Mode) -> Self {
        match decision.action {
            Action::Refuse(status) => Self::by_guard(decision, mode, status),
            _ => Self {
                answer: None,
                by: AnsweredBy::Nobody,
                ..Self::by_guard(decision, mode, StatusCode::FORBIDDEN)
            },
        }
    }

    fn malformed(malformed: Malformed, mode: Mode) -> Self {
        Self {
            malformed: Some(malformed),
            ..Self::refused(Decision::malformed(malformed), mode)
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
