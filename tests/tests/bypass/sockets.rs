//! Every way in which the kernel connects a TCP socket.

use aya::util::KernelVersion;
use imds_guard::{
    lab::Place,
    policy::{
        Imds, Verdict,
        caller::{Netns, Unresolved},
    },
    record::{Kind, Layer},
};
use imds_guard_tests::{Sandbox, lab};

use super::{assert_untouched, attack, begin, enforced, packet, room, sockets_can_be_unbound};

const SCRIPT: &str = include_str!("sockets.py");
const ADDRESSES: [&str; 3] = ["169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254"];

/// What came of it, and for whom.
fn outcome(printed: &str) -> (u32, &str) {
    let (pid, outcome) = printed.split_once(' ').unwrap();
    (pid.parse().unwrap(), outcome)
}

/// Connects to the metadata service where no guard is, and to the guard where it enforces, which
/// knows who it was.
fn assert_redirected(ways: &[(&str, &str)]) {
    let bare = lab();
    for (way, address) in ways {
        let printed = attack(bare.room(Place::Host), SCRIPT, &[way, address]);
        assert_eq!(outcome(&printed).1, "200", "{way} {address}");
    }
    let reached = bare.imds().counters();
    assert_eq!(reached.v1_requests, ways.len() as u64);
    drop(bare);

    let sandbox = enforced();
    for place in [Place::Host, Place::Container] {
        for (way, address) in ways {
            let printed = attack(room(&sandbox, place), SCRIPT, &[way, address]);
            let (pid, outcome) = outcome(&printed);
            assert_eq!(outcome, "401", "{place:?} {way} {address}");
            assert_refused(&sandbox, pid, place);
        }
    }
    assert_untouched(&sandbox);
}

fn assert_refused(sandbox: &Sandbox, pid: u32, place: Place) {
    let event = sandbox.request();
    assert_eq!((event.verdict, event.imds), (Verdict::Deny, Some(Imds::V1)));
    assert_eq!(event.caller.pid, pid);
    let netns = match place {
        Place::Container => Netns::Other,
        _ => Netns::Host,
    };
    assert_eq!(event.caller.netns, netns);
}

/// A way with every form of the address.
fn everywhere(way: &'static str) -> [(&'static str, &'static str); 3] {
    ADDRESSES.map(|address| (way, address))
}

/// C7: every form of the address, and zones, which mean nothing for it.
#[test]
fn c7_every_form_of_the_address() {
    let mut ways = everywhere("plain").to_vec();
    ways.push(("zone", "fd00:ec2::254"));
    ways.push(("resolved", "fd00:ec2::254"));
    assert_redirected(&ways);
}

/// C9: the socket is not blocking, bound, marked, or was connected before.
#[test]
fn c9_unusual_sockets() {
    let ways = ["nonblocking", "bound", "marked", "again"];
    assert_redirected(ways.map(everywhere).as_flattened());
    assert_redirected(&[("elsewhere-first", "169.254.169.254")]);
}

/// C9: Multipath TCP, whose kernel sockets connect below the one that the process has. A kernel that has
/// none (Debian's 5.10) refuses the socket.
#[test]
fn c9_mptcp() {
    if std::path::Path::new("/proc/sys/net/mptcp").exists() {
        return assert_redirected(&everywhere("mptcp"));
    }
    let bare = lab();
    let printed = attack(bare.room(Place::Host), SCRIPT, &["mptcp", ADDRESSES[0]]);
    assert_eq!(outcome(&printed).1, "EPROTONOSUPPORT");
}

/// C9: TCP Fast Open, which connects in sendmsg(2), or late.
#[test]
fn c9_tcp_fast_open() {
    assert_redirected(
        ["fastopen", "fastopen-connect"]
            .map(everywhere)
            .as_flattened(),
    );
}

/// A1: a socket that was redirected once does not reach the listener by itself.
#[test]
fn a1_a_socket_that_was_redirected_before_is_not_known_at_the_listener() {
    let sandbox = Sandbox::new(crate::GUARD, &["--mode", "audit"]);
    let printed = attack(room(&sandbox, Place::Host), SCRIPT, &["listener-after"]);
    assert_ne!(outcome(&printed).1, "200");
    let event = sandbox.guard.event().unwrap();
    assert!(
        matches!(event.kind, Kind::ConnectionRefused(_)),
        "{event:?}"
    );
    assert_untouched(&sandbox);
}

