//! What is not clearly one HTTP request is refused, and nothing of it reaches the service.

use imds_guard::{
    lab::Place,
    policy::{Imds, Malformed, Reason, Verdict},
};
use imds_guard_tests::Sandbox;

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

/// Sends bytes over a connection each, and prints the statuses that come back, a line for each.
fn statuses(sandbox: &Sandbox, place: Place, address: &str, requests: &[String]) -> Vec<String> {
    let address = address.trim_matches(['[', ']']);
    let requests = serde_json::to_string(requests).unwrap();
    let script = format!(
        r"
import json, re, socket
for request in json.loads({requests:?}):
    s = socket.create_connection(('{address}', 80), timeout=20)
    s.sendall(request.encode('latin-1'))
    answer = b''
    try:
        while part := s.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    print(*re.findall(rb'HTTP/1\.[01] ([0-9]+)', answer))
"
    );
    let printed = sandbox.python(place, &script);
    let lines = printed.lines().map(|line| line.replace(['b', '\''], ""));
    lines.collect()
}

/// A2, A3, A4, B4: requests that could be read in two ways, and other protocols, over both families.
#[test]
fn a2_a3_a4_b4_what_is_ambiguous_is_refused_everywhere() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let get = format!("GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\n");
    let v2 = format!("{get}X-aws-ec2-metadata-token: x\r\n");
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n\
               X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    let long = "x".repeat(20_000);
    #[rustfmt::skip]
    let table = [
        // Framing: where does the request end?
        (format!("{put}Content-Length: 0\r\nContent-Length: 4\r\n\r\nGET "), Malformed::Framing, "400"),
        (format!("{put}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), Malformed::Framing, "400"),
        (format!("{put}Transfer-Encoding: identity\r\n\r\n"), Malformed::Framing, "400"),
        (format!("{put}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"), Malformed::Framing, "400"),
        (format!("{put}Content-Length: -1\r\n\r\n"), Malformed::Framing, "400"),
        // Lines: where does a header end?
        (format!("{v2}X: y\nX-aws-ec2-metadata-token: z\r\n\r\n"), Malformed::LineEnding, "400"),
        (format!("{v2}X: y\rZ: z\r\n\r\n"), Malformed::LineEnding, "400"),
        (format!("{v2}X: \0\r\n\r\n"), Malformed::LineEnding, "400"),
        (format!("{v2}X: y\r\n folded\r\n\r\n"), Malformed::Folded, "400"),
        (format!("{get}X-aws-ec2-metadata-token : x\r\n\r\n"), Malformed::Header, "400"),
        (format!("{get}X-aws-ec2-metadata-token\r\n\r\n"), Malformed::Header, "400"),
        (format!("{get}X: {long}\r\n\r\n"), Malformed::Oversized, "431"),
        (format!("{get}{}\r\n", "X: y\r\n".repeat(200)), Malformed::Oversized, "431"),
        (format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", &long[..4000]), Malformed::TooLong, "414"),
        (format!("{get}Host: y\r\n\r\n"), Malformed::Host, "400"),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n".into(), Malformed::Host, "400"),
        // Other protocols.
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), Malformed::Version, "400"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03".into(), Malformed::LineEnding, "400"),
        ("SSH-2.0-x\r\n\r\n".into(), Malformed::RequestLine, "400"),
        ("GET /\r\n\r\n".into(), Malformed::RequestLine, "400"),
        (format!("{v2}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"), Malformed::Upgrade, "400"),
        (format!("{v2}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"), Malformed::Upgrade, "400"),
        ("CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n".into(), Malformed::Target, "405"),
        ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n".into(), Malformed::Target, "405"),
        ("GET ftp://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n".into(), Malformed::RequestLine, "400"),
        ("GET http://a@169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n".into(), Malformed::RequestLine, "400"),
        // Tokens and paths.
        (format!("{v2}x-AWS-ec2-metadata-token: y\r\n\r\n"), Malformed::RepeatedToken, "400"),
        (format!("{put}X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"), Malformed::RepeatedToken, "400"),
        (v2.replace("meta-data/", "meta-data%2f") + "\r\n", Malformed::Path, "400"),
        (v2.replace("meta-data/", "%252e/") + "\r\n", Malformed::Path, "400"),
        (v2.replace("meta-data/", "meta-data//../") + "\r\n", Malformed::Path, "400"),
        (v2.replace("meta-data/", "meta-data;x/") + "\r\n", Malformed::Path, "400"),
    ];
    let requests: Vec<String> = table
        .iter()
        .map(|(request, ..)| request.replacen("Host: x\r\n", "Host: x\r\nConnection: close\r\n", 1))
        .collect();
    for address in [ADDRESSES[0], ADDRESSES[1]] {
        let got = statuses(&sandbox, Place::Host, address, &requests);
        assert_eq!(got.len(), table.len());
        for ((request, malformed, status), got) in table.iter().zip(got) {
            let request = &request[..request.len().min(120)];
            assert_eq!(got, *status, "{request:?}");
            let event = sandbox.request();
            assert_eq!(event.malformed, Some(*malformed), "{request:?}");
            assert_eq!(
                (event.verdict, event.reason, event.imds),
                (Verdict::Deny, Reason::Malformed, None),
                "{request:?}"
            );
            assert!(event.caller.comm.starts_with("python"));
            let is_method = ["GET", "PUT", "CONNECT", "OPTIONS", "PRI", ""];
            assert!(is_method.contains(&event.method.as_str()), "{request:?}");
            assert!(event.path.is_empty() || event.path.starts_with(['/', '*']));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// A2: requests that are hidden behind others on the same connection.
#[test]
fn a2_nothing_is_smuggled_behind_another_request() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    let _put = sandbox.request();
    let v2 = format!(
        "GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: {token}\r\n"
    );
    let v1 = format!("GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let length = v1.len();
    let table = [
        // A body is a body.
        (
            format!("{v2}Content-Length: {length}\r\n\r\n{v1}{v1}"),
            "200 401",
        ),
        // Whatever follows chunks is not served: where they end is for others to guess.
        (
            format!("{v2}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{v1}"),
            "200",
        ),
        (
            format!("{v2}Transfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n{v1}"),
            "200",
        ),
        (
            format!("{v2}Transfer-Encoding: chunked\r\n\r\n{length:x};x\r\n{v1}\r\n0\r\n\r\n{v1}"),
            "200",
        ),
        // A good one, one that is refused, and a third that nobody looks at.
        (
            format!("{v2}\r\nGET / HTTP/1.1\nHost: x\r\n\r\n{v1}"),
            "200 400",
        ),
    ];
    let requests: Vec<_> = table.iter().map(|(request, _)| request.clone()).collect();
    let got = statuses(&sandbox, Place::Host, ADDRESSES[0], &requests);
    for ((request, expected), got) in table.iter().zip(got) {
        assert_eq!(got, *expected, "{request}");
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!((reached.v1_requests, reached.v2_requests), (0, 5));
}

/// A client that sends its request in small pieces, or closes its side at once, is served all the same.
#[test]
fn requests_may_come_in_pieces() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    let script = format!(
        r"
import socket
request = b'GET {INSTANCE_ID_PATH} HTTP/1.0\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n'
s = socket.create_connection(('169.254.169.254', 80), timeout=20)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for byte in request:
    s.sendall(bytes([byte]))
s.shutdown(socket.SHUT_WR)
answer = b''
while part := s.recv(65536):
    answer += part
print(answer.split()[1].decode())
"
    );
    assert_eq!(sandbox.python(Place::Host, &script), "200");
}

/// A3, B4, D1, in audit mode: what works without the guard works with it, and what is ambiguous does not.
#[test]
fn audit_forwards_what_the_service_refuses_itself() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    let request = |line: &str, header: &str| {
        format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n")
    };
    let put = "PUT /latest/api/token";
    let table = [
        (request(put, ""), Reason::TokenTtl, "400"),
        (
            request(put, "X-aws-ec2-metadata-token-ttl-seconds: 0\r\n"),
            Reason::TokenTtl,
            "400",
        ),
        (
            request("POST /latest/meta-data/", ""),
            Reason::Method,
            "405",
        ),
        (
            request(
                put,
                "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 10.0.0.1\r\n",
            ),
            Reason::Forwarded,
            "403",
        ),
    ];
    let requests: Vec<_> = table.iter().map(|(request, ..)| request.clone()).collect();
    let got = statuses(&sandbox, Place::Host, ADDRESSES[0], &requests);
    for ((request, reason, status), got) in table.iter().zip(got) {
        assert_eq!(got, *status, "{request}");
        let event = sandbox.request();
        assert_eq!((event.verdict, event.reason), (Verdict::Audit, *reason));
    }
    assert_eq!(sandbox.lab.imds().counters().requests, 4);
    // In enforce mode the guard says the same itself.
    let enforced = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let got = statuses(&enforced, Place::Host, ADDRESSES[0], &requests);
    for ((request, reason, status), got) in table.iter().zip(got) {
        assert_eq!(got, *status, "{request}");
        let event = enforced.request();
        assert_eq!((event.verdict, event.reason), (Verdict::Deny, *reason));
    }
    assert_eq!(enforced.lab.imds().counters().connections, 0);
}

#[test]
fn the_guards_own_answers_say_so_if_that_is_wanted() {
    for (arguments, expected) in [
        (&["--mode", "enforce"][..], ""),
        (&["--mode", "enforce", "--mark-answers"], "no_token"),
    ] {
        let sandbox = Sandbox::new(GUARD, arguments);
        let output = imds_guard_tests::run(sandbox.lab.command(Place::Host, "curl").args([
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%header{x-imds-guard}",
            "http://169.254.169.254/",
        ]));
        let header = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(header, expected);
        let event = sandbox.request();
        assert_eq!(event.imds, Some(Imds::V1));
    }
}
