//! The daemon is killed, stopped, restarted and replaced; the kernel programs know what to do.

use std::{
    io::IoSliceMut,
    os::{
        fd::{AsRawFd, FromRawFd as _, OwnedFd},
        unix::{net::UnixDatagram, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Output},
    sync::mpsc::channel,
    thread,
};

use imds_guard::{
    kernel::Pins,
    lab::{Guard, Lab, NetNs, Place, links},
};
use imds_guard_tests::{
    Sandbox, curl, lab,
    load::{Load, v1_load},
    python, run,
};
use nix::sys::{
    signal::Signal,
    socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
};
use serde_json::Value;

use crate::{GUARD, INSTANCE_ID_PATH};

/// Asks without a token until the answer is the last of a few that may come before: an error's name,
/// or the status.
fn ask_until(lab: &Lab, expected: &str, meanwhile: &[&str]) {
    let script = format!(
        r"
import http.client, time
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    try:
        client = http.client.HTTPConnection('169.254.169.254', 80, timeout=20)
        client.request('GET', '{INSTANCE_ID_PATH}')
        got = str(client.getresponse().status)
    except OSError as error:
        got = type(error).__name__
    print(got)
    if got == '{expected}':
        break
"
    );
    let output = run(lab.command(Place::Host, python()).args(["-c", &script]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut answers: Vec<&str> = text.lines().collect();
    assert_eq!(answers.pop(), Some(expected), "{text}");
    for answer in answers {
        assert!(meanwhile.contains(&answer), "{answer} meanwhile");
    }
}

/// What a connection meets that was turned to a listener which has just gone.
const IN_BETWEEN: [&str; 3] = [
    "ConnectionRefusedError",
    "ConnectionResetError",
    "RemoteDisconnected",
];

fn enforcing(lab: &Lab, more: &[&str]) -> Guard {
    let arguments = [&["--mode", "enforce"], more].concat();
    Guard::start(lab, Path::new(GUARD), arguments).unwrap()
}

fn guard_cli(lab: &Lab, command: &str, more: &[&str]) -> Output {
    run(lab
        .command(Place::Guard, GUARD)
        .args([command, "--pins"])
        .arg(lab.pins())
        .args(more))
}

fn status(lab: &Lab) -> (i32, Value) {
    let output = guard_cli(lab, "status", &["--json"]);
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap(), report)
}

fn addresses(lab: &Lab) -> String {
    let output = run(lab.command(Place::Host, "ip").args(["-o", "addr"]));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// E4: in closed mode nobody gets past a guard that was killed, and nobody waits for it.
#[test]
fn e4_killed_and_closed() {
    let lab = lab();
    enforcing(&lab, &[]).kill().unwrap();
    ask_until(&lab, "PermissionError", &IN_BETWEEN);
    assert_eq!(lab.imds().counters().connections, 0);
    let (code, report) = status(&lab);
    assert_eq!((code, &report["pid"]), (3, &Value::Null));
    assert_eq!(report["on_failure"], "closed");

    // The next one takes over what is pinned.
    let guard = enforcing(&lab, &[]);
    ask_until(&lab, "401", &[]);
    let (code, report) = status(&lab);
    assert_eq!(
        (code, report["pid"].as_u64()),
        (0, Some(guard.pid().into()))
    );
    assert!(report["counts"]["unattended_refused"].as_u64() > Some(0));
    assert_eq!(lab.imds().counters().connections, 0);
    drop(guard);
}

/// E4: in open mode clients lose nothing but the moment.
#[test]
fn e4_killed_and_open() {
    let lab = lab();
    let guard = Guard::start(&lab, Path::new(GUARD), ["--mode", "audit"]).unwrap();
    guard.kill().unwrap();
    ask_until(&lab, "200", &IN_BETWEEN);
    assert_eq!(status(&lab).0, 3);
}

/// E4: a guard that stands still is as good as none, and is there again when it goes on.
#[test]
fn e4_stopped_by_a_signal() {
    let lab = lab();
    let guard = enforcing(&lab, &[]);
    guard.signal(Signal::SIGSTOP).unwrap();
    // Connections that were made in the first second wait; they must not be waited for here.
    let script = r"
import socket, time
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    try:
        socket.create_connection(('169.254.169.254', 80), timeout=20).close()
        time.sleep(0.02) # not to fill the backlog of a listener that accepts nothing
    except PermissionError:
        print('refused')
        break
";
    let output = run(lab.command(Place::Host, python()).args(["-c", script]));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "refused");
    guard.signal(Signal::SIGCONT).unwrap();
    ask_until(&lab, "401", &["PermissionError"]);
    assert_eq!(lab.imds().counters().v1_requests, 0);
}

#[test]
fn a_stop_keeps_the_programs_until_they_are_detached() {
    let lab = lab();
    let (status_code, _) = enforcing(&lab, &[]).stop().unwrap();
    assert!(status_code.success());
    ask_until(&lab, "PermissionError", &[]);
    assert!(addresses(&lab).contains("169.254.171.254"));
    assert_eq!(status(&lab).0, 3);

    let output = guard_cli(&lab, "detach", &[]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for what in [
        "program connect4",
        "program backstop",
        "address 169.254.171.254",
        "address fd00:ec2::a9fe:abfe",
    ] {
        assert!(said.contains(&format!("removed {what}")), "{what}: {said}");
    }
    assert!(!lab.pins().exists());
    assert!(!addresses(&lab).contains("169.254.171.254"));
    ask_until(&lab, "200", &[]);
    assert_eq!(status(&lab).0, 4);
    let again = guard_cli(&lab, "detach", &[]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing to remove"));
    assert!(!lab.pins().exists());
}

#[test]
fn a_running_guard_is_not_detached() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let output = guard_cli(&sandbox.lab, "detach", &[]);
    assert_eq!(output.status.code(), Some(19), "{output:?}");
    ask_until(&sandbox.lab, "401", &[]);
}

#[test]
fn status_says_which_layers_are_off() {
    let lab = lab();
    let guard = enforcing(&lab, &[]);
    let (_, report) = status(&lab);
    assert_eq!(report["mode"], "enforce");
    assert_eq!(
        (&report["redirect"], &report["backstop"]),
        (&Value::Bool(true), &Value::Bool(true))
    );
    drop(guard);
    let cgroup = lab.cgroup().path().to_str().unwrap();
    let mut off = lab.command(Place::Guard, GUARD);
    off.args([
        "run",
        "--backstop=false",
        "--perimeter=false",
        "--cgroup",
        cgroup,
    ]);
    let guard = Guard::spawn(
        off.arg("--pins")
            .arg(lab.pins())
            .arg("--run-dir")
            .arg(lab.run_dir()),
    )
    .unwrap();
    let (_, report) = status(&lab);
    assert_eq!(report["backstop"], false);
    assert_eq!(report["perimeter"], Value::Array(Vec::new()));
    drop(guard);
}

/// Uplinks that come while the guard is running are guarded, those that go are forgotten.
#[test]
fn later_uplinks_are_guarded() {
    let lab = lab();
    let log = std::env::temp_dir().join(format!("imds-guard-test-{}-uplink", std::process::id()));
    let mut command = lab.guard_command(GUARD);
    command.args(["--uplink", "eth1"]).env("RUST_LOG", "info");
    command.stderr(std::fs::File::create(&log).unwrap());
    let guard = Guard::spawn(&mut command).unwrap();
    let guarded = |expected: usize| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            let said = std::fs::read_to_string(&log).unwrap();
            if said.matches("guarding uplink eth1").count() == expected {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{said}");
            thread::yield_now();
        }
    };
    guarded(0);
    for round in 1..=2 {
        let far = NetNs::new().unwrap();
        links::veth((lab.host(), "eth1"), (&far, "far0")).unwrap();
        guarded(round);
        let delete = ["link", "delete", "eth1"];
        assert!(
            run(lab.command(Place::Host, "ip").args(delete))
                .status
                .success()
        );
    }
    drop(guard);
    std::fs::remove_file(&log).unwrap();
}

/// How often the tests restart under load; measured with more.
fn restarts() -> usize {
    let more = std::env::var("IMDS_GUARD_TEST_RESTARTS");
    more.map_or(8, |more| more.parse().unwrap())
}

/// G4: killed again and again under load, it lets no v1 request through, and leaves nothing behind.
#[test]
fn g4_killed_in_a_loop_under_load() {
    let lab = lab();
    let mut guard = enforcing(&lab, &[]);
    let load = Load::start(&lab, INSTANCE_ID_PATH);
    let mut v1 = v1_load(&lab, INSTANCE_ID_PATH);
    for _ in 0..restarts() {
        guard.kill().unwrap();
        guard = enforcing(&lab, &[]);
    }
    drop(v1.stdin.take());
    v1.wait().unwrap();
    let (served, ..) = load.stop();
    assert!(served > 0);
    guard.kill().unwrap();
    let reached = lab.imds().counters();
    assert_eq!(reached.v1_requests, 0, "{reached:?}");
    assert!(guard_cli(&lab, "detach", &[]).status.success());
    assert!(!lab.pins().exists());
    assert!(!addresses(&lab).contains("169.254.171.254"));
}

#[test]
fn replacing_it_under_load_loses_no_request() {
    let lab = lab();
    let mut guard = enforcing(&lab, &[]);
    let load = Load::start(&lab, INSTANCE_ID_PATH);
    for _ in 0..restarts() {
        let next = enforcing(&lab, &["--replace"]);
        let (status, _) = guard.wait().unwrap();
        assert!(status.success());
        guard = next;
    }
    let (served, failed, how) = load.stop();
    assert_eq!(failed, 0, "{how}");
    assert!(served > 0, "{how}");
    drop(guard);
}

/// As systemd does: it opens the listeners, stores them over a restart, and passes them on.
#[test]
fn restarting_it_with_stored_listeners_loses_no_request() {
    let lab = lab();
    let socket =
        std::env::temp_dir().join(format!("imds-guard-test-{}-notify", std::process::id()));
    let systemd = UnixDatagram::bind(&socket).unwrap();
    let notified = |command: &mut Command| {
        command
            .env("NOTIFY_SOCKET", &socket)
            .env("RUST_LOG", "warn");
    };
    let mut command = lab.guard_command(GUARD);
    notified(command.args(["--mode", "enforce"]));
    let mut guard = Guard::spawn(&mut command).unwrap();
    let (first, stored) = channel();
    let reader = thread::spawn(move || {
        // As long as anybody sends, somebody must read.
        while let Some(listeners) = receive_listeners(&systemd) {
            let _only_the_first = first.send(listeners);
        }
    });
    let stored = stored.recv().unwrap();
    assert_eq!(stored.len(), 2);
    let load = Load::start(&lab, INSTANCE_ID_PATH);
    for _ in 0..restarts() {
        let (status, _) = guard.stop().unwrap();
        assert!(status.success());
        // The variable holds the pid of the process that is meant, which keeps it over exec.
        let mut command = lab.command(Place::Guard, "sh");
        command.args(["-c", r#"LISTEN_PID=$$ exec "$0" "$@""#, GUARD]);
        notified(
            command
                .args(lab.guard_arguments())
                .args(["--mode", "enforce"]),
        );
        pass_listeners(&mut command, &stored);
        guard = Guard::spawn(&mut command).unwrap();
    }
    let (served, failed, how) = load.stop();
    assert_eq!(failed, 0, "{how}");
    assert!(served > 0, "{how}");
    assert_eq!(lab.imds().counters().v1_requests, 0);
    drop(guard);
    UnixDatagram::unbound()
        .unwrap()
        .send_to(b"", &socket)
        .unwrap();
    reader.join().unwrap();
    std::fs::remove_file(&socket).unwrap();
}

/// Reads messages until one carries descriptors to be stored, or the test has ended.
fn receive_listeners(systemd: &UnixDatagram) -> Option<Vec<OwnedFd>> {
    loop {
        let mut bytes = [0; 4096];
        let mut space = nix::cmsg_space!([i32; 8]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<UnixAddr>(
            systemd.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .unwrap();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just opened them for us.
                let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                return Some(fds.into_iter().map(own).collect());
            }
        }
        if message.bytes == 0 {
            return None;
        }
    }
}

/// Descriptors 3 and up, and how many (sd_listen_fds(3)).
fn pass_listeners(command: &mut Command, listeners: &[OwnedFd]) {
    let listeners: Vec<i32> = listeners.iter().map(AsRawFd::as_raw_fd).collect();
    command.env("LISTEN_FDS", listeners.len().to_string());
    let pass = move || {
        for (fd, target) in listeners.iter().zip(3..) {
            // SAFETY: as below.
            if unsafe { libc::dup2(*fd, target) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe. Descriptors of
    // this process are all above the targets, for its own are there.
    unsafe { command.pre_exec(pass) };
}

/// What the unit leaves the guard is enough to start, to judge, to be replaced and to stop.
#[test]
fn the_units_capabilities_are_enough() {
    let unit = include_str!("../../packaging/systemd/imds-guard.service");
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let set: String = line
        .unwrap()
        .split(' ')
        .map(|cap| format!(",+{}", cap.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let lab = lab();
    let bounded = |more: &[&str]| {
        let mut command = lab.command(Place::Guard, "setpriv");
        command.args([
            "--inh-caps",
            "-all",
            "--bounding-set",
            &format!("-all{set}"),
            GUARD,
        ]);
        command
            .args(lab.guard_arguments())
            .args(["--mode", "enforce"]);
        command.args(more);
        Guard::spawn(&mut command).unwrap()
    };
    let first = bounded(&[]);
    ask_until(&lab, "401", &[]);
    let second = bounded(&["--replace", "--on-stop", "detach"]);
    assert!(first.wait().unwrap().0.success());
    ask_until(&lab, "401", &[]);
    assert!(second.stop().unwrap().0.success());
    assert!(!lab.pins().exists());
    ask_until(&lab, "200", &[]);
}

/// The layout's name must change when a map does: the next version adopts what it finds.
#[test]
fn the_pinned_layout_is_the_one_that_its_name_stands_for() {
    let lab = lab();
    let guard = enforcing(&lab, &[]);
    let pins = Pins::open(&lab.pins()).unwrap();
    let mut layout: Vec<String> = std::fs::read_dir(lab.pins().join(imds_guard::kernel::LAYOUT))
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let map = aya::maps::MapInfo::from_pin(&path).ok()?;
            let name = path.file_name()?.to_str()?.to_owned();
            if name.starts_with("link-") {
                return None;
            }
            let sizes = (map.key_size(), map.value_size(), map.max_entries());
            Some(format!("{name}: {:?} {sizes:?}", map.map_type().ok()?))
        })
        .collect();
    layout.sort();
    insta::assert_snapshot!(format!(
        "{}\n{}",
        imds_guard::kernel::LAYOUT,
        layout.join("\n")
    ));
    assert!(pins.links().contains(&"connect4".to_owned()));
    drop(guard);
}

#[test]
fn a_client_of_a_killed_guard_can_be_served_by_curl_again() {
    let lab = lab();
    enforcing(&lab, &[]).kill().unwrap();
    let guard = enforcing(&lab, &[]);
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    assert_eq!(curl(&lab, Place::Host, &[url]).status, 401);
    drop(guard);
}
