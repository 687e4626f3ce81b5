//! Sockets that were made elsewhere, earlier or by somebody else than those who use them.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use imds_guard::{
    lab::{Guard, Place, Room},
    policy::{
        Reason, Verdict,
        caller::{Netns, Unresolved},
    },
    record::{Kind, Layer},
};
use imds_guard_tests::{Sandbox, lab, python};

use super::{assert_untouched, attack, begin, enforced, packet, ran, room, talk};
use crate::{GUARD, INSTANCE_ID_PATH};

const SCRIPT: &str = include_str!("handed.py");

/// C9: connected before the guard came; what it asks then does not leave.
#[test]
fn c9_a_socket_that_is_older_than_the_guard() {
    for enforces in [false, true] {
        let lab = lab();
        let (mut client, mut said) = talk(lab.room(Place::Host), SCRIPT, &["older"]);
        assert_eq!(said(), "connected");
        let mode = if enforces { "enforce" } else { "audit" };
        let guard = Guard::spawn(lab.guard_command(GUARD).args(["--mode", mode])).unwrap();
        client.tell();
        let Kind::Packet(seen) = guard.event().unwrap().kind else {
            panic!("no packet was seen")
        };
        assert_eq!(seen.layer, Layer::Backstop);
        let cgroup = seen.sender.unwrap().cgroup.unwrap();
        assert!(cgroup.ends_with("/host"), "{cgroup}");
        if enforces {
            assert_eq!(seen.verdict, Verdict::Deny);
            assert_eq!(lab.imds().counters().requests, 0);
        } else {
            assert_eq!(seen.verdict, Verdict::Audit);
            assert_eq!(said(), "200");
        }
    }
}

/// What a client that moves to another cgroup says: who connected, and what came of it.
fn come_apart(room: &Room, way: &str, to: &Room) -> (u32, String) {
    let cgroup = to.cgroup().path().to_str().unwrap();
    let printed = attack(room, SCRIPT, &[way, cgroup]);
    let (pid, outcome) = printed.split_once('\n').unwrap_or((&printed, "nothing"));
    (pid.parse().unwrap(), outcome.to_owned())
}

/// C5: the kernel programs belong to the cgroup that a socket was made in. From outside the watched
/// one, the packets are stopped, whoever has the socket.
#[test]
fn c4_c5_a_socket_from_outside_is_stopped_on_the_uplink() {
    for way in ["enter-then-connect", "passed"] {
        let bare = lab();
        let outside = bare.add_outsider(Place::Host).unwrap();
        let (_, outcome) = come_apart(&outside, way, bare.room(Place::Host));
        assert_eq!(outcome, "200", "{way}");
        drop(outside);

        let sandbox = enforced();
        let outside = sandbox.lab.add_outsider(Place::Host).unwrap();
        let cgroup = room(&sandbox, Place::Host).cgroup().path();
        let _client = begin(&outside, SCRIPT, &[way, cgroup.to_str().unwrap()]);
        let seen = packet(&sandbox);
        assert_eq!(
            (seen.layer, seen.verdict),
            (Layer::Perimeter, Verdict::Deny)
        );
        assert_untouched(&sandbox);
    }
}

/// C5: a socket from inside stays redirected, wherever its process goes.
#[test]
fn c5_moving_out_of_the_watched_cgroup_does_not_help() {
    let sandbox = enforced();
    let outside = sandbox.lab.add_outsider(Place::Host).unwrap();
    let host = room(&sandbox, Place::Host);
    for way in ["enter-then-connect", "connect-then-enter", "passed"] {
        let (pid, outcome) = come_apart(host, way, &outside);
        assert_eq!(outcome, "401", "{way}");
        let caller = sandbox.caller();
        assert_eq!((caller.pid, caller.netns), (pid, Netns::Host), "{way}");
    }
    assert_untouched(&sandbox);
}

