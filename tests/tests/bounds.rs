//! What a client can make the guard hold or wait for is bounded.
//!
//! The proxy runs in this process with a flow table in memory, and with limits small enough to be
//! met at once.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use imds_guard::{
    config::{Limits, Upstreams},
    identify::{
        CommandLines, Resolver,
        workload::{Sources, Workloads},
    },
    kernel::{Everyone, Exempt},
    policy::{Binding, HopLimitAction, Malformed, Mode, Policy},
    proxy::{Acceptor, Backlog, Fallbacks, Force, InForce, Proxy, Rates, Upstream, listen},
    record::{Event, Kind, Recorder, Writer, output::Outputs},
    tokens::Tokens,
};
use imds_guard_common::flow::Origin;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V2: &str = "X-aws-ec2-metadata-token: x\r\n";

struct Rig {
    address: SocketAddr,
    acceptor: Acceptor,
    writer: Writer,
    events: std::io::PipeReader,
}

impl Rig {
    async fn new(limits: Limits, body: &'static [u8]) -> Self {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        Self::in_front_of(limits, vec![[head.as_bytes(), body].concat()]).await
    }

    /// In front of a service that answers with these pieces.
    async fn in_front_of(limits: Limits, answer: Vec<Vec<u8>>) -> Self {
        let upstream = serve_canned(answer).await;
        let (events, output) = std::io::pipe().unwrap();
        let (recorder, writer) = Recorder::start("test", Outputs::to(output)).unwrap();
        let listener = listen(LOCALHOST, &limits).unwrap();
        let address = listener.local_addr().unwrap();
        let mut acceptor = Acceptor::new(Proxy {
            flows: Box::new(Everyone(origin())),
            resolver: Arc::new(Resolver::new(
                "/proc",
                ("/etc/passwd", "/etc/group"),
                "/nonexistent",
                Workloads::new(Sources::default()),
                Some(1),
                CommandLines::Off,
            )),
            in_force: Arc::new(InForce::new(Force {
                policy: Policy {
                    mode: Mode::Enforce,
                    hop_limit: 1,
                    hop_limit_action: HopLimitAction::Reject,
                    token_binding: Some(Binding::Off),
                    rules: Arc::default(),
                },
                marks_answers: false,
            })),
            rates: Rates::default(),
            tally: Arc::default(),
            tokens: Arc::new(Tokens::new(Path::new("/proc/none"))),
            fallbacks: Fallbacks::default(),
            upstream: Upstream::new(
                Upstreams {
                    v4: upstream,
                    v6: upstream,
                },
                Exempt::nothing(),
                limits,
            ),
            recorder,
            limits,
        });
        acceptor.serve(listener).unwrap();
        Self {
            address,
            acceptor,
            writer,
            events,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ask(&self, request: &str) -> String {
        let mut client = self.connect().await;
        client.write_all(request.as_bytes()).await.unwrap();
        everything(&mut client).await
    }

    async fn finish(self) -> Vec<Event> {
        assert_eq!(self.acceptor.drain(Backlog::Serve).await, 0);
        let (writer, events) = (self.writer, self.events);
        tokio::task::spawn_blocking(move || {
            writer.finish();
            let text = std::io::read_to_string(events).unwrap();
            text.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        })
        .await
        .unwrap()
    }
}

/// The caller of every connection: this process.
fn origin() -> Origin {
    let pid = std::process::id();
    Origin {
        cookie: 1,
        cgroup_id: 1,
        netns_cookie: 1,
        connected_at: u64::MAX,
        pid,
        tid: pid,
        uid: 0,
        gid: 0,
        comm: *b"test\0\0\0\0\0\0\0\0\0\0\0\0",
        family: 1,
        sequence: 0,
    }
}

/// Reads to the end of the connection; a reset is an end, too.
async fn everything(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// A metadata service that says the same to everybody, piece by piece, and hangs up if it says so.
async fn serve_canned(answer: Vec<Vec<u8>>) -> SocketAddr {
    let listener = TcpListener::bind(LOCALHOST).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 65536];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    for piece in &answer {
                        if stream.write_all(piece).await.is_err() {
                            return;
                        }
                    }
                    if answer[0].ends_with(b"Connection: close\r\n\r\n") {
                        return;
                    }
                }
            });
        }
    });
    address
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

#[tokio::test]
async fn g2_oversized_requests_are_refused() {
    let limits = Limits {
        head_bytes: 8192,
        headers: 8,
        request_body: 100,
        ..Limits::default()
    };
    let rig = Rig::new(limits, b"ok").await;
    let close = "Connection: close\r\n";
    let table = [
        (
            format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}{close}\r\n"),
            "200",
        ),
        (
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000)),
            "431",
        ),
        (
            format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(20)),
            "431",
        ),
        (
            format!("GET /{} HTTP/1.1\r\n{V2}{close}\r\n", "x".repeat(3000)),
            "414",
        ),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000)), "431"),
        (
            format!(
                "GET / HTTP/1.1\r\n{V2}{close}Content-Length: 50\r\n\r\n{}",
                "x".repeat(50)
            ),
            "200",
        ),
        (
            format!(
                "GET / HTTP/1.1\r\n{V2}{close}Content-Length: 200\r\n\r\n{}",
                "x".repeat(200)
            ),
            "413",
        ),
        (
            format!(
                "GET / HTTP/1.1\r\n{V2}{close}Transfer-Encoding: chunked\r\n\r\nc8\r\n{}\r\n0\r\n\r\n",
                "x".repeat(200)
            ),
            "413",
        ),
    ];
    for (request, expected) in &table {
        let answer = rig.ask(request).await;
        assert_eq!(
            status(&answer),
            *expected,
            "{}",
            &request[..request.len().min(200)]
        );
    }
    let malformed: Vec<Malformed> = rig
        .finish()
        .await
        .into_iter()
        .filter_map(|event| match event.kind {
            Kind::Request(request) => request.malformed,
            _ => None,
        })
        .collect();
    assert_eq!(
        malformed,
        [
            Malformed::Oversized,
            Malformed::Oversized,
            Malformed::TooLong,
            Malformed::Oversized,
            Malformed::Body,
            Malformed::Body
        ]
    );
}