/// C9: io_uring, connecting at once, and by a worker thread of the kernel. Where io_uring is switched
/// off, that is what the process hears, whatever it wants to connect to.
#[test]
fn c9_io_uring() {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
        .is_ok_and(|disabled| disabled.trim() == "2");
    if disabled {
        let bare = lab();
        let printed = attack(bare.room(Place::Host), SCRIPT, &["ring"]);
        assert_eq!(outcome(&printed).1, "EPERM");
        return;
    }
    assert_redirected(&everywhere("ring"));

    let sandbox = enforced();
    let printed = attack(room(&sandbox, Place::Host), SCRIPT, &["ring-worker"]);
    let (pid, outcome) = outcome(&printed);
    assert_eq!(outcome, "401");
    let event = sandbox.request();
    assert_eq!((event.verdict, event.imds), (Verdict::Deny, Some(Imds::V1)));
    // Linux 5.12, and what was brought to 5.10 later.
    if KernelVersion::current().unwrap() >= KernelVersion::new(5, 10, 162) {
        assert_eq!(event.caller.pid, pid);
        assert_ne!(event.caller.tid, pid, "a thread of its own");
    } else {
        // Kernel threads that belong to no process.
        assert_eq!(event.caller.unresolved, Some(Unresolved::KernelThread));
    }
    assert_untouched(&sandbox);
}

/// C9: a source route over the metadata service: its address is the packet's.
#[test]
fn c9_source_routes() {
    let sandbox = enforced();
    for place in [Place::Host, Place::Container] {
        let _client = begin(room(&sandbox, place), SCRIPT, &["source-route"]);
        let seen = packet(&sandbox);
        assert_eq!((seen.layer, seen.verdict), (Layer::Backstop, Verdict::Deny));
    }
    assert_untouched(&sandbox);
}

/// C9: a source route for which a virtual machine addresses the host, which sends it on.
#[test]
fn c9_source_routes_over_the_host() {
    let sandbox = enforced();
    for links in ["all", "ctr0"] {
        let name = format!("ipv4/conf/{links}/accept_source_route");
        sandbox.lab.host().sysctl(&name, "1").unwrap();
    }
    let machine = sandbox.lab.add_outsider(Place::Container).unwrap();
    let _client = begin(&machine, SCRIPT, &["source-route-by-host"]);
    let seen = packet(&sandbox);
    assert_eq!(
        (seen.layer, seen.verdict),
        (Layer::Perimeter, Verdict::Deny)
    );
    assert_eq!(seen.came_from.as_deref(), Some("ctr0"));
    assert_untouched(&sandbox);
}

/// C9: a socket that is bound to an interface is turned to the guard like any other. In a container
/// that leads to the guard; the host's own interface does not, so the socket is freed from it, or refused
/// at once where its owner could not do that.
#[test]
fn c9_sockets_bound_to_an_interface() {
    let sandbox = enforced();
    let printed = attack(room(&sandbox, Place::Container), SCRIPT, &["device"]);
    let (pid, answer) = outcome(&printed);
    assert_eq!(answer, "401");
    assert_refused(&sandbox, pid, Place::Container);
    let printed = attack(room(&sandbox, Place::Host), SCRIPT, &["device"]);
    let (pid, answer) = outcome(&printed);
    if sockets_can_be_unbound() {
        assert_eq!(answer, "401");
        assert_refused(&sandbox, pid, Place::Host);
        let script = "
import errno, os, socket
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')
os.setuid(65534)
print(errno.errorcode[s.connect_ex(('169.254.169.254', 80))])
";
        let printed = attack(room(&sandbox, Place::Host), script, &[]);
        assert_eq!(printed, "EPERM");
    } else {
        assert_eq!(answer, "EHOSTUNREACH");
    }
    assert_untouched(&sandbox);
}
