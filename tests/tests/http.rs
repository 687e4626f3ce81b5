//! Clients see through the guard what they see without it.

use std::path::Path;

use imds_guard::lab::{Guard, Lab, Place};
use imds_guard_tests::{lab, python, run};
use serde_json::Value;

use crate::{GUARD, INSTANCE_ID_PATH};

/// Sends each request over a connection of its own, and prints status, headers and body of the answers, but
/// for what changes with time.
const ASK: &str = r"
import json, re, socket, sys
address, requests = sys.argv[1], json.loads(sys.argv[2])
answers = []
for request in requests:
    s = socket.create_connection((address, 80), timeout=20)
    s.sendall(request.encode())
    answer = b''
    while part := s.recv(65536):
        answer += part
    answer = re.sub(rb'[0-9-]{10}T[0-9:]{8}Z', b'then', answer)
    parts = answer.decode().split('\r\n\r\n')
    heads = [part.split('\r\n') for part in parts[:-1]]
    fleeting = ('date:', 'last-modified:', 'connection:', 'x-aws-ec2-metadata-token-ttl-seconds:')
    heads = [[line.lower() for line in head if not line.lower().startswith(fleeting)] for head in heads]
    has_ttl = b'metadata-token-ttl-seconds' in answer.lower()
    answers.append([[sorted(head) for head in heads], has_ttl, parts[-1]])
print(json.dumps(answers))
";

