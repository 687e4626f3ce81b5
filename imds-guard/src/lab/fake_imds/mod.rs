//! A faithful fake of the EC2 instance metadata service.
//!
//! It speaks both versions of the protocol, over IPv4 and IPv6, and keeps to what is known of the real
//! service: which mistake gets which status, the spelling of headers, the look of tokens and error
//! pages, and that the reply to a token `PUT` alone leaves with the configured hop limit as its TTL.
//! It counts and remembers what reaches it, so that a test can tell what did *not*.

mod answer;
mod server;
mod tokens;
mod tree;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, Response, StatusCode};

use super::NetNs;
use crate::config::{IMDS_PORT, IMDS_V4, IMDS_V6};
use answer::Kind;
use server::Server;
use tokens::Tokens;

pub use tokens::TOKEN_PREFIX;
pub use tree::{
    ACCESS_KEY_ID, INSTANCE_ID, ROLE, SECRET_ACCESS_KEY, SECRETS, SESSION_TOKEN, USER_DATA_SECRET,
};

/// How many requests are remembered.
const REMEMBERED: usize = 1000;

/// Whether requests need a session token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpTokens {
    /// Version 1 is answered too.
    #[default]
    Optional,
    /// Only version 2 is answered.
    Required,
}

/// How the service behaves; all of it can be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether requests need a session token.
    pub http_tokens: HttpTokens,
    /// The TTL with which replies to token `PUT`s leave, 1 to 64.
    pub hop_limit: u8,
    /// Whether the service answers anything but 403.
    pub enabled: bool,
    /// Whether connections accepted from now on serve more than one request.
    pub keep_alive: bool,
    /// How long each answer is held back.
    pub delay: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            http_tokens: HttpTokens::Optional,
            hop_limit: 1,
            enabled: true,
            keep_alive: true,
            delay: Duration::ZERO,
        }
    }
}

/// Where the service listens and how it begins.
#[derive(Clone, Debug)]
pub struct Config {
    /// The addresses to listen at; the namespace must have them.
    pub addresses: Vec<SocketAddr>,
    /// How it behaves at first.
    pub settings: Settings,
}

impl Default for Config {
    fn default() -> Self {
        let addresses = [IpAddr::V4(IMDS_V4), IpAddr::V6(IMDS_V6)];
        Self {
            addresses: addresses.map(|ip| (ip, IMDS_PORT).into()).to_vec(),
            settings: Settings::default(),
        }
    }
}

/// What has reached the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub connections: u64,
    /// Connections that ended because of something that is not HTTP.
    pub malformed: u64,
    /// Requests of any kind.
    pub requests: u64,
    /// `PUT`s for a session token.
    pub token_puts: u64,
    /// Tokens given out.
    pub tokens_issued: u64,
    /// Requests without a token, answered or not; no `PUT`s.
    pub v1_requests: u64,
    /// Those of them that were refused with 401 or 403, as in the metric `MetadataNoTokenRejected`.
    pub v1_rejected: u64,
    /// Requests with a token, valid or not; no `PUT`s.
    pub v2_requests: u64,
    /// Requests of any kind answered with a status of 400 or above.
    pub rejected: u64,
}

impl Counters {
    fn count(&mut self, kind: Kind, status: StatusCode) {
        self.requests += 1;
        self.rejected += u64::from(status.as_u16() >= 400);
        match kind {
            Kind::TokenPut => {
                self.token_puts += 1;
                self.tokens_issued += u64::from(status == StatusCode::OK);
            }
            Kind::V1 => {
                let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status);
                self.v1_requests += 1;
                self.v1_rejected += u64::from(refused);
            }
            Kind::V2 => self.v2_requests += 1,
            Kind::OtherPut => {}
        }
    }
}

/// A request that reached the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The caller, as the service saw it. Its family is the connection's.
    pub peer: SocketAddr,
    /// The method.
    pub method: String,
    /// The target as it was sent: path and query, or more.
    pub target: String,
    /// Whether it carried a session token.
    pub has_token: bool,
    /// All headers in the order in which they came, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The status of the answer.
    pub status: u16,
}

