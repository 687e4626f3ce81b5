//! Every reason not to start has its own sentence and exit code.

use std::{
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::Path,
    process::{Output, Stdio},
};

use imds_guard::{
    lab::{Guard, Lab, NetNs, Place, links},
    record::Kind,
};
use imds_guard_tests::{Sandbox, curl, lab, python, run};
use serde_json::Value;

use crate::GUARD;

/// Runs `imds-guard run` with this in front of it; it must not start.
fn refused(lab: &Lab, before: &[&str], arguments: &[&str]) -> (i32, String) {
    let pins = lab.pins();
    let pins = if arguments.contains(&"--pins") {
        [].as_slice()
    } else {
        &["--pins", pins.to_str().unwrap()]
    };
    let words = [before, &[GUARD, "run"], pins, arguments].concat();
    let output = run(lab
        .command(Place::Guard, words[0])
        .args(&words[1..])
        .env("RUST_LOG", "error"));
    said(&output)
}

fn said(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap_or(-1), text)
}

#[track_caller]
fn assert_says((code, text): &(i32, String), expected: i32, words: &[&str]) {
    assert_eq!(*code, expected, "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "one sentence: {text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn without_capabilities() {
    let lab = lab();
    let user = ["setpriv", "--reuid", "65534", "--clear-groups"];
    let all = refused(&lab, &user, &[]);
    assert_says(
        &all,
        10,
        &[
            "CAP_BPF, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE",
            "root",
        ],
    );
    let bounded = ["setpriv", "--inh-caps", "-all", "--bounding-set", "-bpf"];
    assert_says(&refused(&lab, &bounded, &[]), 10, &["missing CAP_BPF:"]);
}

#[test]
fn without_cgroup_v2() {
    let lab = lab();
    let nowhere = refused(&lab, &[], &["--cgroup", "/tmp"]);
    assert_says(
        &nowhere,
        11,
        &["/tmp is not a directory of the cgroup v2 hierarchy"],
    );
    let v1_only = "umount -l \"$0\"; exec \"$@\"";
    let mount = imds_guard::kernel::probe::cgroup2_mount().unwrap();
    let unmounted = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        v1_only,
        mount.to_str().unwrap(),
    ];
    assert_says(
        &refused(&lab, &unmounted, &[]),
        11,
        &["cgroup v1 only", "mount -t cgroup2"],
    );
}

#[test]
fn in_a_cgroup_namespace_that_hides_the_root() {
    let lab = lab();
    let mount = imds_guard::kernel::probe::cgroup2_mount().unwrap();
    let script = "umount -l \"$0\"; mount -t cgroup2 none \"$0\"; exec \"$@\"";
    let hidden = [
        "unshare",
        "--mount",
        "--cgroup",
        "sh",
        "-c",
        script,
        mount.to_str().unwrap(),
    ];
    assert_says(
        &refused(&lab, &hidden, &[]),
        11,
        &["not the host's root cgroup", "--cgroup"],
    );
}

#[test]
fn without_a_bpf_file_system() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let elsewhere = ["--cgroup", cgroup, "--pins", "/tmp/imds-guard"];
    let output = refused(&lab, &[], &elsewhere);
    assert_says(&output, 18, &["/tmp/imds-guard", "mount -t bpf", "--pins"]);
}

#[test]
fn with_pins_of_another_version() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let other = lab.pins().join("v999");
    std::fs::create_dir_all(&other).unwrap();
    let output = refused(&lab, &[], &["--cgroup", cgroup]);
    let other = other.to_str().unwrap();
    assert_says(
        &output,
        20,
        &[other, "another version", "imds-guard detach"],
    );
}

#[test]
fn on_an_old_kernel() {
    let lab = lab();
    let old = refused(&lab, &["setarch", "--uname-2.6"], &[]);
    assert_says(&old, 12, &["kernel 2.6.", "5.10"]);
}

