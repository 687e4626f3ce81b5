//! The demo shows what it promises and leaves nothing behind.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use imds_guard::kernel::probe::cgroup2_mount;
use imds_guard_tests::run;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::GUARD;

fn demo(arguments: &[&str]) -> (i32, String) {
    let output = run(Command::new(GUARD).arg("demo").args(arguments));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Cgroups that a demo with this pid has left.
fn leftovers(pid: u32) -> Vec<String> {
    let prefix = format!("imds-guard-lab-{pid}-");
    fs::read_dir(cgroup2_mount().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

#[test]
fn enforce_refuses_v1_and_serves_v2() {
    let (code, text) = demo(&[]);
    assert_eq!(code, 0, "{text}");
    let rows: Vec<&str> = text.lines().collect();
    let count = |words: &[&str]| {
        rows.iter()
            .filter(|row| words.iter().all(|word| row.contains(word)))
            .count()
    };
    assert_eq!(
        count(&["v1 ", "refused 401", "nobody", "curl"]),
        4,
        "{text}"
    );
    assert_eq!(count(&["token ", "served 200"]), 4, "{text}");
    assert_eq!(count(&["v2 ", "served 200"]), 4, "{text}");
    assert_eq!(count(&["container", "refused 401"]), 1, "{text}");
    for over in ["IPv4", "IPv6", "mapped"] {
        assert!(
            count(&[over, "refused 401"]) > 0 && count(&[over, "served 200"]) > 0,
            "{text}"
        );
    }
    assert_eq!(count(&["uid 65534", "cgroup /"]), 4, "{text}");
    assert!(text.contains("No v1 request got through."), "{text}");
}

#[test]
fn audit_notes_v1_as_json_too() {
    let (code, text) = demo(&["--mode", "audit", "--json"]);
    assert_eq!(code, 0, "{text}");
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(events.len(), 12);
    let v1: Vec<&Value> = events
        .iter()
        .filter(|event| event["imds"] == "v1")
        .collect();
    assert_eq!(v1.len(), 4);
    assert!(
        v1.iter()
            .all(|event| event["verdict"] == "audit" && event["status"] == 200)
    );
}

#[test]
fn keep_runs_the_users_own_command_and_returns_its_code() {
    let script = "curl -s http://169.254.169.254/latest/meta-data/instance-id | head -n 1; exit 7";
    let (code, text) = demo(&["--keep", "--", "sh", "-c", script]);
    assert_eq!(code, 7, "{text}");
    assert!(text.contains("refused 401"), "{text}");
}

#[test]
fn ctrl_c_cleans_up() {
    let mut demo = Command::new(GUARD)
        .args(["demo", "--keep", "--", "sh", "-c", "echo ready; sleep 600"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(demo.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    assert_eq!(ready, "ready\n");
    assert_eq!(leftovers(demo.id()).len(), 1);
    // Ctrl-C is the command's; SIGTERM ends the demo as Ctrl-C does without --keep.
    let pid = Pid::from_raw(i32::try_from(demo.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    assert_eq!(leftovers(demo.id()), Vec::<String>::new());

    let mut demo = Command::new(GUARD)
        .args(["demo"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut title = String::new();
    let mut output = BufReader::new(demo.stdout.take().unwrap());
    output.read_line(&mut title).unwrap();
    kill(
        Pid::from_raw(i32::try_from(demo.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    assert_eq!(leftovers(demo.id()), Vec::<String>::new());
}