impl Seen {
    fn new<B>(peer: SocketAddr, request: &Request<B>, status: StatusCode) -> Self {
        let headers = request.headers().iter().map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes());
            (name.as_str().to_owned(), value.into_owned())
        });
        Self {
            peer,
            method: request.method().to_string(),
            target: request.uri().to_string(),
            has_token: request.headers().contains_key(answer::TOKEN),
            headers: headers.collect(),
            status: status.as_u16(),
        }
    }
}

/// The running service. Dropping it ends its thread and all connections.
#[derive(Debug)]
pub struct FakeImds {
    state: Shared,
    server: Server,
}

impl FakeImds {
    /// Starts the service on a thread of its own inside the namespace; it listens when this returns.
    ///
    /// # Errors
    /// When an address is missing in the namespace or taken.
    pub fn start(ns: &NetNs, config: Config) -> Result<Self> {
        let state = Shared::new(config.settings)?;
        let server = Server::start(ns, config.addresses, state.clone())
            .context("cannot start the fake metadata service")?;
        let imds = Self { state, server };
        imds.listen()?;
        Ok(imds)
    }

    /// How it behaves now.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.state.lock().settings
    }

    /// Changes how it behaves.
    pub fn update(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.state.lock().settings);
    }

    /// Sets whether requests need a session token.
    pub fn set_http_tokens(&self, http_tokens: HttpTokens) {
        self.update(|settings| settings.http_tokens = http_tokens);
    }

    /// Sets the TTL of replies to token `PUT`s.
    pub fn set_hop_limit(&self, hop_limit: u8) {
        self.update(|settings| settings.hop_limit = hop_limit);
    }

    /// Switches the endpoint on or off. When it is off, every answer is 403.
    pub fn set_enabled(&self, enabled: bool) {
        self.update(|settings| settings.enabled = enabled);
    }

    /// Sets whether connections accepted from now on serve more than one request.
    pub fn set_keep_alive(&self, keep_alive: bool) {
        self.update(|settings| settings.keep_alive = keep_alive);
    }

    /// Holds each answer back for so long.
    pub fn set_delay(&self, delay: Duration) {
        self.update(|settings| settings.delay = delay);
    }

    /// Makes all tokens issued so far invalid.
    pub fn expire_tokens(&self) {
        self.state.lock().tokens.expire_all();
    }

    /// Closes all connections and refuses new ones, until [`listen`](Self::listen).
    ///
    /// # Errors
    /// When the service's thread has ended.
    pub fn refuse(&self) -> Result<()> {
        self.server.refuse()
    }

    /// Listens again after [`refuse`](Self::refuse).
    ///
    /// # Errors
    /// When an address is missing or taken.
    pub fn listen(&self) -> Result<()> {
        self.server.listen()
    }

    /// What has reached the service.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.state.lock().counters
    }

    /// The last thousand requests, the oldest first.
    #[must_use]
    pub fn requests(&self) -> Vec<Seen> {
        self.state.lock().seen.iter().cloned().collect()
    }

    /// Forgets all counts and requests; settings and tokens stay.
    pub fn forget(&self) {
        let mut state = self.state.lock();
        state.counters = Counters::default();
        state.seen.clear();
    }
}

/// What the service's thread and its owner share.
#[derive(Clone, Debug)]
struct Shared(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    settings: Settings,
    tokens: Tokens,
    counters: Counters,
    seen: VecDeque<Seen>,
}

impl Shared {
    fn new(settings: Settings) -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(State {
            settings,
            tokens: Tokens::new().context("cannot open the source of random numbers")?,
            counters: Counters::default(),
            seen: VecDeque::with_capacity(REMEMBERED),
        }))))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Answers a request and takes note of it.
    fn serve<B>(&mut self, peer: SocketAddr, request: &Request<B>) -> Response<Full<Bytes>> {
        let response = answer::answer(&self.settings, &self.tokens, request);
        self.counters.count(Kind::of(request), response.status());
        if self.seen.len() == REMEMBERED {
            self.seen.pop_front();
        }
        self.seen
            .push_back(Seen::new(peer, request, response.status()));
        response
    }
}
