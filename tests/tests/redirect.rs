//! Connections for the metadata service reach the guard, and nothing else does.

use imds_guard::{
    lab::{HttpTokens, Place, fake_imds::INSTANCE_ID},
    policy::{Imds, Reason, Verdict, caller::Netns},
    record::{Endpoint, Kind, Stopped},
};
use imds_guard_tests::{Sandbox, curl};
use nix::sys::signal::Signal;

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

const PLACES: [Place; 2] = [Place::Host, Place::Container];

/// Stops the guard. Returns how many events were left, and what the kernel programs counted.
fn last_words(sandbox: Sandbox) -> (usize, Stopped) {
    let (mut events, _lab) = sandbox.stop();
    match events.pop().map(|event| event.kind) {
        Some(Kind::Stopped(stopped)) => (events.len(), stopped),
        other => panic!("{other:?}"),
    }
}

fn endpoint_of(address: &str) -> Endpoint {
    match address {
        "169.254.169.254" => Endpoint::Ipv4,
        "[fd00:ec2::254]" => Endpoint::Ipv6,
        _ => Endpoint::Ipv4Mapped,
    }
}

#[test]
fn enforce_refuses_v1_and_none_arrives() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    for place in PLACES {
        for address in ADDRESSES {
            let answer = sandbox.curl(place, &[format!("http://{address}{INSTANCE_ID_PATH}")]);
            assert_eq!(answer.status, 401, "{place:?} {address}");
            assert!(
                answer.body.contains("<title>401 - Unauthorized</title>"),
                "{}",
                answer.body
            );

            let event = sandbox.request();
            assert_eq!(event.verdict, Verdict::Deny);
            assert_eq!(event.reason, Reason::NoToken);
            assert_eq!(event.imds, Some(Imds::V1));
            assert_eq!(event.status, 401);
            assert_eq!(event.endpoint, endpoint_of(address));
            assert_eq!(event.caller.comm, "curl");
            assert!(event.caller.resolved);
        }
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!(reached.v1_requests, 0);
    assert_eq!(reached.connections, 0, "nothing was even connected");
}

#[test]
fn v2_is_served_everywhere_within_the_hop_limit() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--hop-limit", "2"]);
    sandbox.lab.imds().set_hop_limit(2);
    sandbox.lab.imds().set_http_tokens(HttpTokens::Required);
    for place in PLACES {
        for address in ADDRESSES {
            let token = sandbox.token(place, address);
            let event = sandbox.request();
            assert_eq!(
                (event.verdict, event.imds),
                (Verdict::Allow, Some(Imds::Token))
            );

            let header = format!("X-aws-ec2-metadata-token: {token}");
            let url = format!("http://{address}{INSTANCE_ID_PATH}");
            let answer = sandbox.curl(place, &["-H", &header, &url]);
            assert_eq!((answer.status, answer.body.as_str()), (200, INSTANCE_ID));
            let event = sandbox.request();
            assert_eq!(
                (event.verdict, event.imds),
                (Verdict::Allow, Some(Imds::V2))
            );
            assert_eq!(event.endpoint, endpoint_of(address));
            let (netns, hops) = match place {
                Place::Container => (Netns::Other, 2),
                _ => (Netns::Host, 1),
            };
            assert_eq!((event.caller.netns, event.hops), (netns, hops));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().tokens_issued, 6);
}

#[test]
fn audit_forwards_v1_and_says_so() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    for place in PLACES {
        for address in ADDRESSES {
            let answer = sandbox.curl(place, &[format!("http://{address}{INSTANCE_ID_PATH}")]);
            assert_eq!((answer.status, answer.body.as_str()), (200, INSTANCE_ID));
            let event = sandbox.request();
            assert_eq!(event.verdict, Verdict::Audit);
            assert_eq!(event.reason, Reason::NoToken);
            assert_eq!((event.imds, event.status), (Some(Imds::V1), 200));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().v1_requests, 6);
}

