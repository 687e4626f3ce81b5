//! The guard's own connections to the metadata service: pooled, kept alive, bounded in time.

use std::{
    error::Error as _,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    HeaderMap, Request, Response, StatusCode, Uri, Version,
    body::Bytes,
    header::{self, HeaderName, HeaderValue},
    http::{request, uri::PathAndQuery},
    rt::{Read, ReadBufCursor, Write},
};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use imds_guard_common::flow::Family;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use tower_service::Service;

use super::upgrade::OwnToken;
use crate::{
    config::{Limits, Upstreams},
    kernel::{Exempt, Exemption},
    policy::{TOKEN_HEADER, TTL_HEADER},
    record::{UpstreamFailure, UpstreamFailureKind as FailureKind},
};

/// Where the guard fetches its own session token.
const TOKEN_PATH: &str = "/latest/api/token";

/// Idle connections kept for each address.
const MAX_IDLE: usize = 32;

/// Headers that speak of one connection, not of the message (RFC 9110, 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The metadata service, or what stands for it.
pub struct Upstream {
    client: Client<Connector, Empty<Bytes>>,
    addresses: Upstreams,
    own_token: OwnToken,
    limits: Limits,
}

/// The status for the client, and what went wrong for the event.
pub type Failed = (StatusCode, UpstreamFailure);

/// What the service answered.
pub struct Reply {
    /// The whole answer.
    pub answer: Response<Bytes>,
    /// The TTL with which it came, where that is known.
    pub ttl: Option<u8>,
}

/// The session token that a request is forwarded with.
pub enum Token {
    /// As the client sent it, or none.
    AsSent,
    /// The service's, in place of the sealed one that the client sent.
    Instead(HeaderValue),
    /// The guard's own.
    Own,
}

impl Upstream {
    /// A client for these addresses; nothing is connected yet.
    #[must_use]
    pub fn new(addresses: Upstreams, exempt: Exempt, limits: Limits) -> Self {
        let connector = Connector {
            exempt,
            timeout: limits.connect_timeout,
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(limits.upstream_idle)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_title_case_headers(true)
            .set_host(false)
            .build(connector);
        Self {
            client,
            addresses,
            own_token: OwnToken::default(),
            limits,
        }
    }

    /// Sends a request, written anew: its method, its path and query to the byte, its end-to-end
    /// headers with the session token that is wanted, no body. Reads the whole answer.
    ///
    /// # Errors
    /// No whole answer within the time and size that are allowed.
    pub async fn send(
        &self,
        family: Family,
        parts: &request::Parts,
        token: Token,
    ) -> Result<Reply, Failed> {
        let address = match family {
            Family::Ipv4 | Family::Ipv4Mapped => self.addresses.v4,
            Family::Ipv6 => self.addresses.v6,
        };
        let reply = async {
            match token {
                Token::AsSent => self.exchange(address, rewrite(address, parts)).await,
                Token::Instead(token) => {
                    let request = rewrite(address, parts).map(|request| with(request, token));
                    self.exchange(address, request).await
                }
                Token::Own => self.upgraded(address, parts).await,
            }
        };
        match tokio::time::timeout(self.limits.answer_timeout, reply).await {
            Ok(reply) => reply,
            Err(_elapsed) => Err(failed(
                FailureKind::TimedOut,
                format!(
                    "{address} did not answer within {:?}",
                    self.limits.answer_timeout
                ),
            )),
        }
    }

    /// Sends a request with the guard's own token, and once more with a new one if the service has
    /// forgotten it.
    async fn upgraded(&self, address: SocketAddr, parts: &request::Parts) -> Result<Reply, Failed> {
        let mut again = true;
        loop {
            let token = self.own_token.get(async |method, headers| {
                let mut put = Request::new(());
                *put.method_mut() = method;
                *put.uri_mut() = Uri::from_static(TOKEN_PATH);
                *put.headers_mut() = headers;
                let (put, _) = put.into_parts();
                let reply = self.exchange(address, rewrite(address, &put)).await?;
                Ok((reply.answer.status(), reply.answer.into_body()))
            });
            let token = token.await?;
            let request = rewrite(address, parts).map(|request| with(request, token.clone()));
            let mut reply = self.exchange(address, request).await?;
            if reply.answer.status() != StatusCode::UNAUTHORIZED || !again {
                // Of that token the client knows nothing.
                reply.answer.headers_mut().remove(TTL_HEADER);
                return Ok(reply);
            }
            self.own_token.forget(&token).await;
            again = false;
        }
    }

    async fn exchange(
        &self,
        address: SocketAddr,
        request: Result<Request<Empty<Bytes>>, hyper::http::Error>,
    ) -> Result<Reply, Failed> {
        let request = request.map_err(|error| failed(FailureKind::Broken, error.to_string()))?;
        let answer = self
            .client
            .request(request)
            .await
            .map_err(|error| explain(address, &error))?;
        let (mut parts, body) = answer.into_parts();
        let body = Limited::new(body, self.limits.response_body)
            .collect()
            .await;
        let body = body.map_err(|error| {
            failed(
                FailureKind::Broken,
                format!("the answer of {address} broke off: {error}"),
            )
        })?;
        strip_hop_by_hop(&mut parts.headers);
        let connection = parts.extensions.remove::<Arc<Exemption>>();
        Ok(Reply {
            ttl: connection.and_then(|connection| connection.last_ttl()),
            answer: Response::from_parts(parts, body.to_bytes()),
        })
    }
}

/// A request with this session token, and no other.
fn with(mut request: Request<Empty<Bytes>>, token: HeaderValue) -> Request<Empty<Bytes>> {
    request.headers_mut().insert(TOKEN_HEADER, token);
    request
}

fn rewrite(
    address: SocketAddr,
    from: &request::Parts,
) -> Result<Request<Empty<Bytes>>, hyper::http::Error> {
    let target = from
        .uri
        .path_and_query()
        .cloned()
        .unwrap_or(PathAndQuery::from_static("/"));
    let authority = match address.port() {
        80 if address.is_ipv6() => format!("[{}]", address.ip()),
        80 => address.ip().to_string(),
        _ => address.to_string(),
    };
    let host = HeaderValue::try_from(&authority)?;
    let uri = Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query(target)
        .build()?;
    let mut request = Request::new(Empty::new());
    *request.method_mut() = from.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    *headers = from.headers.clone();
    strip_hop_by_hop(headers);
    for not_sent in [
        header::CONTENT_LENGTH,
        header::EXPECT,
        header::PROXY_AUTHORIZATION,
    ] {
        headers.remove(not_sent);
    }
    headers.insert(header::HOST, host);
    Ok(request)
}

/// Removes the listed headers, and never those that `Connection` names, as RFC 9110 would have it:
/// a client could have its own session token removed that way after it was judged as IMDSv2.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

fn explain(address: SocketAddr, error: &hyper_util::client::legacy::Error) -> Failed {
    let mut cause = error.source();
    let mut io_error = None;
    let mut message = error.to_string();
    while let Some(inner) = cause {
        io_error = io_error.or(inner.downcast_ref::<io::Error>());
        message = inner.to_string();
        cause = inner.source();
    }
    let kind = match io_error {
        Some(error) if error.kind() == io::ErrorKind::TimedOut => FailureKind::TimedOut,
        _ if error.is_connect() => FailureKind::Unreachable,
        _ => FailureKind::Broken,
    };
    failed(kind, format!("{address}: {message}"))
}

fn failed(kind: FailureKind, message: String) -> Failed {
    let status = match kind {
        FailureKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        FailureKind::Unreachable | FailureKind::Broken => StatusCode::BAD_GATEWAY,
    };
    (status, UpstreamFailure { kind, message })
}

/// Opens connections that the kernel programs leave alone.
#[derive(Clone)]
struct Connector {
    exempt: Exempt,
    timeout: Duration,
}

impl Connector {
    async fn connect(self, address: SocketAddr) -> io::Result<UpstreamIo> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        // Before it connects: otherwise it would be turned to the guard's own listener.
        let exemption = self.exempt.socket(&socket)?;
        let connect = TcpSocket::from_std_stream(socket.into()).connect(address);
        let stream = tokio::time::timeout(self.timeout, connect)
            .await
            .map_err(|_elapsed| {
                let message = format!("no connection within {:?}", self.timeout);
                io::Error::new(io::ErrorKind::TimedOut, message)
            })??;
        Ok(UpstreamIo {
            stream: TokioIo::new(stream),
            exemption: Arc::new(exemption),
        })
    }
}

