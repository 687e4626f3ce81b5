//! How far a session token travels.

use std::process::Command;

use imds_guard::{
    lab::{Place, Room},
    policy::{Reason, Verdict},
    record::AnsweredBy,
};
use imds_guard_tests::{Sandbox, nested::Nested, python, run};

use crate::{ADDRESSES, GUARD};

/// Fetches a token with curl, in at most so many seconds. Returns the status, 0 if there was none.
fn status_within(command: &mut Command, seconds: &str, address: &str) -> String {
    let output = run(command
        .args(["-sg", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT"])
        .args(["-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"])
        .args(["--max-time", seconds])
        .arg(format!("http://{address}/latest/api/token")));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn status(command: &mut Command, address: &str) -> String {
    status_within(command, "20", address)
}

/// A guard with this limit, in front of an instance with that one.
fn sandbox(mode: &str, limit: &str, instance: u8, more: &[&str]) -> Sandbox {
    let arguments = [&["--mode", mode, "--hop-limit", limit], more].concat();
    let sandbox = Sandbox::new(GUARD, &arguments);
    sandbox.lab.imds().set_hop_limit(instance);
    sandbox
}

#[test]
fn host_container_and_nested_container_are_one_two_and_three_hops_away() {
    for limit in 1..=3 {
        let sandbox = sandbox("enforce", &limit.to_string(), 64, &[]);
        let nested = Nested::new(&sandbox.lab);
        nested.show_the_way_back(&sandbox.lab);
        let lab = &sandbox.lab;
        for address in [ADDRESSES[0], ADDRESSES[1]] {
            for (hops, mut curl) in [
                (1, lab.command(Place::Host, "curl")),
                (2, lab.command(Place::Container, "curl")),
                (3, nested.command("curl")),
            ] {
                let expected = if hops <= limit { "200" } else { "403" };
                assert_eq!(status(&mut curl, address), expected, "{hops} of {limit}");
                let event = sandbox.request();
                assert_eq!(event.hops, hops);
                if hops > limit {
                    assert_eq!(event.reason, Reason::HopLimit);
                }
            }
        }
        let issued = lab.imds().counters().tokens_issued;
        assert_eq!(issued, 2 * u64::from(limit));
    }
}

/// Nobody gets further through the guard than without it, in either mode.
#[test]
fn the_instances_own_limit_holds_too() {
    for mode in ["enforce", "audit"] {
        let sandbox = sandbox(mode, "3", 1, &[]);
        let lab = &sandbox.lab;
        for address in ADDRESSES {
            let container = status(&mut lab.command(Place::Container, "curl"), address);
            assert_eq!(container, "403", "{mode} {address}");
            let event = sandbox.request();
            assert_eq!(
                (event.verdict, event.reason, event.answered_by),
                (Verdict::Deny, Reason::InstanceHopLimit, AnsweredBy::Guard)
            );
            let host = status(&mut lab.command(Place::Host, "curl"), address);
            assert_eq!(host, "200", "{mode} {address}");
            assert_eq!(sandbox.request().reason, Reason::TokenRequest);
        }
        // It is looked at each time: an owner can change it.
        lab.imds().set_hop_limit(2);
        let container = status(&mut lab.command(Place::Container, "curl"), ADDRESSES[0]);
        assert_eq!(container, "200", "{mode}");
    }
}

#[test]
fn beyond_the_limit_there_can_be_silence_as_on_ec2() {
    for (limit, instance, reason) in [
        ("1", 64, Reason::HopLimit),
        ("2", 1, Reason::InstanceHopLimit),
    ] {
        let sandbox = sandbox("enforce", limit, instance, &["--hop-limit-action", "drop"]);
        let mut curl = sandbox.lab.command(Place::Container, "curl");
        // curl's own time-out is what ends it.
        assert_eq!(status_within(&mut curl, "1", ADDRESSES[0]), "000");
        let event = sandbox.request();
        assert_eq!((event.verdict, event.reason), (Verdict::Deny, reason));
        assert_eq!(event.answered_by, AnsweredBy::Nobody);
        let mut curl = sandbox.lab.command(Place::Host, "curl");
        assert_eq!(status(&mut curl, ADDRESSES[0]), "200");
    }
}

/// One container gets further than the rest.
#[test]
fn a_rule_gives_one_container_a_limit_of_its_own() {
    let lab = imds_guard_tests::lab();
    let driver = lab.add_container("driver").unwrap();
    let name = lab.cgroup().path().file_name().unwrap().display();
    let rules = lab.config();
    let text = format!("[[rule]]\nname = 'csi-driver'\ncgroup = '/{name}/driver'\nhop_limit = 2\n");
    std::fs::write(&rules, text).unwrap();
    let mut command = lab.guard_command(GUARD);
    command.args(["--mode", "enforce"]);
    let guard = imds_guard::lab::Guard::spawn(&mut command).unwrap();
    lab.imds().set_hop_limit(2);
    let rule = |room: &Room, expected: &str| {
        assert_eq!(status(&mut room.command("curl"), ADDRESSES[0]), expected);
        guard.request().unwrap().rule
    };
    assert_eq!(rule(&driver, "200").as_deref(), Some("csi-driver"));
    assert_eq!(rule(lab.room(Place::Container), "403"), None);
}

/// Asks for a token with a TTL of its own for the connection, and prints how the answer came: its
/// TTLs, or that none did.
const WITH_TTL: &str = r"
import socket, sys
ttl = int(sys.argv[1])
seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
s = socket.socket()
s.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
s.settimeout(2)
s.connect(('169.254.169.254', 80))
s.sendall(b'PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n')
try:
    status = s.recv(65536).split()[1].decode()
except TimeoutError:
    print('nothing')
    sys.exit()
mine = s.getsockname()[1]
ttls = set()
seen.setblocking(False)
while True:
    try:
        packet = seen.recv(65536)
    except BlockingIOError:
        break
    header = (packet[0] & 15) * 4
    tcp = packet[header:]
    carries = len(packet) > header + (tcp[12] >> 4) * 4 if packet[9] == 6 else False
    if carries and int.from_bytes(tcp[2:4], 'big') == mine:
        ttls.add(packet[8])
print(status, *ttls)
";

/// A client that hides how far away it is gets no answer: what it is sent does not travel that far.
#[test]
fn the_answer_itself_does_not_travel_further() {
    for (limit, instance, expected) in
        [("2", 64, "nothing"), ("3", 2, "nothing"), ("3", 3, "200 1")]
    {
        let sandbox = sandbox("enforce", limit, instance, &[]);
        let nested = Nested::new(&sandbox.lab);
        nested.show_the_way_back(&sandbox.lab);
        let ask = |mut command: Command, ttl: &str| {
            let output = run(command.args(["-c", WITH_TTL, ttl]));
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{complaint}");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        // 65, so that the container in between makes it 64, as if it came from there.
        let hidden = ask(nested.command(&python()), "65");
        assert_eq!(hidden, expected, "limit {limit}, instance's {instance}");
        let event = sandbox.request();
        assert_eq!((event.verdict, event.hops), (Verdict::Allow, 2));

        let container = ask(sandbox.lab.command(Place::Container, python()), "64");
        let ttl = limit.parse::<u8>().unwrap().min(instance) - 1;
        assert_eq!(container, format!("200 {ttl}"));
    }
}