fn ask(lab: &Lab, address: &str, requests: &[String]) -> Vec<Value> {
    let requests = serde_json::to_string(requests).unwrap();
    let mut ask = lab.command(Place::Host, python());
    let output = run(ask.args(["-c", ASK, address, &requests]));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn answers_are_the_same_with_and_without_the_guard() {
    const TOKEN: &str = "X-aws-ec2-metadata-token: SESSION\r\n";
    let paths = [
        "/",
        "/latest",
        "/latest/",
        "/latest/meta-data",
        "/latest/meta-data/",
        INSTANCE_ID_PATH,
        "/1.0/meta-data/ami-id",
        "/2021-07-15/meta-data/placement/region",
        "/2021-07-15/dynamic/instance-identity/document",
        "/latest/dynamic/",
        "/latest/user-data",
        "/latest/meta-data/iam/security-credentials",
        "/latest/meta-data/iam/security-credentials/",
        "/latest//meta-data/./instance-id",
        "/latest/user-data/../meta-data/instance-id",
        "/latest/meta%2Ddata/%69nstance-id?a=b%20c",
        "/latest/unknown",
        "/newest/meta-data/",
    ];
    let get = |line: &str, headers: &str| {
        format!("{line}\r\nHost: 169.254.169.254\r\nConnection: close\r\n{headers}\r\n")
    };
    let mut requests: Vec<String> = Vec::new();
    for path in paths {
        for method in ["GET", "HEAD"] {
            requests.push(get(&format!("{method} {path} HTTP/1.1"), TOKEN));
        }
    }
    requests.extend([
        // Forms that clients and proxies use.
        get(&format!("GET {INSTANCE_ID_PATH} HTTP/1.0"), TOKEN),
        get(
            &format!("GET http://169.254.169.254{INSTANCE_ID_PATH} HTTP/1.1"),
            TOKEN,
        ),
        get(
            &format!("GET {INSTANCE_ID_PATH} HTTP/1.1"),
            "x-AWS-EC2-metadata-token:SESSION\r\n",
        ),
        format!("GET {INSTANCE_ID_PATH} HTTP/1.0\r\n{TOKEN}\r\n"),
        // Several on one connection, one after the other and at once.
        format!("GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\n{TOKEN}\r\n")
            + &format!("HEAD /latest/user-data HTTP/1.1\r\nHost: x\r\n{TOKEN}\r\n")
            + &get(&format!("GET {INSTANCE_ID_PATH} HTTP/1.1"), TOKEN),
        // What the service refuses, whoever asks.
        get(
            &format!("GET {INSTANCE_ID_PATH} HTTP/1.1"),
            "X-aws-ec2-metadata-token: wrong\r\n",
        ),
        get("PUT /latest/api/token HTTP/1.1", ""),
        get(
            "PUT /latest/api/token HTTP/1.1",
            "X-aws-ec2-metadata-token-ttl-seconds: 0\r\n",
        ),
        get(
            "PUT /latest/api/token HTTP/1.1",
            "X-aws-ec2-metadata-token-ttl-seconds: 21601\r\n",
        ),
        get(
            "PUT /latest/api/token HTTP/1.1",
            "X-aws-ec2-metadata-token-ttl-seconds: x\r\n",
        ),
        get(
            "PUT /latest/api/token HTTP/1.1",
            "X-aws-ec2-metadata-token-ttl-seconds:\r\n",
        ),
    ]);
    for (mode, address) in [
        ("audit", "169.254.169.254"),
        ("enforce", "169.254.169.254"),
        ("enforce", "fd00:ec2::254"),
    ] {
        let lab = lab();
        let put = get(
            "PUT /latest/api/token HTTP/1.1",
            "X-aws-ec2-metadata-token-ttl-seconds: 600\r\n",
        );
        let issued = ask(&lab, address, &[put]);
        let token = issued[0][2].as_str().unwrap();
        let requests: Vec<_> = requests
            .iter()
            .map(|it| it.replace("SESSION", token))
            .collect();
        let straight = ask(&lab, address, &requests);
        let targets = |lab: &Lab| -> Vec<String> {
            let seen = lab.imds().requests().into_iter();
            // The guard answers faulty requests for tokens itself.
            seen.filter(|it| it.method != "PUT")
                .map(|it| it.target)
                .collect()
        };
        let sent_straight = targets(&lab);
        lab.imds().forget();
        let _guard = Guard::start(&lab, Path::new(GUARD), ["--mode", mode]).unwrap();
        let guarded = ask(&lab, address, &requests);
        for ((request, straight), guarded) in requests.iter().zip(&straight).zip(&guarded) {
            assert_eq!(guarded, straight, "{mode} {address} {request}");
        }
        // What was asked for is what was sent, but for the host that an absolute form names.
        let origin_form = |target: &String| target.replace("http://169.254.169.254/", "/");
        let sent: Vec<_> = sent_straight.iter().map(origin_form).collect();
        assert_eq!(targets(&lab), sent);
        let user_data = &guarded[2 * paths
            .iter()
            .position(|it| it.ends_with("user-data"))
            .unwrap()];
        assert_eq!(user_data[2].as_str().unwrap().len(), 16 * 1024);
    }
}

/// A token request may have a body, and wait to be told to send it.
#[test]
fn a_body_may_wait_to_be_asked_for() {
    let lab = lab();
    let _guard = Guard::start(&lab, Path::new(GUARD), ["--mode", "enforce"]).unwrap();
    let script = r"
import socket
s = socket.create_connection(('169.254.169.254', 80), timeout=20)
put = b'PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n'
s.sendall(put + b'Expect: 100-continue\r\nContent-Length: 4\r\n\r\n')
print(s.recv(65536).split(b'\r\n')[0].decode())
s.sendall(b'body')
print(s.recv(65536).split(b'\r\n')[0].decode())
s.sendall(put + b'Expect: 100-continue\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
answer = b''
while part := s.recv(65536):
    answer += part
print(answer.split(b'\r\n')[0].decode())
";
    let mut ask = lab.command(Place::Host, python());
    let output = run(ask.args(["-c", script]));
    let printed = String::from_utf8_lossy(&output.stdout);
    let expected = "HTTP/1.1 100 Continue\nHTTP/1.1 200 OK\nHTTP/1.1 200 OK\n";
    assert_eq!(printed, expected, "{output:?}");
    assert_eq!(lab.imds().counters().tokens_issued, 2);
}
