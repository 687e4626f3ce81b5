//! Networks of one's own: translated, attached to the uplink, or made by a user.

use imds_guard::{
    lab::{CONTAINER_V4, Lab, Place, Room},
    policy::{Verdict, caller::Netns},
    record::{ConnectionRefusal, Kind, Layer},
};
use imds_guard_tests::{lab, run};

use super::{Begun, assert_untouched, attack, audited, begin, enforced, packet, ran, room, talk};
use crate::INSTANCE_ID_PATH;

const TRANSLATE: &str = include_str!("translate.py");
const SOCKETS: &str = include_str!("sockets.py");

/// Asks an address that is nobody's.
const NOBODY: [&str; 2] = ["plain", "10.88.0.99"];

/// C9: a container translates addresses after the redirect has looked at them.
#[test]
fn c9_translated_in_a_container() {
    let to_service = ["169.254.169.254", "80"];
    let bare = lab();
    let container = bare.room(Place::Container);
    attack(container, TRANSLATE, &to_service);
    assert!(attack(container, SOCKETS, &NOBODY).ends_with(" 200"));
    drop(bare);

    let sandbox = enforced();
    let container = room(&sandbox, Place::Container);
    attack(container, TRANSLATE, &to_service);
    let _client = begin(container, SOCKETS, &NOBODY);
    let seen = packet(&sandbox);
    assert_eq!((seen.layer, seen.verdict), (Layer::Backstop, Verdict::Deny));
    let cgroup = seen.sender.unwrap().cgroup.unwrap();
    assert!(cgroup.ends_with("/container"), "{cgroup}");
    assert_untouched(&sandbox);
}

/// A1: a container translates to the listener.
#[test]
fn a1_translated_to_the_listener() {
    let sandbox = audited();
    let container = room(&sandbox, Place::Container);
    attack(container, TRANSLATE, &["169.254.171.254", "254"]);
    let said = attack(container, SOCKETS, &NOBODY);
    assert!(!said.ends_with(" 200"), "{said}");
    let Kind::ConnectionRefused(refused) = sandbox.guard.event().unwrap().kind else {
        panic!("nobody was refused")
    };
    assert_eq!(refused.reason, ConnectionRefusal::NotRedirected);
    assert_untouched(&sandbox);
}

/// A machine on the host's own network, with an interface that `add` makes; `None` if the kernel
/// has none of this kind.
fn machine(lab: &Lab, add: &str, address: &str) -> Option<Room> {
    let machine = lab.add_machine().unwrap();
    let inhabitant = Begun(machine.command("sleep").arg("600").spawn().unwrap());
    let pid = inhabitant.0.id().to_string();
    let ip = |arguments: &str| {
        let arguments = arguments.replace("THERE", &pid);
        let mut ip = lab.command(Place::Host, "ip");
        run(ip.args(arguments.split(' ')))
    };
    for command in add.split("; ") {
        let done = ip(command);
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr);
            let lacks = ["Unknown device type", "not supported"];
            assert!(lacks.iter().any(|lack| why.contains(lack)), "{why}");
            return None;
        }
    }
    for arguments in [
        &format!("addr add {address}/24 dev nic0"),
        "link set nic0 up",
        "route add 169.254.169.254 dev nic0",
    ] {
        ran(machine.command("ip").args(arguments.split(' ')));
    }
    Some(machine)
}

/// How machines come by a network card, their address, and whether every kernel has the means.
const CARDS: [(&str, &str, bool); 4] = [
    (
        "link add link eth0 name nic0 netns THERE type macvlan mode bridge",
        "172.31.16.20",
        true,
    ),
    (
        "link add link eth0 name nic0 netns THERE type ipvlan mode l2",
        "172.31.16.20",
        false,
    ),
    (
        // It answers no ARP requests, so its address is of a network that is routed to the host.
        "link add link eth0 name nic0 netns THERE type ipvlan mode l3",
        "10.88.200.20",
        false,
    ),
    (
        "link add br0 type bridge; link add tap0 type veth peer name nic0 netns THERE; \
         link set tap0 master br0 up; link set eth0 master br0; link set br0 up",
        "172.31.16.20",
        true,
    ),
];