impl Service<Uri> for Connector {
    type Response = UpstreamIo;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<UpstreamIo>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            // The URI was written by `rewrite`: its host is an address.
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
            let ip = host.parse().map_err(io::Error::other)?;
            connector
                .connect(SocketAddr::new(ip, uri.port_u16().unwrap_or(80)))
                .await
        })
    }
}

/// A connection to the metadata service; closed first, no longer exempt then.
struct UpstreamIo {
    stream: TokioIo<TcpStream>,
    exemption: Arc<Exemption>,
}

impl Connection for UpstreamIo {
    fn connected(&self) -> Connected {
        Connected::new().extra(Arc::clone(&self.exemption))
    }
}

impl Read for UpstreamIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Write for UpstreamIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::Request as Judged;

    fn header() -> impl Strategy<Value = (&'static str, String)> {
        let name = prop::sample::select(vec![
            "Connection",
            "Keep-Alive",
            "Expect",
            "Host",
            "X-Forwarded-For",
            "X-aws-ec2-metadata-token",
            "X-aws-ec2-metadata-token-ttl-seconds",
        ]);
        let value = prop::sample::select(vec![
            "",
            " ",
            "close",
            "x-aws-ec2-metadata-token",
            "close, X-Forwarded-For, x-aws-ec2-metadata-token",
            "21600",
        ]);
        (name, value.prop_map(str::to_owned))
    }

    proptest! {
        /// What is sent would be judged as what came was judged, whatever the client says.
        #[test]
        fn what_was_judged_is_what_is_sent(
            method in prop::sample::select(vec!["GET", "HEAD", "PUT", "POST"]),
            target in prop::sample::select(vec!["/latest/api/token", "/latest/api/%74oken", "/a/../b?c"]),
            headers in prop::collection::vec(header(), 0..5),
        ) {
            let mut request = Request::builder().method(method).uri(target);
            for (name, value) in headers {
                request = request.header(name, value);
            }
            let (came, ()) = request.body(()).unwrap().into_parts();
            let sent = rewrite("169.254.169.254:80".parse().unwrap(), &came).unwrap();
            let judge = |method, uri, headers| {
                Judged::classify(method, uri, headers).map(|judged| (judged.imds, judged.forwarded))
            };
            prop_assert_eq!(
                judge(&came.method, &came.uri, &came.headers),
                judge(sent.method(), sent.uri(), sent.headers())
            );
            prop_assert_eq!(came.uri.path_and_query(), sent.uri().path_and_query());
        }
    }
}