#[test]
fn a_token_from_beyond_the_hop_limit_is_refused_at_once() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let put = [
        "-X",
        "PUT",
        "-H",
        "X-aws-ec2-metadata-token-ttl-seconds: 60",
    ];
    let url = "http://169.254.169.254/latest/api/token";
    let answer = sandbox.curl(Place::Container, &[&put[..], &[url]].concat());
    assert_eq!((answer.exit, answer.status), (0, 403));
    let event = sandbox.request();
    assert_eq!(
        (event.verdict, event.reason, event.hops),
        (Verdict::Deny, Reason::HopLimit, 2)
    );
    assert_eq!(sandbox.lab.imds().counters().token_puts, 0);

    // However the path is written, and even with a token, a PUT is judged as a token request.
    let double = "http://169.254.169.254//latest/api/token";
    let disguised = [&put[..], &["-H", "X-aws-ec2-metadata-token: x", double]].concat();
    assert_eq!(sandbox.curl(Place::Container, &disguised).status, 403);
    assert_eq!(sandbox.request().reason, Reason::HopLimit);

    let forwarded = [&put[..], &["-H", "X-Forwarded-For: 10.0.0.1", url]].concat();
    assert_eq!(sandbox.curl(Place::Host, &forwarded).status, 403);
    assert_eq!(sandbox.request().reason, Reason::Forwarded);
    assert_eq!(sandbox.lab.imds().counters().token_puts, 0);
}

#[test]
fn clients_see_the_address_they_asked_for() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = r"
import socket
def peer(family, address):
    with socket.socket(family) as s:
        s.connect((address, 80))
        return s.getpeername()[:2]
print(peer(socket.AF_INET, '169.254.169.254'))
print(peer(socket.AF_INET6, 'fd00:ec2::254'))
print(peer(socket.AF_INET6, '::ffff:169.254.169.254'))
";
    for place in PLACES {
        assert_eq!(
            sandbox.python(place, script),
            "('169.254.169.254', 80)\n('fd00:ec2::254', 80)\n('::ffff:169.254.169.254', 80)"
        );
    }
}

#[test]
fn other_connections_are_left_alone() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    // A server of the host on port 80, one with a metadata address on another port, and UDP.
    let script = r"
import socket, threading
def serve(server):
    connection, peer = server.accept()
    connection.sendall(b'server')
    connection.close()
server = socket.create_server(('127.0.0.1', 80))
threading.Thread(target=serve, args=(server,)).start()
client = socket.create_connection(('127.0.0.1', 80))
print(client.recv(9), client.getpeername())
try:
    socket.create_connection(('169.254.169.254', 81), timeout=10)
except ConnectionRefusedError:
    print('the service itself refused')
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(('169.254.169.254', 80))
print(udp.getpeername())
";
    assert_eq!(
        sandbox.python(Place::Host, script),
        "b'server' ('127.0.0.1', 80)\nthe service itself refused\n('169.254.169.254', 80)"
    );
    let (earlier, stopped) = last_words(sandbox);
    assert_eq!((earlier, stopped.counts.redirected), (0, 0));
}

/// A1: the listener serves only those whom the kernel has redirected.
#[test]
fn a1_connecting_to_the_listener_itself_is_refused() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    for place in PLACES {
        for address in ["169.254.171.254", "[fd00:ec2::a9fe:abfe]"] {
            let url = format!("http://{address}:254{INSTANCE_ID_PATH}");
            let answer = sandbox.curl(place, &["-H", "X-aws-ec2-metadata-token: x", &url]);
            assert_eq!(answer.status, 0, "{answer:?}");
            assert_ne!(answer.exit, 0);
            let event = sandbox.guard.event().unwrap();
            assert!(
                matches!(event.kind, Kind::ConnectionRefused(_)),
                "{event:?}"
            );
        }
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// A1: a caller that is left over in the kernel's table is not given to the next one on its port.
#[test]
fn a1_a_stale_caller_is_not_inherited() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    // While the guard stands still, a redirected client connects and goes, and the connection is
    // reset; then another one comes straight to the listener from the same port.
    let script = r"
import socket, struct
first = socket.socket()
first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
second = socket.socket()
second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
wait()
first.connect(('169.254.169.254', 80))
mine = first.getsockname()
first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
first.close()
second.bind(mine)
second.connect(('169.254.171.254', 254))
print('connected')
";
    let clients = sandbox.python_waiting(Place::Host, script);
    sandbox.guard.signal(Signal::SIGSTOP).unwrap();
    assert_eq!(clients.go(), "connected");
    sandbox.guard.signal(Signal::SIGCONT).unwrap();
    // Neither is served: the first is gone, the second was not redirected.
    let event = sandbox.guard.event().unwrap();
    assert!(
        matches!(event.kind, Kind::ConnectionRefused(_)),
        "{event:?}"
    );
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// C: a client that uses up its socket's option memory is redirected like any other.
#[test]
fn c_a_socket_without_option_memory_is_redirected() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    // TCP_MD5SIG is 14; each key is charged to the socket, until there is no room.
    let script = format!(
        r"
import errno, socket, struct
s = socket.socket()
for n in range(100000):
    address = struct.pack('=HH', socket.AF_INET, 0) + struct.pack('!I', 0x0a000000 + n)
    key = address.ljust(128, b'\0') + struct.pack('=BBHi', 0, 0, 4, 0) + b'abcd'.ljust(80, b'\0')
    try:
        s.setsockopt(socket.IPPROTO_TCP, 14, key)
    except OSError as e:
        print(errno.errorcode[e.errno])
        break
s.connect(('169.254.169.254', 80))
s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\r\n\r\n')
print(s.recv(12).decode())
"
    );
    assert_eq!(sandbox.python(Place::Host, &script), "ENOMEM\nHTTP/1.0 401");
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

#[test]
fn a_guard_that_ends_leaves_the_way_as_it_was() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--on-stop", "detach"]);
    let v1 = [format!("http://169.254.169.254{INSTANCE_ID_PATH}")];
    assert_eq!(sandbox.curl(Place::Host, &v1).status, 401);
    let (_, lab) = sandbox.stop();
    assert_eq!(curl(&lab, Place::Host, &v1).status, 200);
    let addresses = imds_guard_tests::run(lab.command(Place::Host, "ip").args(["-o", "addr"]));
    let addresses = String::from_utf8_lossy(&addresses.stdout);
    assert!(addresses.contains("172.31.16.10"), "{addresses}");
    assert!(
        !addresses.contains("169.254.171.254") && !addresses.contains("a9fe:abfe"),
        "{addresses}"
    );
}