/// C9: machines on the network of the host, which forwards nothing for them.
#[test]
fn c9_machines_on_top_of_the_uplink() {
    for (add, address, everywhere) in CARDS {
        let bare = lab();
        let Some(asking) = machine(&bare, add, address) else {
            assert!(!everywhere, "this kernel cannot: {add}");
            continue;
        };
        assert!(
            attack(&asking, SOCKETS, &["plain"]).ends_with(" 200"),
            "{add}"
        );
        drop(asking);

        let sandbox = enforced();
        let asking = machine(&sandbox.lab, add, address).unwrap();
        let _client = begin(&asking, SOCKETS, &["plain"]);
        let seen = packet(&sandbox);
        assert_eq!(
            (seen.layer, seen.verdict),
            (Layer::Perimeter, Verdict::Deny)
        );
        assert_eq!(seen.source.to_string(), address);
        assert_untouched(&sandbox);
    }
}

/// C9: connections of a virtual machine, forwarded.
#[test]
fn c9_connections_that_are_forwarded() {
    let bare = lab();
    let machine = bare.add_outsider(Place::Container).unwrap();
    for address in ["169.254.169.254", "fd00:ec2::254"] {
        assert!(attack(&machine, SOCKETS, &["plain", address]).ends_with(" 200"));
    }
    drop(machine);

    let sandbox = enforced();
    for address in ["169.254.169.254", "fd00:ec2::254"] {
        let machine = sandbox.lab.add_outsider(Place::Container).unwrap();
        let _client = begin(&machine, SOCKETS, &["plain", address]);
        let seen = packet(&sandbox);
        assert_eq!(
            (seen.layer, seen.verdict),
            (Layer::Perimeter, Verdict::Deny)
        );
        assert_eq!(seen.came_from.as_deref(), Some("ctr0"));
    }
    assert_untouched(&sandbox);
}

/// C6: a user makes a namespace in which the addresses of the service and of the listener are their
/// own. They reach themselves.
#[test]
fn c6_a_namespace_with_addresses_of_ones_own() {
    let sandbox = enforced();
    let host = room(&sandbox, Place::Host);
    let own = r"
import socket, subprocess, threading
for command in ('link set lo up', 'addr add 169.254.169.254/32 dev lo',
                'addr add 169.254.171.254/32 dev lo'):
    subprocess.run(['ip', *command.split()], check=True)
servers = [socket.create_server((address, port))
           for address, port in (('169.254.169.254', 80), ('169.254.171.254', 254))]
def serve(server):
    connection, _ = server.accept()
    connection.sendall(b'my own')
    connection.close()
for server in servers:
    threading.Thread(target=serve, args=(server,), daemon=True).start()
client = socket.create_connection(('169.254.169.254', 80), timeout=20)
print(client.recv(100).decode())
";
    let nobody = "--reuid 65534 --regid 65534 --clear-groups unshare --user --map-root-user --net";
    let mut command = host.command("setpriv");
    command.args(nobody.split(' ')).arg("python3");
    assert_eq!(ran(command.args(["-c", own])), "my own");
    // The guard has heard nothing of it: the next one it hears of is the next one who asks.
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    let _answer = sandbox.curl(Place::Host, &[url]);
    assert_eq!(sandbox.caller().comm, "curl");
    assert_untouched(&sandbox);
}

/// C6: a container takes the address of another one, and its source port at the same time. Neither
/// is taken for the other.
#[test]
fn c6_the_address_and_port_of_another_container() {
    let sandbox = enforced();
    let other = sandbox.lab.add_container("other").unwrap();
    let address = format!("{CONTAINER_V4}/32");
    ran(other
        .command("ip")
        .args(["addr", "add", &address, "dev", "lo"]));
    let from_there = format!(
        r"
import os, socket
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('{CONTAINER_V4}', 4000))
s.setblocking(False)
s.connect_ex(('169.254.169.254', 80))
s.settimeout(20)
"
    );
    let hold = format!("{from_there}print('sent', flush=True)\nos.read(0, 1)\n");
    // The one has sent its SYN, and keeps sending.
    let (_holder, mut said) = talk(&other, &hold, &[]);
    assert_eq!(said(), "sent");

    let ask = format!(
        "{from_there}
import select
select.select([], [s], [], 20)
s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\n\\r\\n')
print(os.getpid(), s.recv(100).split()[1].decode())
"
    );
    let said = attack(room(&sandbox, Place::Container), &ask, &[]);
    let (pid, status) = said.split_once(' ').unwrap();
    assert_eq!(status, "401");
    let caller = sandbox.caller();
    assert_eq!(
        (caller.pid.to_string().as_str(), caller.netns),
        (pid, Netns::Other)
    );
    assert!(caller.cgroup.unwrap().ends_with("/container"));
    assert_untouched(&sandbox);
}
