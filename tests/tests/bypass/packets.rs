//! Packets that no TCP socket of the kernel has made.

use imds_guard::{
    lab::{Place, Room},
    policy::Verdict,
    record::{Endpoint, Layer},
};
use imds_guard_tests::Sandbox;

use super::{assert_untouched, attack, audited, enforced, packet, packet_from, room};

const SCRIPT: &str = include_str!("packets.py");

/// A means, and the IP version it is used with.
type Attack = (&'static str, u8);

/// Each attack gets through where the guard only watches, and is stopped by this layer where it
/// enforces.
fn assert_stopped(
    attacks: &[Attack],
    layer: Layer,
    from: impl Fn(&Sandbox) -> Option<Room>,
    place: Place,
) {
    let sandbox = audited();
    let outside = from(&sandbox);
    let here = outside.as_ref().unwrap_or(room(&sandbox, place));
    for (attack, port) in attacks.iter().zip(4000..) {
        assert_eq!(try_it(here, *attack, port), "answered 200", "{attack:?}");
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!(reached.v1_requests, attacks.len() as u64);
    drop(outside);
    drop(sandbox);

    let sandbox = enforced();
    let outside = from(&sandbox);
    let here = outside.as_ref().unwrap_or(room(&sandbox, place));
    for (attack, port) in attacks.iter().zip(4000..) {
        assert_eq!(try_it(here, *attack, port), "silence", "{attack:?}");
        let seen = match attack.0 {
            // One of the two, or both, do not show their ports.
            "fragments" => {
                let _first = packet(&sandbox);
                packet(&sandbox)
            }
            // Neither do these.
            "extensions9" => packet(&sandbox),
            _ => packet_from(&sandbox, port),
        };
        let endpoint = if attack.1 == 4 {
            Endpoint::Ipv4
        } else {
            Endpoint::Ipv6
        };
        assert_eq!(
            (seen.layer, seen.verdict, seen.endpoint),
            (layer, Verdict::Deny, endpoint),
            "{attack:?}"
        );
    }
    assert_untouched(&sandbox);
}

fn try_it(room: &Room, (means, version): Attack, port: u16) -> String {
    attack(
        room,
        SCRIPT,
        &[means, &version.to_string(), &port.to_string()],
    )
}

/// C9: raw sockets, with headers of every shape.
#[test]
fn c9_raw_sockets() {
    let attacks = [
        ("raw", 4),
        ("raw", 6),
        ("elsewhere", 4),
        ("options", 4),
        ("routing", 6),
        ("extensions4", 6),
    ];
    for place in [Place::Host, Place::Container] {
        assert_stopped(&attacks, Layer::Backstop, |_| None, place);
    }
}

/// C9: fragments that hide the ports, and more extension headers than are looked through.
#[test]
fn c9_fragments() {
    let attacks = [("fragments", 4), ("fragments", 6)];
    assert_stopped(&attacks, Layer::Backstop, |_| None, Place::Host);
}

/// C9: more extension headers than are looked through; newer kernels do not take so many either, so
/// that nothing is lost.
#[test]
fn c9_too_many_extension_headers() {
    let sandbox = enforced();
    // The kernel is told to keep out of each port, and the host's forwards for the container.
    for (place, port) in [(Place::Host, 4000), (Place::Container, 4001)] {
        let here = room(&sandbox, place);
        assert_eq!(try_it(here, ("extensions9", 6), port), "silence");
        let seen = packet(&sandbox);
        assert_eq!(
            (seen.layer, seen.verdict, seen.source_port),
            (Layer::Backstop, Verdict::Deny, None)
        );
    }
    assert_untouched(&sandbox);
}

/// C9: packet sockets on the uplink, which no cgroup program sees.
#[test]
fn c9_packet_sockets() {
    let attacks = [
        ("packet", 4),
        ("packet", 6),
        ("lying", 4),
        ("lying", 6),
        ("datagram", 4),
        ("datagram", 6),
        ("vlan1", 4),
        ("vlan2", 6),
    ];
    assert_stopped(&attacks, Layer::Perimeter, |_| None, Place::Host);
}

/// C9: more tags than are looked through; receivers take off all of them.
#[test]
fn c9_frames_with_many_tags() {
    let sandbox = audited();
    let host = room(&sandbox, Place::Host);
    assert_eq!(try_it(host, ("vlan3", 4), 4000), "answered 200");
    drop(sandbox);

    let sandbox = enforced();
    let host = room(&sandbox, Place::Host);
    for (attack, port) in [("vlan3", 4), ("vlan9", 6)].into_iter().zip(4000..) {
        assert_eq!(try_it(host, attack, port), "silence", "{attack:?}");
        let seen = packet(&sandbox);
        assert_eq!(
            (seen.layer, seen.verdict, seen.source_port),
            (Layer::Perimeter, Verdict::Deny, None)
        );
    }
    assert_untouched(&sandbox);
}

/// C9: what the host forwards: virtual machines, and packet sockets of containers. The first has
/// processes that nobody watches.
#[test]
fn c9_forwarded_packets() {
    let attacks = [
        ("raw", 4),
        ("raw", 6),
        ("options", 4),
        ("routing", 6),
        ("extensions4", 6),
        ("fragments", 4),
        ("fragments", 6),
        ("packet", 4),
        ("packet", 6),
    ];
    let machine = |sandbox: &Sandbox| Some(sandbox.lab.add_outsider(Place::Container).unwrap());
    assert_stopped(&attacks, Layer::Perimeter, machine, Place::Container);
    let attacks = [("packet", 4), ("packet", 6)];
    assert_stopped(&attacks, Layer::Perimeter, |_| None, Place::Container);
}

/// C9: raw sockets of the host that nobody watches.
#[test]
fn c9_raw_sockets_outside_the_watched_cgroup() {
    let attacks = [("raw", 4), ("raw", 6), ("elsewhere", 4)];
    let outside = |sandbox: &Sandbox| Some(sandbox.lab.add_outsider(Place::Host).unwrap());
    assert_stopped(&attacks, Layer::Perimeter, outside, Place::Host);
}

/// C9, not stopped: packet sockets that ask the kernel not to queue (PACKET_QDISC_BYPASS) skip the
/// programs of the interface. That needs CAP_NET_RAW in the host's own network namespace; in that of
/// a container it gains nothing.
#[test]
fn c9_unqueued_packets_pass_from_the_host_alone() {
    let sandbox = enforced();
    let host = room(&sandbox, Place::Host);
    assert_eq!(try_it(host, ("unqueued", 4), 4000), "answered 200");
    assert_eq!(sandbox.lab.imds().counters().v1_requests, 1);

    let container = room(&sandbox, Place::Container);
    assert_eq!(try_it(container, ("unqueued", 4), 4001), "silence");
    let seen = packet_from(&sandbox, 4001);
    assert_eq!(
        (seen.layer, seen.verdict),
        (Layer::Perimeter, Verdict::Deny)
    );
    assert_eq!(seen.came_from.as_deref(), Some("ctr0"));
    assert_eq!(sandbox.lab.imds().counters().v1_requests, 1);
}
