//! The guard's own listener, reached otherwise than by being redirected.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use imds_guard::{
    config::{LISTENER_PORT, LISTENER_V4, LISTENER_V6},
    lab::{HOST_V4, HOST_V6, Place, links},
    record::{ConnectionRefusal, Kind},
};
use imds_guard_tests::{Sandbox, curl};

use super::{assert_untouched, attack, audited, ran, room};
use crate::{GUARD, INSTANCE_ID_PATH};

const PACKETS: &str = include_str!("packets.py");

/// The guard has refused a connection from this address.
fn assert_refused(sandbox: &Sandbox, from: IpAddr) {
    let Kind::ConnectionRefused(refused) = sandbox.guard.event().unwrap().kind else {
        panic!("nobody was refused")
    };
    assert_eq!(refused.reason, ConnectionRefusal::NotRedirected);
    let peer: SocketAddr = refused.peer.parse().unwrap();
    assert_eq!(peer.ip(), from);
}

/// A1: from a neighbour of the host.
#[test]
fn a1_from_outside_the_host() {
    let sandbox = audited();
    let neighbour = sandbox.lab.imds_ns();
    let ways: [(IpAddr, IpAddr, u8, &str); 2] = [
        (LISTENER_V4.into(), HOST_V4.into(), 32, "172.31.16.1"),
        (LISTENER_V6.into(), HOST_V6.into(), 128, "2001:db8:16::1"),
    ];
    for (listener, host, prefix, neighbours) in ways {
        links::add_route(neighbour, listener, prefix, host).unwrap();
        let answer = neighbour
            .run(|| {
                let address = (listener, LISTENER_PORT).into();
                let patience = Duration::from_secs(20);
                let mut stream = TcpStream::connect_timeout(&address, patience).unwrap();
                stream.set_read_timeout(Some(patience)).unwrap();
                // What cannot be written or read was cut off, which is as good.
                let _cut_off = write!(stream, "GET {INSTANCE_ID_PATH} HTTP/1.0\r\n\r\n");
                let mut answer = Vec::new();
                let _cut_off = stream.read_to_end(&mut answer);
                answer
            })
            .unwrap();
        assert!(answer.is_empty(), "{answer:?}");
        assert_refused(&sandbox, neighbours.parse().unwrap());
    }
    assert_untouched(&sandbox);
}

/// A1: by processes that are not watched, so that no kernel program sees them connect.
#[test]
fn a1_from_outside_the_watched_cgroup() {
    let sandbox = audited();
    for place in [Place::Host, Place::Container] {
        let outside = sandbox.lab.add_outsider(place).unwrap();
        for listener in [LISTENER_V4.to_string(), format!("[{LISTENER_V6}]")] {
            let url = format!("http://{listener}:{LISTENER_PORT}{INSTANCE_ID_PATH}");
            let asked = imds_guard_tests::run(outside.command("curl").args(["-sgm", "20", &url]));
            assert!(
                !asked.status.success() && asked.stdout.is_empty(),
                "{asked:?}"
            );
            let event = sandbox.guard.event().unwrap();
            assert!(
                matches!(event.kind, Kind::ConnectionRefused(_)),
                "{event:?}"
            );
        }
    }
    assert_untouched(&sandbox);
}

/// A1: with a handshake of one's own, over raw and packet sockets.
#[test]
fn a1_with_packets_of_ones_own() {
    let sandbox = audited();
    let outside = sandbox.lab.add_outsider(Place::Container).unwrap();
    let inside = room(&sandbox, Place::Container);
    let ways = [
        (inside, "raw", 4),
        (inside, "packet", 6),
        (&outside, "raw", 6),
        (&outside, "packet", 4),
    ];
    for ((here, means, version), port) in ways.into_iter().zip(4000..) {
        let listener = match version {
            4 => LISTENER_V4.to_string(),
            _ => LISTENER_V6.to_string(),
        };
        let numbers = [version, port, LISTENER_PORT].map(|number| number.to_string());
        let [version, port, listens] = &numbers;
        let arguments = [means, version, port, &listener, listens];
        assert_eq!(attack(here, PACKETS, &arguments), "closed", "{arguments:?}");
        let event = sandbox.guard.event().unwrap();
        assert!(
            matches!(event.kind, Kind::ConnectionRefused(_)),
            "{event:?}"
        );
    }
    assert_untouched(&sandbox);
}

/// A1: nobody but root takes the guard's place while it is away.
#[test]
fn a1_an_unprivileged_user_cannot_listen_in_the_guards_place() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--on-stop", "keep"]);
    let (_, lab) = sandbox.stop();
    let script = r"
import errno, os, socket
os.setgid(65534)
os.setuid(65534)
for family, address in ((2, '169.254.171.254'), (2, ''), (10, 'fd00:ec2::a9fe:abfe'), (10, '')):
    s = socket.socket(family)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        s.bind((address, 254))
        print('bound')
    except OSError as error:
        print(errno.errorcode[error.errno])
";
    let said = attack(lab.room(Place::Host), script, &[]);
    assert_eq!(said, ["EACCES"; 4].join("\n"));
    // And nobody goes past, as nobody is there.
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    assert_eq!(curl(&lab, Place::Host, &[url]).status, 0);
    assert_eq!(lab.imds().counters().connections, 0);
    let mut detach = lab.command(Place::Guard, GUARD);
    ran(detach.arg("detach").arg("--pins").arg(lab.pins()));
}