#[test]
fn the_guards_own_connections_are_pooled_and_never_redirected() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    let urls = vec![format!("http://169.254.169.254{INSTANCE_ID_PATH}"); 20];
    for url in &urls {
        assert_eq!(sandbox.curl(Place::Host, &[url]).status, 200);
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 1);
    let (_, stopped) = last_words(sandbox);
    assert_eq!((stopped.counts.redirected, stopped.counts.exempt), (20, 1));
}

#[test]
fn requests_on_one_connection_are_judged_one_by_one() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    let _put = sandbox.request();
    // Pipelined: both are sent before the first answer.
    let script = format!(
        r"
import re, socket
s = socket.create_connection(('169.254.169.254', 80))
s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n'
          b'GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
answer = b''
while part := s.recv(65536):
    answer += part
print(re.findall('HTTP/1.1 ([0-9]+)', answer.decode()))
"
    );
    assert_eq!(sandbox.python(Place::Host, &script), "['200', '401']");
    assert_eq!(sandbox.request().verdict, Verdict::Allow);
    assert_eq!(sandbox.request().verdict, Verdict::Deny);
    assert_eq!(sandbox.lab.imds().counters().v1_requests, 0);
}

/// B3: a client has its own token taken off on the way, after it was judged as v2.
#[test]
fn b3_a_token_cannot_be_removed_after_it_was_judged() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    for connection in [
        "X-aws-ec2-metadata-token",
        "close, x-aws-ec2-metadata-token, x",
    ] {
        let named = format!("Connection: {connection}");
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        let token = "X-aws-ec2-metadata-token: made-up";
        let answer = sandbox.curl(Place::Host, &["-H", token, "-H", &named, &url]);
        assert_eq!(answer.status, 401, "{answer:?}");
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!((reached.v1_requests, reached.v2_requests), (0, 2));
}

#[test]
fn kernel_messages_come_through_the_log_and_can_be_off() {
    for (level, expected) in [("debug", true), ("off", false)] {
        let log = tempfile(level);
        let file = std::fs::File::create(&log).unwrap();
        let sandbox = Sandbox::with(GUARD, &["--kernel-log", level], |command| {
            command.stderr(file).env_remove("RUST_LOG");
        });
        let _answer = sandbox.curl(
            Place::Host,
            &[format!("http://169.254.169.254{INSTANCE_ID_PATH}")],
        );
        let pid = sandbox.request().caller.pid;
        let (_, _lab) = sandbox.stop();
        let text = std::fs::read_to_string(&log).unwrap();
        std::fs::remove_file(&log).unwrap();
        assert_eq!(
            text.contains(&format!("pid {pid} redirected")),
            expected,
            "{text}"
        );
    }
}

fn tempfile(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("imds-guard-test-{}-{name}", std::process::id()))
}
