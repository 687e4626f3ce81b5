//! Report and readiness, from logs of many hosts.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use imds_guard::{
    policy::{Caller, Verdict},
    record::{Event, Kind, Request, SCHEMA_VERSION},
};
use imds_guard_tests::{python, run};
use serde_json::Value;

use crate::{GUARD, events::a_request, logs::Folder};

const MAKE_LOGS: &str = env!("CARGO_BIN_EXE_make-logs");

fn make(folder: &Folder, arguments: &[&str]) {
    let made = run(Command::new(MAKE_LOGS).arg(folder.path()).args(arguments));
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

fn guard(command: &str, folder: &Path, arguments: &[&str]) -> Output {
    run(Command::new(GUARD).arg(command).arg(folder).args(arguments))
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What a log adds up to, counted with nothing of what the report counts with.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    events: u64,
    hosts: BTreeSet<String>,
    v1: u64,
    v2: u64,
    token: u64,
    /// IMDSv1 by program or script.
    by_caller: BTreeMap<String, u64>,
    by_path: BTreeMap<String, u64>,
    by_day: BTreeMap<String, u64>,
    hosts_by_caller: BTreeMap<String, BTreeSet<String>>,
}

fn count(folder: &Path) -> Counted {
    let mut counted = Counted::default();
    let mut files = Vec::new();
    for host in fs::read_dir(folder).unwrap() {
        let host = host.unwrap().path();
        files.extend(fs::read_dir(host).unwrap().map(|file| file.unwrap().path()));
    }
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let bytes = match file.extension() {
            Some(extension) if extension == "zst" => zstd::decode_all(&bytes[..]).unwrap(),
            _ => bytes,
        };
        for line in String::from_utf8(bytes).unwrap().lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            counted.events += 1;
            let host = event["host"].as_str().unwrap().to_owned();
            counted.hosts.insert(host.clone());
            match event["imds"].as_str() {
                Some("v1") => {}
                Some("v2") => {
                    counted.v2 += 1;
                    continue;
                }
                Some("token") => {
                    counted.token += 1;
                    continue;
                }
                _ => continue,
            }
            counted.v1 += 1;
            let caller = &event["caller"];
            let name = caller["script"]
                .as_str()
                .or(caller["exe"].as_str())
                .unwrap();
            *counted.by_caller.entry(name.to_owned()).or_default() += 1;
            counted
                .hosts_by_caller
                .entry(name.to_owned())
                .or_default()
                .insert(host);
            let path = event["path"].as_str().unwrap().to_owned();
            *counted.by_path.entry(path).or_default() += 1;
            let day = event["time"].as_str().unwrap()[..10].to_owned();
            *counted.by_day.entry(day).or_default() += 1;
        }
    }
    counted
}

