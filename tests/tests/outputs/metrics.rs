//! Metrics for Prometheus, and a guard that has all outputs at once.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use imds_guard::{
    lab::Place,
    policy::Caller,
    record::{Metrics, Request},
};
use imds_guard_tests::{python, run};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::Value;

use super::{EVIL, Helper, evil, fields};
use crate::{GUARD, INSTANCE_ID_PATH, events::a_request, logs::Folder};

/// What Prometheus would be told of these requests.
fn told(requests: &[Request]) -> String {
    let metrics = Metrics::default();
    for request in requests {
        metrics.request(request);
    }
    let mut registry = Registry::with_prefix("imds_guard");
    metrics.register(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    text
}

/// OpenMetrics as the older format has it, which is the one that promtool checks: a counter's family has the
/// name of its series, and there is no unit and no mark at the end.
fn plain(metrics: &str) -> String {
    let counters: BTreeSet<_> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut plain = String::new();
    for line in metrics.lines() {
        let mut words: Vec<_> = line.splitn(4, ' ').map(str::to_owned).collect();
        match (words[0].as_str(), words.get(1).map(String::as_str)) {
            ("#", Some("EOF" | "UNIT")) => continue,
            ("#", _) if counters.contains(words[2].as_str()) => words[2] += "_total",
            _ => {}
        }
        plain += &(words.join(" ") + "\n");
    }
    plain
}

fn promtool(arguments: &[&str], input: &str) -> std::process::Output {
    let tool = xtask::bpf::tools().join("prometheus/usr/bin/promtool");
    let mut promtool = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: run `cargo xtask test`");
    std::io::Write::write_all(&mut promtool.stdin.take().unwrap(), input.as_bytes()).unwrap();
    promtool.wait_with_output().unwrap()
}

/// F2: callers choose their names; they get no further than into a label, and there are not more of them than
/// Prometheus can bear.
#[test]
fn f2_callers_stay_in_their_labels_and_have_an_end() {
    let text = told(&[evil()]);
    let lines: Vec<_> = text
        .lines()
        .filter(|it| it.starts_with("imds_guard_v1_requests_total"))
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(!text.contains(|it: char| it.is_control() && it != '\n'));
    assert!(!text.contains(EVIL));
    let checked = promtool(&["check", "metrics"], &plain(&text));
    assert!(checked.status.success(), "{checked:?}");

    let requests: Vec<_> = (0..500)
        .map(|number| {
            let request = a_request();
            Request {
                caller: Arc::new(Caller {
                    script: Some(format!("/tmp/{number}")),
                    ..(*request.caller).clone()
                }),
                ..request
            }
        })
        .collect();
    let text = told(&requests);
    let of_callers = |it: &&str| it.starts_with("imds_guard_v1_requests_total");
    assert_eq!(text.lines().filter(of_callers).count(), 201);
    let other = "imds_guard_v1_requests_total{caller=\"other\",verdict=\"deny\"} 300\n";
    assert!(text.contains(other), "{text}");
}

/// All of it at once, as somebody would configure it; `status` and metrics tell.
#[test]
fn a_guard_writes_to_all_of_them_and_prometheus_reads_its_metrics() {
    let folder = Folder::new("all");
    let [ocsf, emf, metrics, journal] = ["ocsf.jsonl", "emf.jsonl", "metrics.sock", "journal.sock"]
        .map(|name| folder.path().join(name));
    let lab = imds_guard_tests::lab();
    let journald = UnixDatagram::bind(&journal).unwrap();
    journald
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let collector = lab
        .command(Place::Guard, python())
        .args(["-c", include_str!("collector.py")])
        .stdout(Stdio::piped())
        .spawn();
    let mut collector = Helper(collector.unwrap());
    let mut collected = BufReader::new(collector.0.stdout.take().unwrap()).lines();
    let port = collected.next().unwrap().unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let rules = "[[rule]]\nname = \"a rule\"\npath = \"/latest/user-data\"\naction = \"deny\"\n";
    let config = format!(
        "mode = \"enforce\"\nevents = \"{}\"\nevents_chain = true\nocsf = \"{}\"\nemf = \"{}\"\nmetrics = \"{}\"\n\
         events_sync = \"batch\"\njournald = \"{}\"\notlp = \"http://127.0.0.1:{port}\"\n{rules}",
        path(&folder.log()),
        path(&ocsf),
        path(&emf),
        path(&metrics),
        path(&journal)
    );
    fs::write(lab.config(), config).unwrap();
    let mut guard = Helper::watching(&mut lab.guard_command(GUARD));
    for (url, status) in [(INSTANCE_ID_PATH, 401), ("/latest/user-data", 403)] {
        let answer =
            imds_guard_tests::curl(&lab, Place::Host, &[format!("http://169.254.169.254{url}")]);
        assert_eq!(answer.status, status);
    }
    let has_request = |fields: &[(String, String)]| {
        let has = |name: &str, value: &str| fields.contains(&(name.to_owned(), value.to_owned()));
        has("IMDS_VERSION", "v1") && has("IMDS_PATH", INSTANCE_ID_PATH)
    };
    let mut message = vec![0; 65536];
    while let length = journald.recv(&mut message).unwrap()
        && !has_request(&fields(&message[..length]))
    {}
    let record = collected
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .find(|record| record["event"] == "imds_guard.request");
    let attributes = &record.unwrap()["attributes"];
    assert_eq!(attributes["url.path"], INSTANCE_ID_PATH);
    let scraped = run(Command::new("curl")
        .args(["-sS", "--unix-socket"])
        .arg(&metrics)
        .arg("http://h/metrics"));
    let text = String::from_utf8(scraped.stdout).unwrap();
    let value = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(
        value("imds_guard_requests_total{version=\"v1\",verdict=\"deny\",endpoint=\"ipv4\"}"),
        2.0
    );
    assert_eq!(
        value("imds_guard_v1_requests_total{caller=\"/usr/bin/curl"),
        2.0
    );
    assert_eq!(
        value("imds_guard_connections_total{outcome=\"redirected\"}"),
        2.0
    );
    assert_eq!(value("imds_guard_rule_hits_total{rule=\"a rule\"}"), 1.0);
    assert_eq!(value("imds_guard_mode{mode=\"enforce\"}"), 1.0);
    assert_eq!(value("imds_guard_map_capacity{map=\"FLOWS\"}"), 16384.0);
    assert_eq!(value("imds_guard_guard_duration_seconds_count"), 2.0);
    assert_eq!(
        value("imds_guard_events_lost_total{output=\"events\"}"),
        0.0
    );
    let checked = promtool(&["check", "metrics"], &plain(&text));
    assert!(checked.status.success(), "{checked:?}");
    assert_eq!(
        value("imds_guard_requests_total{version=\"v1\",verdict=\"audit\",endpoint=\"ipv6\"}"),
        0.0,
        "there before the first one, so that it shows as an increase"
    );
    charts_show_what_there_is(&text);
    let pid = nix::unistd::Pid::from_raw(guard.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(guard.0.wait().unwrap().success());
    let lines = |path: &Path| fs::read_to_string(path).unwrap().lines().count();
    assert_eq!((lines(&folder.log()), lines(&ocsf), lines(&emf)), (4, 2, 2));
    let verified = run(Command::new(GUARD)
        .args(["events", "verify", "--file"])
        .arg(folder.log()));
    assert!(verified.status.success());
}

/// A guard that takes over goes on with the same log, the same chain and the same port for metrics.
#[test]
fn a_handover_keeps_the_chain_and_the_metrics() {
    let folder = Folder::new("handover");
    let lab = imds_guard_tests::lab();
    let config = format!(
        "events = \"{}\"\nevents_chain = true\nmetrics = \"127.0.0.1:9254\"\n",
        folder.log().display()
    );
    fs::write(lab.config(), config).unwrap();
    let start = |arguments: &[&str]| Helper::watching(lab.guard_command(GUARD).args(arguments));
    let ask = || {
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        assert_eq!(
            imds_guard_tests::curl(&lab, Place::Host, &[url]).status,
            200
        );
    };
    let mut old = start(&[]);
    ask();
    let mut new = start(&["--replace"]);
    assert!(old.0.wait().unwrap().success());
    ask();
    let scraped = imds_guard_tests::curl(&lab, Place::Guard, &["http://127.0.0.1:9254/metrics"]);
    assert_eq!(scraped.status, 200);
    assert!(
        scraped.body.contains(
            "imds_guard_requests_total{version=\"v1\",verdict=\"audit\",endpoint=\"ipv4\"} 1\n"
        ),
        "{}",
        scraped.body
    );
    let pid = nix::unistd::Pid::from_raw(new.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(new.0.wait().unwrap().success());
    let verified = run(Command::new(GUARD)
        .args(["events", "verify", "--file"])
        .arg(folder.log()));
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(
        said.starts_with("6 lines are as they were written"),
        "{said}"
    );
    let text = fs::read_to_string(folder.log()).unwrap();
    let adopted = text
        .lines()
        .filter(|line| line.contains("\"adopted\":true"))
        .count();
    assert_eq!(adopted, 1, "{text}");
    // Readiness sees that one guard followed the other.
    let ready = run(Command::new(GUARD)
        .args(["ready", "--elastic", "--json"])
        .arg(folder.log()));
    let said: Value = serde_json::from_slice(&ready.stdout).unwrap();
    let gaps = said["gaps"][0]["gaps"].as_array().unwrap();
    let why: BTreeSet<_> = gaps.iter().map(|it| it["why"].as_str().unwrap()).collect();
    // The lab is but a part of this machine.
    let of_the_lab = "only one cgroup was watched (--cgroup)";
    assert_eq!(why, [of_the_lab].into(), "{said}");
    assert_eq!(said["v1_needed"], 2);
}

/// Dashboard and alerts ask for metrics that are there; Prometheus takes the alerts, and they fire when they
/// should.
fn charts_show_what_there_is(metrics: &str) {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
    let dashboard = fs::read_to_string(packaging.join("grafana/imds-guard.json")).unwrap();
    let alerts = fs::read_to_string(packaging.join("prometheus/alerts.yml")).unwrap();
    assert!(serde_json::from_str::<Value>(&dashboard).is_ok());
    let mut asked = BTreeSet::new();
    for text in [&dashboard, &alerts] {
        for part in text.split("imds_guard_").skip(1) {
            let name = part
                .split(|it: char| !it.is_ascii_alphanumeric() && it != '_')
                .next()
                .unwrap();
            asked.insert(format!("imds_guard_{name}"));
        }
    }
    assert!(asked.len() > 10, "{asked:?}");
    for name in asked {
        // A family is described, even if nothing was counted yet.
        let family = ["_total", "_bucket"]
            .iter()
            .fold(name.as_str(), |name, end| {
                name.strip_suffix(end).unwrap_or(name)
            });
        assert!(
            metrics.contains(&format!("# TYPE {family} ")),
            "{name} is no metric"
        );
    }
    let folder = packaging.join("prometheus");
    for arguments in [
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts.test.yml"],
    ] {
        let tool = xtask::bpf::tools().join("prometheus/usr/bin/promtool");
        let checked = run(Command::new(tool).args(arguments).current_dir(&folder));
        assert!(checked.status.success(), "{checked:?}");
    }
}