/// C4, C2: the one who connected is named, not the one who asks. Whoever gives away a connection
/// speaks for those who have it.
#[test]
fn c2_c4_who_connected_answers_for_it() {
    let sandbox = enforced();
    let host = room(&sandbox, Place::Host);
    for way in ["inherited", "dropped"] {
        let (pid, outcome) = come_apart(host, way, host);
        assert_eq!(outcome, "401", "{way}");
        let caller = sandbox.caller();
        assert_eq!((caller.pid, caller.uid), (pid, 0), "{way}");
    }
    // Of two cgroups the one that the process was in is named.
    let sibling = sandbox.lab.add_room(Place::Host, "sibling").unwrap();
    let (pid, outcome) = come_apart(host, "passed", &sibling);
    assert_eq!(outcome, "401");
    let caller = sandbox.caller();
    assert_eq!(caller.pid, pid);
    let cgroup = caller.cgroup.unwrap();
    assert!(cgroup.ends_with("/sibling"), "{cgroup}");
    assert_untouched(&sandbox);
}

/// C5: a cgroup namespace shows a process another path; the guard sees the true one.
#[test]
fn c5_cgroup_namespaces() {
    let sandbox = enforced();
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    let inside = ["--cgroup", "curl", "-s", "-o", "/dev/null", &url];
    let mut unshare = room(&sandbox, Place::Host).command("unshare");
    assert!(imds_guard_tests::run(unshare.args(inside)).status.success());
    let cgroup = sandbox.caller().cgroup.unwrap();
    assert!(cgroup.ends_with("/host"), "{cgroup}");
    assert_untouched(&sandbox);
}

/// C5: a cgroup whose name is not text, and one that is nested without end: rules on the
/// container around it hold, root in there is not the host's, and who is not known is refused.
#[test]
fn c5_cgroups_that_cannot_be_read_as_text() {
    const CONTAINER: &str = "3f4a0e6d1b2c5e7f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f";
    let rule = format!(
        "mode = 'enforce'
         [[rule]]
         name = 'not this container'
         container_id = '{CONTAINER}'
         action = 'deny'
         [[rule]]
         name = 'root of the host'
         user = 'root'
         imds = 'v1'
         action = 'allow'"
    );
    let sandbox = Sandbox::configured(GUARD, &rule);
    let container = format!("docker-{CONTAINER}.scope");
    let container = sandbox.lab.add_room(Place::Host, &container).unwrap();
    let ask = "import os, sys, urllib.request, urllib.error
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    name = os.fsencode(name)
    os.mkdir(name)
    os.chdir(name)
open('cgroup.procs', 'w').write('0')
try: print(urllib.request.urlopen(f'http://169.254.169.254/latest/meta-data/instance-id').status)
except urllib.error.HTTPError as error: print(error.code)
# Nobody else can remove what has such a path.
open(sys.argv[1] + '/cgroup.procs', 'w').write('0')
for name in reversed(sys.argv[2:]):
    os.chdir('..')
    os.rmdir(os.fsencode(name))";
    let long = "d".repeat(250);
    let no_text = OsStr::from_bytes(b"\xff\xfe");
    for (names, resolved) in [(vec![no_text], true), (vec![OsStr::new(&long); 20], false)] {
        let mut command = container.command(python());
        command.args(["-c", ask]).arg(container.cgroup().path());
        assert_eq!(ran(command.args(names)), "403");
        let event = sandbox.request();
        let caller = &event.caller;
        assert_eq!(
            (caller.resolved, &caller.user),
            (resolved, &None),
            "{caller:?}"
        );
        if resolved {
            assert_eq!(event.rule.as_deref(), Some("not this container"));
            assert_eq!(caller.container_id.as_deref(), Some(CONTAINER));
            let cgroup = caller.cgroup.as_deref().unwrap();
            assert!(cgroup.ends_with("/\u{fffd}\u{fffd}"), "{cgroup}");
        } else {
            assert_eq!(caller.unresolved, Some(Unresolved::Unreadable));
            assert_eq!(event.reason, Reason::UnknownCaller);
        }
    }
    assert_untouched(&sandbox);
}