#[test]
fn a_report_of_200_hosts_adds_up() {
    let folder = Folder::new("fleet");
    make(&folder, &["--requests", "60000"]);
    let counted = count(folder.path());
    assert_eq!(counted.hosts.len(), 200);
    let report = json(&guard("report", folder.path(), &["--format", "json"]));
    assert_eq!(report["events"], counted.events);
    assert_eq!(report["hosts"], 200);
    assert_eq!(report["skipped"], 0);
    let calls = &report["calls"];
    assert_eq!(calls["v1"], counted.v1);
    assert_eq!(calls["v2"], counted.v2);
    assert_eq!(calls["token"], counted.token);
    let number = |value: &Value| value.as_u64().unwrap();
    let mut by_caller = BTreeMap::new();
    let mut by_path = BTreeMap::<String, u64>::new();
    for row in report["v1_callers"].as_array().unwrap() {
        let name = row["script"].as_str().or(row["program"].as_str()).unwrap();
        by_caller.insert(name.to_owned(), number(&row["calls"]["v1"]));
        let hosts = row["hosts"].as_array().unwrap();
        let names: BTreeSet<_> = hosts
            .iter()
            .map(|it| it["name"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, counted.hosts_by_caller[name], "{name}");
        let sum: u64 = hosts.iter().map(|it| number(&it["calls"])).sum();
        assert_eq!(sum, counted.by_caller[name], "{name}");
        for path in row["paths"].as_array().unwrap() {
            *by_path
                .entry(path["path"].as_str().unwrap().into())
                .or_default() += number(&path["calls"]);
        }
        let wanted: Vec<_> = row["paths"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["wanted"].clone())
            .collect();
        assert!(
            !wanted
                .iter()
                .skip_while(|it| *it == "credentials")
                .any(|it| it == "credentials")
        );
    }
    assert_eq!(by_caller, counted.by_caller);
    assert_eq!(by_path, counted.by_path);
    let days = report["timeline"].as_array().unwrap().iter();
    let days: BTreeMap<_, _> = days
        .map(|it| (it["begin"].as_str().unwrap().to_owned(), number(&it["v1"])))
        .filter(|(_, v1)| *v1 > 0)
        .collect();
    assert_eq!(days, counted.by_day);
    // One thread, or a part of the time, or single files: the same numbers.
    let alone = json(&guard(
        "report",
        folder.path(),
        &["--format", "json", "--threads", "1"],
    ));
    assert_eq!(alone, report);
}

/// The page, opened in Chromium: its numbers are those of the report, by day, by night and on paper.
#[test]
fn the_html_report_is_read_in_a_browser() {
    let folder = Folder::new("browser");
    make(
        &folder,
        &[
            "--hosts",
            "24",
            "--requests",
            "12000",
            "--end",
            "2026-11-24T00:00:00Z",
        ],
    );
    let page = folder.path().join("report.html");
    let report = json(&guard("report", folder.path(), &["--format", "json"]));
    let written = guard(
        "report",
        folder.path(),
        &["--format", "html", "--output", page.to_str().unwrap()],
    );
    assert!(written.status.success());
    let picture = folder.path().join("report.png");
    let script = include_str!("browser.py");
    let output = run(Command::new(python())
        .args(["-c", script])
        .arg(&page)
        .arg(&picture)
        .arg(folder.path().join("profile")));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seen = json(&output);
    let calls = &report["calls"];
    for (id, expected) in [
        ("v1", &calls["v1"]),
        ("v1-denied", &calls["v1_denied"]),
        ("v2", &calls["v2"]),
        ("token", &calls["token"]),
        ("hosts", &report["hosts"]),
    ] {
        assert_eq!(&seen["numbers"][id], expected, "{id}");
    }
    let counts: Vec<_> = report["v1_callers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["calls"]["v1"].clone())
        .collect();
    assert_eq!(seen["rows"], Value::from(counts));
    assert_eq!(seen["charts"], 3);
    // Nothing is fetched, nothing runs, nothing is cut off.
    assert_eq!(seen["requests"], 1);
    assert_eq!(seen["scripts"], 0);
    assert_eq!(seen["overflow"], false);
    assert_ne!(
        seen["day"], seen["night"],
        "it is dark where darkness is wanted"
    );
    assert_eq!(seen["paper"], "rgb(255, 255, 255)");
    assert!(seen["pages"].as_u64().unwrap() >= 1);
    if env::var_os("UPDATE_SCREENSHOT").is_some() {
        let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/report.png");
        fs::copy(&picture, docs).unwrap();
    }
}

#[test]
fn readiness_needs_a_log_without_gaps_and_without_v1() {
    let ready = |folder: &Folder, arguments: &[&str]| {
        let output = guard("ready", folder.path(), &[&["--json"], arguments].concat());
        (output.status.code(), json(&output))
    };
    let clean = Folder::new("clean");
    make(
        &clean,
        &[
            "--hosts",
            "3",
            "--requests",
            "3000",
            "--clean",
            "--days",
            "15",
        ],
    );
    let (code, said) = ready(&clean, &[]);
    assert_eq!(
        (code, &said["ready"]),
        (Some(0), &Value::Bool(true)),
        "{said}"
    );
    let steps = said["next_steps"].to_string();
    for step in [
        "modify-instance-metadata-options",
        "modify-instance-metadata-defaults",
        "imds-support v2.0",
        "ec2:MetadataHttpTokens",
        "ec2:RoleDelivery",
        "http_tokens",
    ] {
        assert!(steps.contains(step), "{step}");
    }
    // The log is shorter than what is asked for.
    let (code, said) = ready(&clean, &["--since", "20d"]);
    assert_eq!(code, Some(1));
    assert_eq!(said["gaps"].as_array().unwrap().len(), 3, "{said}");
    assert_eq!(ready(&clean, &["--since", "20d", "--elastic"]).0, Some(0));
    // A host loses a day: the others do not help.
    let lost = fs::read_dir(clean.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let log = lost.join("events.jsonl");
    let text = fs::read_to_string(&log).unwrap();
    let day = &text.lines().nth(1500).unwrap()[20..30].to_owned();
    let kept: String = text
        .lines()
        .filter(|line| !line.contains(&format!("\"time\":\"{day}")))
        .map(|it| format!("{it}\n"))
        .collect();
    assert_ne!(kept.len(), text.len(), "{day}");
    fs::write(&log, &kept).unwrap();
    let (code, said) = ready(&clean, &[]);
    assert_eq!(code, Some(1));
    assert_eq!(said["gaps"].as_array().unwrap().len(), 1, "{said}");
    fs::write(&log, &text).unwrap();
    assert_eq!(ready(&clean, &[]).0, Some(0));
    // One call is enough; one that was refused is not.
    let add = |verdict| {
        let event = Event {
            schema: SCHEMA_VERSION,
            time: format!("{:.6}", jiff::Timestamp::now()),
            host: "ip-10-0-0-1".into(),
            kind: Kind::Request(Box::new(Request {
                verdict,
                folded: None,
                ..a_request()
            })),
            chain: None,
        };
        let line = serde_json::to_string(&event).unwrap();
        fs::write(&log, format!("{text}{line}\n")).unwrap();
    };
    add(Verdict::Deny);
    let (code, said) = ready(&clean, &[]);
    assert_eq!(
        (code, &said["v1_denied"]),
        (Some(0), &Value::from(1)),
        "{said}"
    );
    add(Verdict::Audit);
    let (code, said) = ready(&clean, &[]);
    assert_eq!(
        (code, &said["v1_needed"]),
        (Some(1), &Value::from(1)),
        "{said}"
    );
    assert_eq!(said["callers"].as_array().unwrap().len(), 1);
}

/// F2: whatever a caller calls itself, it stays in its field: in no form of the report is it a control
/// character, a tag, a formula or a cell of its own.
#[test]
fn f2_nothing_a_caller_says_gets_out_of_its_field() {
    let folder = Folder::new("evil");
    let host = folder.path().join("h");
    fs::create_dir(&host).unwrap();
    let evil = "=1+1|<script>alert(1)</script>\u{1b}[31m\n{\"event\":\"alive\"}\r\u{202e}`x`\"'&";
    let request = a_request();
    let event = Event {
        schema: SCHEMA_VERSION,
        time: format!("{:.6}", jiff::Timestamp::now()),
        host: "h".into(),
        kind: Kind::Request(Box::new(Request {
            path: evil.into(),
            user_agent: Some(evil.into()),
            caller: Arc::new(Caller {
                comm: evil.into(),
                exe: Some(evil.into()),
                script: Some(evil.into()),
                systemd_unit: Some(evil.into()),
                command_line: Some(vec![evil.into()]),
                ..(*request.caller).clone()
            }),
            folded: None,
            ..request
        })),
        chain: None,
    };
    let line = serde_json::to_string(&event).unwrap();
    assert_eq!(line.lines().count(), 1);
    fs::write(host.join("events.jsonl"), format!("{line}\n")).unwrap();
    for form in ["table", "csv", "html", "md", "json"] {
        let output = guard("report", folder.path(), &["--format", form]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            !text.contains(['\u{1b}', '\u{202e}', '\r']) || form == "json",
            "{form}: {text}"
        );
        assert!(
            !text.bytes().any(|it| it < b' ' && it != b'\n'),
            "{form}: {text}"
        );
        assert!(!text.contains("<script") || form != "html", "{text}");
        match form {
            "csv" => {
                assert_eq!(text.lines().count(), 2, "{text}");
                assert!(text.contains("'=1+1"), "{text}");
            }
            "md" => assert!(!text.contains("`x`"), "{text}"),
            "json" => assert!(serde_json::from_str::<Value>(&text).is_ok()),
            _ => {}
        }
    }
    let events = run(Command::new(GUARD)
        .args(["events", "--since", "1h", "--file"])
        .arg(host.join("events.jsonl")));
    let text = String::from_utf8(events.stdout).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(!text.contains('\u{1b}'), "{text}");
    let ready = guard("ready", folder.path(), &[]);
    assert!(!String::from_utf8_lossy(&ready.stdout).contains('\u{1b}'));
}
