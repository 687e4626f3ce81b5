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
    record::{Event, Kind, Request, SCHEMA_VERSION, Stopped},
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
    // By one thread: the same numbers.
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
    let (code, said) = ready(&clean, &["--since", "20d", "--elastic"]);
    assert_eq!(code, Some(0), "{said}");
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
    // Half a line is one that is just being written; a whole one that is no event may be anything.
    fs::write(&log, format!("{text}{{\"schema\":1,\"ti")).unwrap();
    assert_eq!(ready(&clean, &[]).0, Some(0));
    fs::write(&log, format!("{text}{{\"schema\":1,\"ti\n")).unwrap();
    assert_eq!(ready(&clean, &[]).0, Some(1));
    // One call is enough; those that were refused or carried over are not.
    let table = [
        (Verdict::Deny, 401, "v1_denied", 0),
        (Verdict::Audit, 401, "v1_denied", 0),
        (Verdict::Upgrade, 200, "v1_upgraded", 0),
        (Verdict::Audit, 200, "v1_needed", 1),
        (Verdict::Allow, 404, "v1_needed", 1),
    ];
    for (verdict, status, field, expected) in table {
        let request = Request {
            verdict,
            status,
            folded: None,
            ..a_request()
        };
        let line = line_of("ip-10-0-0-1", Kind::Request(Box::new(request)));
        fs::write(&log, format!("{text}{line}\n")).unwrap();
        let (code, said) = ready(&clean, &[]);
        assert_eq!(
            (code, &said[field]),
            (Some(expected), &Value::from(1)),
            "{said}"
        );
        let callers = said["callers"].as_array().unwrap().len();
        assert_eq!(callers, expected as usize);
    }
}

fn line_of(host: &str, kind: Kind) -> String {
    let event = Event {
        schema: SCHEMA_VERSION,
        time: format!("{:.6}", jiff::Timestamp::now()),
        host: host.into(),
        kind,
        chain: None,
    };
    serde_json::to_string(&event).unwrap()
}

/// Logs that say nothing of the time in question prove nothing, and hosts may go, but not in silence.
#[test]
fn readiness_is_not_found_in_silence() {
    let elastic = |folder: &Folder| guard("ready", folder.path(), &["--elastic"]).status.code();
    let old = Folder::new("old");
    make(
        &old,
        &[
            "--hosts",
            "1",
            "--requests",
            "100",
            "--clean",
            "--days",
            "2",
            "--end",
            "2026-01-03T00:00:00Z",
        ],
    );
    assert_eq!(elastic(&old), Some(1), "all of it is from before");

    let alive = || Kind::Alive(Stopped::default());
    let gone = Folder::new("gone");
    fs::create_dir(gone.path().join("h")).unwrap();
    let hours_ago = |line: String, hours: i64| {
        let now = format!("{:.6}", jiff::Timestamp::now());
        let then = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours);
        let begin = line.find("\"time\":\"").unwrap() + 8;
        line[..begin].to_owned() + &format!("{then:.6}") + &line[begin + now.len()..]
    };
    let log = gone.path().join("h/events.jsonl");
    let line = hours_ago(line_of("h", alive()), 2);
    fs::write(&log, format!("{line}\n")).unwrap();
    assert_eq!(elastic(&gone), Some(1), "its guard may be dead");
    let line = hours_ago(line_of("h", alive()), 1);
    let stopped = hours_ago(line_of("h", Kind::Stopped(Stopped::default())), 1);
    fs::write(&log, format!("{line}\n{stopped}\n")).unwrap();
    assert_eq!(elastic(&gone), Some(0));
    // Other files of the guard's are no event logs.
    fs::write(gone.path().join("h/ocsf.json"), "{\"class_uid\":4002}\n").unwrap();
    fs::write(
        gone.path().join("h/ocsf.json.20260101T000000.000000Z.zst"),
        "",
    )
    .unwrap();
    assert_eq!(elastic(&gone), Some(0));
}

