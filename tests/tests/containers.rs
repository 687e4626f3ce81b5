//! Real containers, and networks like theirs, behind the guard.

use std::process::Command;

use imds_guard::{
    lab::{Place, Room, fake_imds::INSTANCE_ID},
    policy::{
        Imds, Reason, Verdict,
        caller::{Netns, Runtime},
    },
};
use imds_guard_tests::{Sandbox, docker::Docker, nested::Nested, run};

use crate::{GUARD, INSTANCE_ID_PATH};

const ADDRESSES: [&str; 2] = ["169.254.169.254", "fd00:ec2::254"];

const TOKEN_REQUEST: &str =
    r"PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60";

/// A shell script that sends a request with busybox, and prints the answer.
fn ask(address: &str, request: &str) -> String {
    format!(r"printf '{request}\r\n\r\n' | timeout 20 nc {address} 80")
}

fn v1(address: &str) -> String {
    ask(address, &format!("GET {INSTANCE_ID_PATH} HTTP/1.0"))
}

#[test]
fn docker_containers_are_refused_v1_and_named() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let docker = Docker::start(&sandbox.lab);
    for (network, netns, hops) in [("bridge", Netns::Other, 2), ("host", Netns::Host, 1)] {
        for address in ADDRESSES {
            let ran = docker.run(&["--network", network], &v1(address));
            assert!(
                ran.output.starts_with("HTTP/1.0 401"),
                "{network} {address} {ran:?}"
            );
            let event = sandbox.request();
            assert_eq!(
                (event.verdict, event.reason),
                (Verdict::Deny, Reason::NoToken)
            );
            assert_eq!((event.caller.netns, event.hops), (netns, hops));
            assert_eq!(event.caller.container_id, Some(ran.id));
            assert_eq!(event.caller.container_runtime, Some(Runtime::Docker));
            assert_eq!(event.caller.exe.as_deref(), Some("/bin/busybox"));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

#[test]
fn docker_containers_are_served_v2_within_the_hop_limit() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce", "--hop-limit", "2"]);
    sandbox.lab.imds().set_hop_limit(2);
    let docker = Docker::start(&sandbox.lab);
    for address in ADDRESSES {
        let get =
            format!("GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\nX-aws-ec2-metadata-token: '$token'");
        let script = format!(
            "token=$({} | tail -n 1); {}",
            ask(address, TOKEN_REQUEST),
            ask(address, &get)
        );
        let ran = docker.run(&[], &script);
        assert!(ran.output.starts_with("HTTP/1.0 200"), "{address} {ran:?}");
        assert!(ran.output.ends_with(INSTANCE_ID), "{ran:?}");
        for imds in [Imds::Token, Imds::V2] {
            let event = sandbox.request();
            assert_eq!((event.verdict, event.imds), (Verdict::Allow, Some(imds)));
            assert_eq!(event.caller.container_id.as_ref(), Some(&ran.id));
        }
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!((reached.tokens_issued, reached.v1_requests), (2, 0));
}

/// A container without any route is told so by its own kernel, at once. In audit mode, so that a way
/// to the service that nobody thought of would show.
#[test]
fn a_docker_container_without_network_is_told_at_once() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit"]);
    let docker = Docker::start(&sandbox.lab);
    // Docker switches IPv6 off where a container has no network for it.
    let told = ["Network is unreachable", "Cannot assign requested address"];
    for (address, told) in ADDRESSES.into_iter().zip(told) {
        let ran = docker.run(&["--network", "none"], &v1(address));
        assert!(ran.output.contains(told), "{address} {ran:?}");
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// Docker drops what an internal network would have the host forward, which would be all for the
/// metadata service; but the listener is the host itself. So the guard's own policy is what holds
/// these containers back: in enforce mode they get neither answers to v1 nor tokens.
#[test]
fn docker_containers_of_an_internal_network_reach_the_guard_and_no_farther() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let docker = Docker::start(&sandbox.lab);
    let gateways = ["10.77.0.1", "2001:db8:77::1"];
    docker.done([
        "network",
        "create",
        "--internal",
        "--ipv6",
        "--subnet",
        "10.77.0.0/24",
        "--subnet",
        "2001:db8:77::/64",
        "inner",
    ]);
    // Some versions of Docker give them this route themselves.
    let options = ["--network", "inner", "--cap-add", "NET_ADMIN"];
    for (address, gateway) in ADDRESSES.into_iter().zip(gateways) {
        for (request, reason, status) in [
            (v1(address), Reason::NoToken, "401"),
            (ask(address, TOKEN_REQUEST), Reason::HopLimit, "403"),
        ] {
            let script = format!("ip route replace default via {gateway}; {request}");
            let ran = docker.run(&options, &script);
            let expected = format!("HTTP/1.0 {status}");
            assert!(ran.output.starts_with(&expected), "{address} {ran:?}");
            let event = sandbox.request();
            assert_eq!((event.verdict, event.reason), (Verdict::Deny, reason));
            assert_eq!(event.caller.container_id, Some(ran.id));
        }
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// Runs `ip` with these words, and panics if it fails.
fn ip(room: &Room, words: &str) {
    done(room.command("ip").args(words.split(' ')));
}

fn done(command: &mut Command) -> String {
    let output = run(command);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The status of a v1 request by curl.
fn v1_status(curl: &mut Command, address: &str) -> String {
    let host = if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    };
    curl.args([
        "-sg",
        "--max-time",
        "20",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
    ]);
    let output = run(curl.arg(format!("http://{host}{INSTANCE_ID_PATH}")));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_namespace_behind_a_bridge_is_guarded() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let bridged = sandbox.lab.add_container("bridged").unwrap();
    let host = sandbox.lab.room(Place::Host);
    // Its end of the cable goes into a bridge, which takes over the gateway's addresses.
    for words in [
        "link add br0 type bridge",
        "address flush dev ctr1",
        "link set ctr1 master br0",
        "address add 10.88.1.1/24 dev br0",
        "address add 2001:db8:88:1::1/64 dev br0 nodad",
        "link set br0 up",
    ] {
        ip(host, words);
    }
    for address in ADDRESSES {
        assert_eq!(
            v1_status(&mut bridged.command("curl"), address),
            "401",
            "{address}"
        );
        let event = sandbox.request();
        assert_eq!((event.caller.netns, event.hops), (Netns::Other, 2));
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

/// Asks over IPv4 and IPv6, which the guard must refuse and count three hops for.
fn assert_guarded(nested: &Nested, sandbox: &Sandbox) {
    for address in ADDRESSES {
        assert_eq!(
            v1_status(&mut nested.command("curl"), address),
            "401",
            "{address}"
        );
        let event = sandbox.request();
        assert_eq!((event.caller.netns, event.hops), (Netns::Other, 3));
        assert_eq!(event.caller.comm, "curl");
        let cgroup = event.caller.cgroup.as_deref();
        assert!(cgroup.unwrap().ends_with("/outer"), "{cgroup:?}");
    }
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

#[test]
fn a_namespace_within_a_container_is_guarded() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let nested = Nested::new(&sandbox.lab);
    nested.show_the_way_back(&sandbox.lab);
    assert_guarded(&nested, &sandbox);
}

#[test]
fn a_namespace_behind_a_containers_masquerade_is_guarded() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let nested = Nested::new(&sandbox.lab);
    // Other ports than the clients chose, as they would all be translated on a busy host.
    for (program, source) in ["iptables", "ip6tables"].into_iter().zip(Nested::NETWORKS) {
        let words = format!(
            "-t nat -A POSTROUTING -s {} -p tcp -j MASQUERADE --to-ports 20000-21000",
            source.0
        );
        done(nested.outer.command(program).args(words.split(' ')));
    }
    assert_guarded(&nested, &sandbox);
}