#[test]
fn while_another_one_is_running() {
    let sandbox = Sandbox::new(GUARD, &[]);
    let cgroup = sandbox.lab.cgroup().path().to_str().unwrap();
    let second = refused(&sandbox.lab, &[], &["--cgroup", cgroup]);
    let pid = format!("pid {}", sandbox.guard.pid());
    assert_says(&second, 19, &["already running", &pid, "--replace"]);
    // The first one is unharmed, and so are its addresses.
    let answer = sandbox.curl(
        Place::Host,
        &["http://169.254.169.254/latest/meta-data/instance-id"],
    );
    assert_eq!(answer.status, 200);
}

#[test]
fn a_failed_start_leaves_no_address_behind() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let script = "import socket, time\n\
                  s = socket.create_server(('', 254)); print('listens', flush=True); time.sleep(600)";
    let mut server = lab
        .command(Place::Host, python())
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_says(
        &refused(&lab, &[], &["--cgroup", cgroup]),
        14,
        &["169.254.171.254:254 is busy", "ss -ltnp", "--listen"],
    );
    server.kill().unwrap();
    server.wait().unwrap();
    let addresses = run(lab.command(Place::Host, "ip").args(["-o", "addr"]));
    let addresses = String::from_utf8_lossy(&addresses.stdout);
    assert!(
        !addresses.contains("169.254.171.254") && !addresses.contains("a9fe:abfe"),
        "{addresses}"
    );
}

#[test]
fn with_an_address_of_another_interface() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    links::add_address(
        lab.host(),
        "eth0",
        Ipv4Addr::new(169, 254, 171, 254).into(),
        32,
    )
    .unwrap();
    let taken = refused(&lab, &[], &["--cgroup", cgroup]);
    assert_says(
        &taken,
        15,
        &[
            "169.254.171.254 is already the address of interface eth0",
            "--listen",
        ],
    );
}

#[test]
fn without_ipv6_the_rest_is_served() {
    let url = |host| format!("http://{host}/latest/meta-data/instance-id");
    for (mode, v4, v6) in [("enforce", 401, 0), ("audit", 200, 200)] {
        let lab = lab();
        // The listener can have no address there, but IPv6 works everywhere else.
        lab.host().sysctl("ipv6/conf/lo/disable_ipv6", "1").unwrap();
        let guard = Guard::start(&lab, Path::new(GUARD), ["--mode", mode]).unwrap();
        for place in [Place::Host, Place::Container] {
            let got = curl(&lab, place, &[url("169.254.169.254")]);
            assert_eq!(got.status, v4, "{mode} {place:?}");
            let got = curl(&lab, place, &[url("[fd00:ec2::254]")]);
            assert_eq!(got.status, v6, "{mode} {place:?} {got:?}");
        }
        let (_, mut events) = guard.stop().unwrap();
        let Some(Kind::Stopped(stopped)) = events.pop().map(|event| event.kind) else {
            panic!("{events:?}");
        };
        let expected = if mode == "enforce" { (2, 0) } else { (0, 2) };
        assert_eq!(
            (stopped.counts.refused, stopped.counts.bypassed),
            expected,
            "{mode}"
        );
        // What is let past is not served unseen: it is counted.
        let through = if mode == "enforce" { 0 } else { 4 };
        assert_eq!(lab.imds().counters().v1_requests, through, "{mode}");
    }
}

#[test]
fn with_an_event_file_that_cannot_be_written() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let output = refused(
        &lab,
        &[],
        &["--cgroup", cgroup, "--events", "/nonexistent/events.jsonl"],
    );
    assert_says(&output, 16, &["/nonexistent/events.jsonl", "--events"]);
}

/// E2: a link that somebody has placed where events are to go is not followed.
#[test]
fn e2_with_a_link_in_place_of_the_event_file() {
    let lab = lab();
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let link = std::env::temp_dir().join(format!("imds-guard-test-{}-link", std::process::id()));
    std::os::unix::fs::symlink("/nonexistent/target", &link).unwrap();
    let output = refused(
        &lab,
        &[],
        &["--cgroup", cgroup, "--events", link.to_str().unwrap()],
    );
    std::fs::remove_file(&link).unwrap();
    assert_says(&output, 16, &["imds-guard-test"]);
}