#[tokio::test]
async fn a2_slow_clients_are_cut_off() {
    let limits = Limits {
        head_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    let rig = Rig::new(limits, b"ok").await;
    // Says nothing; stops within the head; falls silent after an answer.
    for (begin, expected) in [
        (String::new(), "none"),
        ("GET / HTTP/1.1\r\nHost:".to_owned(), "none"),
        (format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}\r\n"), "200"),
        (
            format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}Content-Length: 50\r\n\r\nx"),
            "413",
        ),
    ] {
        let answer = rig.ask(&begin).await;
        assert_eq!(status(&answer), expected, "{begin:?} got {answer:?}");
    }
    rig.finish().await;
}

#[tokio::test]
async fn g1_more_connections_than_allowed_wait_for_a_place() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let rig = Rig::new(limits, b"ok").await;
    let request = format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}\r\n");
    let mut buffer = [0; 1024];
    let mut served = Vec::new();
    for _ in 0..2 {
        let mut client = rig.connect().await;
        client.write_all(request.as_bytes()).await.unwrap();
        assert_ne!(client.read(&mut buffer).await.unwrap(), 0);
        served.push(client);
    }
    let mut third = rig.connect().await;
    third.write_all(request.as_bytes()).await.unwrap();
    let mut waiting = tokio::spawn(async move {
        let mut buffer = [0; 1024];
        third.read(&mut buffer).await.unwrap()
    });
    // The two that are being served get further answers; the third gets none until one leaves.
    for client in &mut served {
        client.write_all(request.as_bytes()).await.unwrap();
        assert_ne!(client.read(&mut buffer).await.unwrap(), 0);
    }
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut waiting)
            .await
            .is_err()
    );
    served.pop();
    assert_ne!(waiting.await.unwrap(), 0);
    drop(served);
    rig.finish().await;
}

#[tokio::test]
async fn an_endless_answer_of_the_service_is_a_502() {
    let limits = Limits {
        response_body: 1000,
        ..Limits::default()
    };
    let rig = Rig::new(limits, &[b'x'; 2000]).await;
    let answer = rig
        .ask(&format!(
            "GET / HTTP/1.1\r\nHost: x\r\n{V2}Connection: close\r\n\r\n"
        ))
        .await;
    assert_eq!(status(&answer), "502");
    rig.finish().await;
}

/// Answers whose length is not known beforehand arrive whole, and half of one is a 502.
#[tokio::test]
async fn streamed_answers_arrive_whole() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let closed = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n";
    for (pieces, status_expected, body) in [
        (
            vec![chunked, "3\r\nuse", "\r\n5\r\nr-dat\r\n1\r\na\r\n0\r\n\r\n"],
            "200",
            "user-data",
        ),
        (vec![closed, "user", "-data"], "200", "user-data"),
        (vec![cut, "user"], "502", "</html>"),
    ] {
        let pieces = pieces.into_iter().map(|piece| piece.as_bytes().to_vec());
        let rig = Rig::in_front_of(Limits::default(), pieces.collect()).await;
        let request = format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}Connection: close\r\n\r\n");
        let answer = rig.ask(&request).await;
        assert_eq!(status(&answer), status_expected, "{answer}");
        assert!(answer.trim_end().ends_with(body), "{answer}");
        rig.finish().await;
    }
}

#[tokio::test]
async fn draining_lets_requests_in_flight_finish() {
    let rig = Rig::new(Limits::default(), b"ok").await;
    let mut client = rig.connect().await;
    let request = format!("GET / HTTP/1.1\r\nHost: x\r\n{V2}\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut buffer = [0; 1024];
    assert_ne!(client.read(&mut buffer).await.unwrap(), 0);
    // The idle connection is closed at once, not after its time-out.
    let closed = tokio::spawn(async move { everything(&mut client).await });
    assert_eq!(rig.finish().await.len(), 1);
    assert_eq!(closed.await.unwrap(), "");
}

/// A4: whatever host a request names, it goes to the metadata service, and to it alone.
#[tokio::test]
async fn a4_the_guard_is_no_open_proxy() {
    let rig = Rig::new(Limits::default(), b"metadata").await;
    let close = "Connection: close\r\n";
    for (request, expected) in [
        (
            format!(
                "GET http://example.invalid/x HTTP/1.1\r\nHost: example.invalid\r\n{V2}{close}\r\n"
            ),
            "200",
        ),
        (
            format!(
                "CONNECT example.invalid:443 HTTP/1.1\r\nHost: example.invalid\r\n{V2}{close}\r\n"
            ),
            "405",
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n{V2}{close}\r\n"),
            "400",
        ),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = rig.ask(&request).await;
        assert_eq!(status(&answer), expected, "{request} got {answer}");
    }
    rig.finish().await;
}
