//! `imds-guard doctor --from` finds out why a network namespace does not reach the guard.

use std::{
    io::{BufRead as _, BufReader},
    os::fd::{AsFd as _, AsRawFd as _},
    process::Stdio,
};

use imds_guard::{
    lab::{Lab, NetNs, Place},
    record::{ConnectionRefusal, Kind},
};
use imds_guard_tests::{Sandbox, lab, run};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::GUARD;

/// A check's status, and what was found with the advice.
type Found = (String, String);

/// What the doctor says of both address families, and whether all is well.
fn doctor(lab: &Lab, from: &str) -> (bool, [Found; 2]) {
    let output = run(lab
        .command(Place::Host, GUARD)
        .args(["doctor", "--json", "--from", from]));
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let found = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        let text = format!("{} → {}", check["found"], check["advice"]);
        (check["status"].as_str().unwrap().to_owned(), text)
    };
    let ready = report["ready"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!ready)), "{report}");
    (ready, [found("guard over IPv4"), found("guard over IPv6")])
}

/// The namespace must not reach the guard, and the doctor must say this about both families.
#[track_caller]
fn assert_finds(lab: &Lab, namespace: &NetNs, words: &[&str]) {
    let (ready, found) = doctor(lab, &file_of(namespace));
    assert!(!ready, "{found:?}");
    for (status, text) in found {
        assert_eq!(status, "missing", "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    }
}

/// A file that stands for a namespace while this process lives.
fn file_of(namespace: &NetNs) -> String {
    let fd = namespace.as_fd().as_raw_fd();
    format!("/proc/{}/fd/{fd}", std::process::id())
}

/// Adds a rule to the host's firewall, for both address families.
fn reject(lab: &Lab, rule: &str) {
    for (program, prohibited) in [
        ("iptables", "icmp-host-prohibited"),
        ("ip6tables", "icmp6-adm-prohibited"),
    ] {
        let rule = rule.replace("PROHIBITED", prohibited);
        let words = format!("-A INPUT -i ctr0 -p tcp --dport 254 -j {rule}");
        let output = run(lab.command(Place::Host, program).args(words.split(' ')));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {words}: {complaint}");
    }
}

#[test]
fn a_guard_that_can_be_reached_is() {
    let sandbox = Sandbox::new(GUARD, &[]);
    let mut sleeping = sandbox
        .lab
        .command(Place::Container, "sh")
        .args(["-c", "echo; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It is in the container when it speaks.
    let mut said = BufReader::new(sleeping.stdout.take().unwrap());
    said.read_line(&mut String::new()).unwrap();
    for from in [sleeping.id().to_string(), file_of(sandbox.lab.container())] {
        let (ready, found) = doctor(&sandbox.lab, &from);
        assert!(ready, "{found:?}");
        for ((status, text), address) in found.iter().zip(["10.88.0.2", "2001:db8:88::2"]) {
            assert_eq!(status, "ok", "{text}");
            assert!(
                text.contains(&format!("is reached from {address}")),
                "{text}"
            );
            // It is recorded as what it is.
            let Kind::ConnectionRefused(refused) = sandbox.guard.event().unwrap().kind else {
                panic!("{text}");
            };
            assert_eq!(refused.reason, ConnectionRefusal::NotRedirected);
        }
    }
    sleeping.kill().unwrap();
    sleeping.wait().unwrap();
    assert_eq!(sandbox.lab.imds().counters().connections, 0);
}

#[test]
fn one_address_family_is_enough() {
    let sandbox = Sandbox::new(GUARD, &[]);
    let container = sandbox.lab.container();
    container.sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
    let (ready, [v4, v6]) = doctor(&sandbox.lab, &file_of(container));
    assert!(ready);
    assert_eq!((v4.0.as_str(), v6.0.as_str()), ("ok", "note"), "{v6:?}");
    assert!(v6.1.contains("no route"), "{v6:?}");
}

#[test]
fn a_namespace_without_a_route_is_told_so() {
    let sandbox = Sandbox::new(GUARD, &[]);
    let nowhere = NetNs::new().unwrap();
    assert_finds(
        &sandbox.lab,
        &nowhere,
        &["no route", "default route", "--internal"],
    );
}

#[test]
fn a_guard_that_is_not_running_is_missed() {
    let lab = lab();
    // Nothing is sent to an address that would be looked for outside of the host.
    let never = ["no address of this host", "not running"];
    assert_finds(&lab, lab.container(), &never);

    let guard = imds_guard::lab::Guard::start(&lab, GUARD.as_ref(), ["--mode", "enforce"]).unwrap();
    guard.kill().unwrap();
    let killed = ["nobody listens", "start it"];
    assert_finds(&lab, lab.container(), &killed);
}

#[test]
fn a_guard_that_hangs_is_told_from_one_that_is_gone() {
    let sandbox = Sandbox::new(GUARD, &[]);
    sandbox.guard.signal(Signal::SIGSTOP).unwrap();
    let hangs = ["takes connections, and does not serve them", "ss -ltnp"];
    assert_finds(&sandbox.lab, sandbox.lab.container(), &hangs);
}

#[test]
fn firewalls_are_suspected_as_they_behave() {
    for (rule, words) in [
        ("DROP", ["does not answer", "a firewall drops it", "INPUT"]),
        (
            "REJECT",
            [
                "though not to the host itself",
                "a firewall rejects it",
                "INPUT",
            ],
        ),
        (
            "REJECT --reject-with PROHIBITED",
            ["254:", "a firewall rejects it", "nft list ruleset"],
        ),
    ] {
        let sandbox = Sandbox::new(GUARD, &[]);
        reject(&sandbox.lab, rule);
        assert_finds(&sandbox.lab, sandbox.lab.container(), &words);
    }
}

#[test]
fn what_is_no_namespace_is_refused() {
    let lab = lab();
    for (from, words) in [
        ("4194305", "there is no such process"),
        ("/nonexistent/netns", "No such file"),
        ("/proc/self/ns/mnt", "this is no network namespace"),
        ("/proc/self/cmdline", "this is no network namespace"),
    ] {
        let output = run(lab
            .command(Place::Host, GUARD)
            .args(["doctor", "--from", from]));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{text}");
    }
    let user = [
        "--reuid",
        "65534",
        "--clear-groups",
        GUARD,
        "doctor",
        "--from",
    ];
    let output = run(lab
        .command(Place::Host, "setpriv")
        .args(user)
        .arg("/proc/self/ns/net"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(10), "{text}");
    assert!(text.contains("CAP_SYS_ADMIN"), "{text}");
}
