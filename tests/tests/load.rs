//! Unprivileged local users do their worst; everybody else is served, and memory stays bounded.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use imds_guard::{
    lab::{Lab, Place},
    record::{Event, Kind},
};
use imds_guard_tests::{Sandbox, lab, python, run};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{GUARD, INSTANCE_ID_PATH};

/// Resident memory that the guard never needs more of, in KiB.
const MEMORY: u64 = 64 * 1024;

/// Becomes an ordinary user who may open many files. Such a user may not be able to read Python's own,
/// so what is needed is imported before.
const BECOME_NOBODY: &str = "
import os, resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
";

/// Starts an attack in a cgroup of its own, and waits until it says that it has begun.
fn attack(lab: &Lab, place: Place, script: &str) -> (Child, imds_guard::lab::Room) {
    let room = lab.add_room(place, "attacker").unwrap();
    let mut child = room
        .command(python())
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "begun\n", "the attack did not begin");
    (child, room)
}

/// Another caller, who fetches a token and uses it, ten times on connections of their own. Without the
/// guard's limits, one of them would wait for half a minute.
fn others_are_served(lab: &Lab) {
    let script = format!(
        r"
import http.client
for _ in range(10):
    token = ''
    for method, path, headers in [
        ('PUT', '/latest/api/token', lambda: {{'X-aws-ec2-metadata-token-ttl-seconds': '60'}}),
        ('GET', '{INSTANCE_ID_PATH}', lambda: {{'X-aws-ec2-metadata-token': token}}),
    ]:
        client = http.client.HTTPConnection('169.254.169.254', 80, timeout=5)
        client.request(method, path, headers=headers())
        answer = client.getresponse()
        token = answer.read().decode()
        assert answer.status == 200, answer.status
        client.close()
print('served')
"
    );
    let output = run(lab.command(Place::Host, python()).args(["-c", &script]));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "served\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The most resident memory that a process has had, in KiB.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

fn end((mut child, room): (Child, imds_guard::lab::Room)) {
    child.kill().unwrap();
    child.wait().unwrap();
    drop(room);
}

/// G1: one user opens 10,000 connections and says nothing.
#[test]
fn g1_ten_thousand_silent_connections() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = format!(
        r"{BECOME_NOBODY}
kept = []
for n in range(10000):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(('169.254.169.254', 80))
    kept.append(s)
    if n == 2000: print('begun', flush=True)
sys.stdin.read()
"
    );
    let attacker = attack(&sandbox.lab, Place::Host, &script);
    others_are_served(&sandbox.lab);
    assert!(peak_memory(sandbox.guard.pid()) < MEMORY);
    end(attacker);
}

/// G1: a container fills the listener's queue with connections that it made up and never completes.
#[test]
fn g1_ten_thousand_half_open_connections() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = r"
import socket, struct, sys
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
target = socket.inet_aton('169.254.171.254')
for n in range(10000):
    source = struct.pack('!BBBB', 10, 88, 0, 3 + n % 250)
    tcp = struct.pack('!HHIIBBHHH', 1024 + n % 60000, 254, n, 0, 5 << 4, 2, 65535, 0, 0)
    pseudo = source + target + struct.pack('!BBH', 0, 6, len(tcp))
    tcp = tcp[:16] + struct.pack('!H', checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack('!BBHHHBBH', 0x45, 0, 40, n, 0, 64, 6, 0) + source + target
    raw.sendto(ip + tcp, ('169.254.171.254', 0))
print('begun', flush=True)
sys.stdin.read()
";
    // The answers go to addresses of the container's own network, where nobody is.
    let attacker = attack(&sandbox.lab, Place::Container, script);
    let half_open = run(sandbox
        .lab
        .command(Place::Host, "sh")
        .args(["-c", "grep -c ' 03 ' /proc/net/tcp"]));
    let half_open = String::from_utf8_lossy(&half_open.stdout).into_owned();
    assert!(
        half_open.trim().parse::<u32>().unwrap() < 200,
        "{half_open}"
    );
    others_are_served(&sandbox.lab);
    end(attacker);
}