/// The same lines in whatever files, and part of them, and times that are none.
#[test]
fn a_report_reads_each_line_once_and_only_what_it_is_asked_for() {
    let folder = Folder::new("once");
    make(
        &folder,
        &["--hosts", "2", "--requests", "4000", "--days", "6"],
    );
    let report = |arguments: &[&str]| {
        json(&guard(
            "report",
            folder.path(),
            &[&["--format", "json"], arguments].concat(),
        ))
    };
    let whole = report(&[]);
    let counted = count(folder.path());
    assert_eq!(whole["events"], counted.events);
    // A crash between compressing a file and removing it leaves both.
    let host = fs::read_dir(folder.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let packed = fs::read_dir(&host).unwrap().map(|it| it.unwrap().path());
    let packed = packed
        .into_iter()
        .find(|it| it.extension().unwrap() == "zst")
        .unwrap();
    fs::write(
        packed.with_extension(""),
        zstd::decode_all(&fs::read(&packed).unwrap()[..]).unwrap(),
    )
    .unwrap();
    assert_eq!(report(&[]), whole);
    fs::remove_file(packed.with_extension("")).unwrap();
    // One of the hosts, by its file.
    let alone = json(&guard(
        "report",
        &host.join("events.jsonl"),
        &["--format", "json"],
    ));
    assert_eq!(alone["hosts"], 1);
    // What came before is left out, whole files of it, too.
    let since = report(&["--since", "2d"]);
    let border = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(48);
    assert!(
        since["from"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .unwrap()
            >= border
    );
    let (some, all) = (since["events"].as_u64().unwrap(), counted.events);
    assert!(some > all / 6 && some < all / 2, "{some} of {all}");
    // The other forms have the same numbers.
    let v1 = counted.v1.to_string();
    let text = |form| {
        String::from_utf8(guard("report", folder.path(), &["--format", form]).stdout).unwrap()
    };
    let mut rows = csv::Reader::from_reader(text("csv").into_bytes().leak() as &[u8]);
    let column = rows
        .headers()
        .unwrap()
        .iter()
        .position(|it| it == "v1")
        .unwrap();
    let sum: u64 = rows
        .records()
        .map(|row| row.unwrap()[column].parse::<u64>().unwrap())
        .sum();
    assert_eq!(sum.to_string(), v1);
    for form in ["table", "md"] {
        assert!(text(form).replace(',', "").contains(&v1), "{form}");
    }
    // Whoever can write into the log of one host cannot break the report of all.
    let log = host.join("events.jsonl");
    let lines = fs::read_to_string(&log).unwrap();
    let evil = [
        "2026-11-2\u{20ac}x",
        "<meta http-equiv=refresh>",
        "2026-11-24T12:34\u{1b}[2J",
    ];
    let evil: String = evil
        .iter()
        .map(|time| {
            let event =
                serde_json::json!({"schema": 1, "time": time, "host": "h", "event": "alive"});
            format!("{event}\n")
        })
        .collect();
    fs::write(&log, lines + &evil).unwrap();
    assert_eq!(report(&[])["skipped"], 3);
    let page = text("html");
    assert!(!page.contains("refresh") && !page.contains('\u{1b}'));
}

/// Hosts in several networks can have one name; what one of them says does not stand for the other.
#[test]
fn hosts_of_one_name_are_told_apart_by_instance() {
    let folder = Folder::new("namesakes");
    let alive = line_of("ip-10-0-0-1", Kind::Alive(Stopped::default()));
    for instance in ["i-0000000000000000a", "i-0000000000000000b"] {
        fs::create_dir(folder.path().join(instance)).unwrap();
        let name = "\"host\":\"ip-10-0-0-1\"";
        let line = alive.replace(name, &format!("{name},\"instance\":\"{instance}\""));
        fs::write(
            folder.path().join(instance).join("events.jsonl"),
            line + "\n",
        )
        .unwrap();
    }
    let said = json(&guard("ready", folder.path(), &["--json"]));
    assert_eq!(said["hosts"], 2, "{said}");
    assert_eq!(said["gaps"].as_array().unwrap().len(), 2, "{said}");
    assert_eq!(said["gaps"][1]["host"], "ip-10-0-0-1 (i-0000000000000000b)");
}

/// A program is the same caller before and after it was updated.
#[test]
fn a_replaced_program_is_one_caller() {
    let folder = Folder::new("replaced");
    fs::create_dir(folder.path().join("h")).unwrap();
    let mut lines = String::new();
    for exe in ["/opt/agent", "/opt/agent (deleted)"] {
        let request = a_request();
        let caller = Caller {
            exe: Some(exe.into()),
            ..(*request.caller).clone()
        };
        let caller = Arc::new(caller);
        let request = Request { caller, ..request };
        lines += &(line_of("h", Kind::Request(Box::new(request))) + "\n");
    }
    fs::write(folder.path().join("h/events.jsonl"), lines).unwrap();
    let report = json(&guard("report", folder.path(), &["--format", "json"]));
    assert_eq!(report["v1_callers"].as_array().unwrap().len(), 1);
    assert_eq!(report["v1_callers"][0]["program"], "/opt/agent");
}

/// However many paths a caller asks for, the credentials are not lost among them.
#[test]
fn nobody_hides_what_they_took_behind_other_paths() {
    let folder = Folder::new("hidden");
    fs::create_dir(folder.path().join("h")).unwrap();
    let mut lines = String::new();
    for number in 0..200 {
        let path = format!("/latest/meta-data/junk-{number}");
        let request = Request {
            path,
            folded: None,
            ..a_request()
        };
        lines += &(line_of("h", Kind::Request(Box::new(request))) + "\n");
    }
    let path = "/latest/meta-data/iam/security-credentials/admin";
    let request = Request {
        path: path.into(),
        folded: None,
        ..a_request()
    };
    lines += &(line_of("h", Kind::Request(Box::new(request))) + "\n");
    fs::write(folder.path().join("h/events.jsonl"), lines).unwrap();
    let report = json(&guard("report", folder.path(), &["--format", "json"]));
    let paths = report["v1_callers"][0]["paths"].as_array().unwrap();
    assert_eq!(paths[0]["path"], path);
    assert_eq!(paths[0]["wanted"], "credentials");
    let sum: u64 = paths.iter().map(|it| it["calls"].as_u64().unwrap()).sum();
    assert_eq!(sum, 201);
}

/// F2: whatever a caller calls itself, it stays in its field: in no form of the report is it a control
/// character, a tag, a formula or a cell of its own.
#[test]
fn f2_nothing_a_caller_says_gets_out_of_its_field() {
    let folder = Folder::new("evil");
    let host = folder.path().join("h");
    fs::create_dir(&host).unwrap();
    let evil = "=1+1|<script>alert(1)</script>\u{1b}[31m\u{9b}2J\u{61c}\u{2028}\n{\"event\":\"alive\"}\r\u{202e}`x`\"'&";
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
            !text.contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{2028}', '\u{61c}', '\r']),
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
