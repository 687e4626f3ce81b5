//! Where else events go: journald, OpenTelemetry, OCSF, CloudWatch, Prometheus; the live screen.

mod metrics;
mod slow;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use imds_guard::{
    lab::Place,
    policy::{Caller, Imds, Reason, Verdict},
    record::{
        Event, Kind, Recorder, Request,
        output::{Collector, Format, Journald, Lines, LogFile, Otlp, Output, Outputs},
    },
};
use imds_guard_tests::{Sandbox, python, run};
use serde_json::Value;

use crate::{
    GUARD, INSTANCE_ID_PATH,
    events::a_request,
    logs::{Folder, ROTATION},
};

/// Kills it in the end.
pub struct Helper(pub Child);

impl Helper {
    /// A guard that watches by now.
    pub fn watching(guard: &mut Command) -> Self {
        let mut guard = Self(guard.stderr(Stdio::piped()).spawn().unwrap());
        let mut said = BufReader::new(guard.0.stderr.take().unwrap()).lines();
        let mut complaint = String::new();
        while !complaint.contains("watching") {
            let line = said.next();
            complaint += &line
                .unwrap_or_else(|| panic!("it ended: {complaint}"))
                .unwrap();
        }
        // What it says later must go somewhere.
        std::thread::spawn(move || said.for_each(drop));
        guard
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Whatever a caller may say.
const EVIL: &str = "a\nIMDS_VERDICT=allow\n\u{1b}[2J\"},{\"x\":\"\u{2028}\u{9b}2J\u{202e}";

fn evil() -> Request {
    let request = a_request();
    Request {
        path: EVIL.into(),
        user_agent: Some(EVIL.into()),
        caller: Arc::new(Caller {
            comm: EVIL.into(),
            exe: Some(EVIL.into()),
            script: Some(EVIL.into()),
            ..(*request.caller).clone()
        }),
        folded: None,
        ..request
    }
}

/// The lines of an output, each a JSON value that fits a schema.
fn fitting(format: Format, schema: &str, events: &[Event]) -> Vec<Value> {
    let folder = Folder::new(&format!("schema-{}", schema.len()));
    let [file, values] = ["schema", "values"].map(|name| folder.path().join(name));
    let out = fs::File::create(&values).unwrap();
    let mut lines = Lines::to(format, Box::new(out));
    for event in events {
        assert!(lines.write(event, b"").is_ok());
    }
    assert!(lines.flush().is_ok());
    drop(lines);
    let text = fs::read_to_string(&values).unwrap();
    assert_plain(&text);
    fs::write(&file, schema).unwrap();
    let script = "
import json, jsonschema, sys
schema = json.load(open(sys.argv[1]))
jsonschema.Draft7Validator.check_schema(schema)
for line in open(sys.argv[2]):
    jsonschema.validate(json.loads(line), schema)
";
    let checked = run(Command::new(python())
        .args(["-c", script])
        .args([&file, &values]));
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Nothing but line ends is for a terminal to obey.
fn assert_plain(text: &str) {
    let is_obeyed = |it: &char| {
        *it != '\n' && (it.is_control() || "\u{202e}\u{2066}\u{2028}\u{61c}".contains(*it))
    };
    let obeyed: Vec<_> = text.chars().filter(is_obeyed).collect();
    assert!(obeyed.is_empty(), "{obeyed:?} in {text}");
}

fn event(request: Request) -> Event {
    Event::now(&"ip-10-0-0-1".into(), Kind::Request(Box::new(request)))
}

/// F2 and the format: as Amazon Security Lake takes it.
#[test]
fn f2_ocsf_fits_the_schema_whatever_callers_say() {
    let allowed = Request {
        verdict: Verdict::Allow,
        reason: Reason::SessionToken,
        imds: Some(Imds::V2),
        status: 200,
        ..a_request()
    };
    let events = [
        event(a_request()),
        event(evil()),
        event(allowed),
        Event::now(&"h".into(), Kind::EventsLost { count: 1 }),
    ];
    let lines = fitting(Format::Ocsf, include_str!("ocsf.schema.json"), &events);
    assert_eq!(lines.len(), 3, "only requests have a place in the class");
    assert_eq!(
        (&lines[0]["action_id"], &lines[0]["type_uid"]),
        (&Value::from(2), &Value::from(400_203))
    );
    assert_eq!(lines[0]["count"], 3);
    assert_eq!(lines[1]["http_request"]["url"]["path"], EVIL);
    assert_eq!(
        (&lines[2]["action_id"], &lines[2]["status_id"]),
        (&Value::from(1), &Value::from(1))
    );
}

/// F2 and the format: as the CloudWatch agent takes it; and nobody can make metrics without end.
#[test]
fn f2_emf_fits_the_schema_and_has_an_end() {
    let v2 = Request {
        imds: Some(Imds::V2),
        ..a_request()
    };
    let mut events = vec![event(v2), event(a_request()), event(evil())];
    for number in 0..500 {
        let request = a_request();
        events.push(event(Request {
            caller: Arc::new(Caller {
                script: Some(format!("/tmp/{number}")),
                ..(*request.caller).clone()
            }),
            folded: None,
            ..request
        }));
    }
    let lines = fitting(Format::emf(), include_str!("emf.schema.json"), &events);
    assert_eq!(lines.len(), 502, "IMDSv2 is no metric");
    let metrics = &lines[0]["_aws"]["CloudWatchMetrics"][0];
    assert_eq!(metrics["Metrics"][0]["Name"], "MetadataNoToken");
    assert_eq!(
        (
            &lines[0]["MetadataNoToken"],
            &lines[0]["MetadataNoTokenRejected"]
        ),
        (&Value::from(3), &Value::from(3))
    );
    assert!(
        lines[0]["Process"]
            .as_str()
            .unwrap()
            .contains("backup.service")
    );
    let processes: BTreeSet<_> = lines
        .iter()
        .map(|it| it["Process"].as_str().unwrap())
        .collect();
    assert_eq!(processes.len(), 201);
    assert_eq!(lines.last().unwrap()["Process"], "other");
}

/// F2: the log, whoever listens and `events --json` can be looked at in a terminal.
#[test]
fn f2_json_does_nothing_to_a_terminal() {
    let folder = Folder::new("terminal");
    let log = LogFile::open(&folder.log(), ROTATION).unwrap();
    let outputs = Outputs::default().with("events", Lines::to_file(Format::Json, log));
    let (recorder, writer) = Recorder::start("h", outputs).unwrap();
    let mut heard = recorder.listen();
    recorder.record(Kind::Request(Box::new(evil())));
    let heard = heard.try_recv().unwrap();
    drop(recorder);
    writer.finish();
    let written = fs::read(folder.log()).unwrap();
    assert_eq!(written, *heard);
    assert_plain(std::str::from_utf8(&written).unwrap());
    // A log that something else has written.
    let raw = serde_json::to_string(&event(evil())).unwrap();
    fs::write(folder.log(), raw + "\n").unwrap();
    let shown = run(Command::new(GUARD)
        .args(["events", "--json", "--since", "1h", "--file"])
        .arg(folder.log()));
    let text = String::from_utf8(shown.stdout).unwrap();
    assert_plain(&text);
    let Kind::Request(again) = serde_json::from_str::<Event>(&text).unwrap().kind else {
        panic!("{text}");
    };
    assert_eq!(again.user_agent.as_deref(), Some(EVIL));
}

/// F2: journald gets fields; what callers say is in one field each.
#[test]
fn f2_journald_gets_fields_that_nobody_can_forge() {
    let folder = Folder::new("journal");
    let path = folder.path().join("socket");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let mut journald = Journald::to(&path).unwrap();
    assert!(journald.write(&event(evil()), b"").is_ok());
    let mut buffer = vec![0; 65536];
    let length = socket.recv(&mut buffer).unwrap();
    let fields = fields(&buffer[..length]);
    let all = |name: &str| -> Vec<&str> {
        fields
            .iter()
            .filter(|(it, _)| it == name)
            .map(|(_, value)| value.as_str())
            .collect()
    };
    assert_eq!(all("IMDS_VERDICT"), ["deny"]);
    assert_eq!(all("IMDS_VERSION"), ["v1"]);
    assert_eq!(all("IMDS_PATH"), [EVIL]);
    assert_eq!(all("IMDS_CALLER_COMM"), [EVIL]);
    assert_eq!(all("PRIORITY"), ["4"]);
    assert_plain(all("MESSAGE")[0]);
}

/// A journald of the test's own finds requests by their fields.
#[test]
fn journalctl_finds_requests_by_version() {
    let script = "mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/log && mkdir -p /run/systemd/journal &&
        exec /lib/systemd/systemd-journald";
    let journald = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let journald = Helper(journald);
    let pid = journald.0.id();
    let begun = std::time::Instant::now();
    let find = |field: &str| {
        let arguments = [
            "--target",
            &pid.to_string(),
            "--mount",
            "journalctl",
            "-o",
            "json",
            field,
        ];
        let found = run(Command::new("nsenter").args(arguments));
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .collect::<Vec<_>>()
    };
    let socket = format!("/proc/{pid}/root/run/systemd/journal/socket");
    let mut output = Journald::to(Path::new(&socket)).unwrap();
    while let Err(lost) = output.write(&event(a_request()), b"") {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", lost.error);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(output.write(&event(evil()), b"").is_ok());
    let found = loop {
        let found = find("IMDS_VERSION=v1");
        if found.len() == 2 {
            break found;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{found:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(found[0]["IMDS_CALLER_EXE"], "/usr/bin/curl");
    assert_eq!(found[0]["SYSLOG_IDENTIFIER"], "imds-guard");
    assert_eq!(found[1]["IMDS_VERDICT"], "deny", "nobody adds a field");
    assert_eq!(find("IMDS_VERSION=v2"), [Value::Null; 0]);
}

/// The fields of a message, read as journald does.
fn fields(mut message: &[u8]) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    while !message.is_empty() {
        let end = message.iter().position(|byte| *byte == b'\n').unwrap();
        let line = &message[..end];
        message = &message[end + 1..];
        match line.iter().position(|byte| *byte == b'=') {
            Some(place) => fields.push((text(&line[..place]), text(&line[place + 1..]))),
            None => {
                let length = u64::from_le_bytes(message[..8].try_into().unwrap()) as usize;
                fields.push((text(line), text(&message[8..8 + length])));
                message = &message[8 + length + 1..];
            }
        }
    }
    fields
}

/// OpenTelemetry's own messages, read by OpenTelemetry's own code; a collector that is busy gets them again.
#[test]
fn otlp_is_what_a_collector_takes() {
    let collector = Command::new(python())
        .args(["-c", include_str!("collector.py")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut collector = Helper(collector);
    let mut lines = BufReader::new(collector.0.stdout.take().unwrap()).lines();
    let port = lines.next().unwrap().unwrap();
    let at = Collector::at(&format!("http://127.0.0.1:{port}")).unwrap();
    let otlp = Otlp::to(&"ip-10-0-0-1".into(), at).unwrap();
    let outputs = Outputs::default().with("otlp", otlp);
    let (recorder, writer) = Recorder::start("ip-10-0-0-1", outputs).unwrap();
    recorder.record(Kind::Request(Box::new(a_request())));
    recorder.record(Kind::Request(Box::new(evil())));
    let record: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(record["service"], "imds-guard");
    assert_eq!(record["event"], "imds_guard.request");
    assert_eq!(record["severity"], 13);
    let attributes = &record["attributes"];
    assert_eq!(attributes["imds.version"], "v1");
    assert_eq!(attributes["http.response.status_code"], 401);
    assert_eq!(attributes["systemd.unit"], "backup.service");
    let record: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(record["attributes"]["url.path"], EVIL);
    assert_eq!(recorder.lost(), 0);
    drop(collector);
    drop(recorder);
    writer.finish();
    assert!(Collector::at("https://example.com").is_err());
}

/// The live screen in a real terminal of 80×24.
#[test]
fn top_shows_callers_and_refusals_in_a_terminal() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let folder = Folder::new("top");
    let socket = folder.path().join("tmux");
    let tmux = |arguments: &[&str]| {
        let output = run(Command::new("tmux")
            .arg("-S")
            .arg(&socket)
            .args(arguments)
            .env_remove("TMUX")
            .env("LC_ALL", "C.UTF-8"));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let run_dir = sandbox.lab.run_dir();
    let command = format!("{GUARD} top --run-dir {}", run_dir.display());
    tmux(&[
        "new-session",
        "-d",
        "-x",
        "80",
        "-y",
        "24",
        "-s",
        "top",
        &command,
    ]);
    struct Server<'a>(&'a Path);
    impl Drop for Server<'_> {
        fn drop(&mut self) {
            let _gone = Command::new("tmux")
                .arg("-S")
                .arg(self.0)
                .arg("kill-server")
                .status();
        }
    }
    let _server = Server(&socket);
    let screen = |wanted: &str| {
        let begun = std::time::Instant::now();
        loop {
            let screen = tmux(&["capture-pane", "-p", "-t", "top"]);
            if screen.contains(wanted) {
                return screen;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "no {wanted} in {screen}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    screen("CALLER");
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    for _ in 0..3 {
        assert_eq!(sandbox.curl(Place::Host, &[&url]).status, 401);
    }
    let text = screen("/usr/bin/curl");
    let row = text
        .lines()
        .find(|line| line.contains("/usr/bin/curl"))
        .unwrap();
    let numbers: Vec<_> = row.split_whitespace().take(4).collect();
    assert!(
        numbers[0].parse::<u64>().is_ok() && numbers[1] == "0",
        "{text}"
    );
    assert!(text.contains("enforce") && text.contains("deny"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80) && text.lines().count() <= 24);
    tmux(&["send-keys", "-t", "top", "n"]);
    screen("CALLER▾");
    tmux(&["send-keys", "-t", "top", "q"]);
    let begun = std::time::Instant::now();
    while run(Command::new("tmux")
        .arg("-S")
        .arg(&socket)
        .arg("has-session"))
    .status
    .success()
    {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "q does not end it"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