/// A2: one user sends the heads of requests a byte at a time, on as many connections as there are.
#[test]
fn a2_slow_heads() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = format!(
        r"{BECOME_NOBODY}
open_ones = []
begun = False
while True:
    while len(open_ones) < 1500:
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(('169.254.169.254', 80))
        open_ones.append(s)
    still = []
    for s in open_ones:
        try:
            s.send(b'X')
            still.append(s)
        except BlockingIOError:
            still.append(s)
        except OSError:
            s.close()
    open_ones = still
    if not begun:
        print('begun', flush=True)
        begun = True
    time.sleep(0.1)
"
    );
    let attacker = attack(&sandbox.lab, Place::Host, &script);
    others_are_served(&sandbox.lab);
    assert!(peak_memory(sandbox.guard.pid()) < MEMORY);
    end(attacker);
}

/// G3: one user connects and leaves again, as fast as they can, to fill the kernel's tables.
#[test]
fn g3_map_filling_connects() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = format!(
        r"{BECOME_NOBODY}
for n in range(1000000):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(('169.254.169.254', 80))
    s.close()
    if n == 20000: print('begun', flush=True)
"
    );
    let attacker = attack(&sandbox.lab, Place::Host, &script);
    others_are_served(&sandbox.lab);
    assert!(peak_memory(sandbox.guard.pid()) < MEMORY);
    end(attacker);
}

/// G1, F: 100,000 requests without a token while nobody reads the events. None is forwarded, others are
/// served, and every event is there or counted.
#[test]
fn g1_a_flood_of_v1_requests() {
    const REQUESTS: u64 = 100_000;
    let lab = lab();
    let mut guard = lab
        .guard_command(GUARD)
        .args(["--mode", "enforce", "--on-stop", "detach"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut events = BufReader::new(guard.stdout.take().unwrap()).lines();
    let mut next = || {
        let line = events.next()?.unwrap();
        Some(serde_json::from_str::<Event>(&line).unwrap().kind)
    };
    assert!(matches!(next(), Some(Kind::Started(_))));

    // Pipelined, and over several connections.
    let script = format!(
        r"
import socket, threading
def work():
    s = socket.create_connection(('169.254.169.254', 80))
    request = b'GET {INSTANCE_ID_PATH} HTTP/1.1\r\nHost: x\r\n\r\n'
    for _ in range({REQUESTS} // 4 // 50):
        s.sendall(request * 50)
        answers = b''
        while answers.count(b'HTTP/1.1 401') < 50 or not answers.endswith(b'</html>\n'):
            part = s.recv(1 << 20)
            assert part
            answers += part
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
print('begun', flush=True)
for thread in threads: thread.join()
"
    );
    let (mut attacker, _room) = attack(&lab, Place::Host, &script);
    others_are_served(&lab);
    assert!(attacker.wait().unwrap().success());
    assert!(
        peak_memory(guard.id()) < MEMORY,
        "{}",
        peak_memory(guard.id())
    );
    assert_eq!(lab.imds().counters().v1_requests, 0);

    let pid = Pid::from_raw(i32::try_from(guard.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let (mut requests, mut lost, mut in_all) = (0, 0, None);
    while let Some(kind) = next() {
        match kind {
            Kind::Request(_) => requests += 1,
            Kind::EventsLost { count } => lost += count,
            Kind::Stopped(stopped) => in_all = Some(stopped.events_lost),
            other => panic!("{other:?}"),
        }
    }
    assert!(guard.wait().unwrap().success());
    assert_eq!(requests + lost, REQUESTS + 20, "{requests} and {lost}");
    assert!(lost > 0, "the queue was never full");
    assert_eq!(in_all, Some(lost));
}