#[test]
fn with_settings_that_contradict_each_other() {
    let lab = lab();
    let table = [
        (&["--listen", "0.0.0.0:1"][..], "the address itself"),
        (&["--listen", "169.254.171.254:81"], "the same port"),
        (
            &["--listen", "169.254.1.1:1", "--listen", "169.254.1.2:1"],
            "twice",
        ),
        (
            &["--listen", "169.254.169.254:254"],
            "the metadata service's own address",
        ),
        (&["--upstream", "169.254.171.254:254"], "the guard itself"),
        (&["--link", "nosuch0"], "no such interface"),
    ];
    let cgroup = lab.cgroup().path().to_str().unwrap();
    for (arguments, expected) in table {
        let output = refused(&lab, &[], &[&["--cgroup", cgroup], arguments].concat());
        assert_says(&output, 2, &[expected]);
    }
}

#[test]
fn events_go_to_a_file_that_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = lab();
    let path = lab.config().with_file_name("events.jsonl");
    let mut guard = lab
        .command(Place::Guard, GUARD)
        .args(["run", "--events", path.to_str().unwrap(), "--pins"])
        .arg(lab.pins())
        .arg("--cgroup")
        .arg(lab.cgroup().path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first message comes when it watches.
    let mut stderr = BufReader::new(guard.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("watching") {
        line.clear();
        assert_ne!(
            std::io::BufRead::read_line(&mut stderr, &mut line).unwrap(),
            0
        );
    }
    let url = "http://169.254.169.254/latest/meta-data/instance-id";
    assert_eq!(curl(&lab, Place::Host, &[url]).status, 200);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(guard.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(guard.wait().unwrap().success());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(mode, 0o600);
    let kinds: Vec<String> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["event"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(kinds, ["started", "request", "stopped"]);
}

#[test]
fn privileges_that_are_not_needed_are_gone() {
    let sandbox = Sandbox::new(GUARD, &[]);
    for task in std::fs::read_dir(format!("/proc/{}/task", sandbox.guard.pid())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit('\t').next().unwrap().to_owned()
        };
        // CAP_NET_ADMIN (12), CAP_SYS_PTRACE (19), CAP_BPF (39).
        let kept = format!("{:016x}", 1_u64 << 12 | 1 << 19 | 1 << 39);
        assert_eq!((field("CapEff"), field("CapPrm")), (kept.clone(), kept));
        assert_eq!(
            (field("CapInh"), field("CapAmb")),
            ("0".repeat(16), "0".repeat(16))
        );
        assert_eq!(field("NoNewPrivs"), "1");
    }
}

#[test]
fn doctor_says_what_is_there_and_what_is_missing() {
    let lab = lab();
    let doctor = |before: &[&str]| {
        let words = [before, &[GUARD, "doctor", "--json", "--pins"]].concat();
        let mut doctor = lab.command(Place::Host, words[0]);
        let output = run(doctor.args(&words[1..]).arg(lab.pins()));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };
    let status = |report: &Value, name: &str| {
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        check["status"].as_str().unwrap().to_owned()
    };
    let (code, report) = doctor(&[]);
    assert_eq!(code, Some(0), "{report}");
    for name in [
        "capabilities",
        "kernel",
        "BPF features",
        "cgroup v2",
        "bpffs",
        "route to 169.254.169.254",
        "route to fd00:ec2::254",
    ] {
        assert_eq!(status(&report, name), "ok", "{report}");
    }
    let (code, report) = doctor(&["setpriv", "--reuid", "65534", "--clear-groups"]);
    assert_eq!(code, Some(1));
    assert_eq!(status(&report, "capabilities"), "missing");
    let (code, report) = doctor(&["setarch", "--uname-2.6"]);
    assert_eq!(code, Some(1));
    assert_eq!(status(&report, "kernel"), "missing");

    // A namespace without any route.
    let nowhere = NetNs::new().unwrap();
    let output = nowhere
        .run(|| run(std::process::Command::new(GUARD).args(["doctor"])))
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("note    route to 169.254.169.254"), "{text}");
}
