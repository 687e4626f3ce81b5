//! What is in force changes while the guard runs, all of it or nothing.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
        net::UnixStream,
    },
    thread,
    time::Duration,
};

use imds_guard::{
    lab::{Guard, Place},
    policy::{Mode, Reason, Verdict},
    record::{Change, Kind},
};
use imds_guard_tests::{Sandbox, lab, run};
use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH, logs::Folder};

pub const DENY: &str = "[[rule]]\nname = 'nobody'\npath = 'meta-data'\naction = 'deny'\n";

pub fn v1(sandbox: &Sandbox) -> u16 {
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    sandbox.curl(Place::Host, &[url]).status
}

pub fn status(sandbox: &Sandbox) -> Value {
    serde_json::from_str(&sandbox.tell(GUARD, &["status", "--json"])).unwrap()
}

#[test]
fn a_configuration_takes_effect_when_its_file_changes() {
    let sandbox = Sandbox::configured(GUARD, "");
    assert_eq!(v1(&sandbox), 200);
    assert_eq!(sandbox.request().verdict, Verdict::Audit);

    sandbox.configure("mode = 'enforce'");
    let change = sandbox.change();
    assert_eq!(
        (change.change, change.mode),
        (Change::Reloaded, Mode::Enforce)
    );
    assert_eq!(change.by, None);
    assert_eq!(v1(&sandbox), 401);
    assert_eq!(sandbox.request().reason, Reason::NoToken);
    // The kernel programs are told, too.
    assert_eq!(status(&sandbox)["mode"], "enforce");
    assert_eq!(status(&sandbox)["on_failure"], "closed");

    sandbox.configure(DENY);
    assert_eq!(sandbox.change().mode, Mode::Audit);
    assert_eq!(v1(&sandbox), 403);
    let event = sandbox.request();
    assert_eq!(
        (event.reason, event.rule.as_deref()),
        (Reason::Rule, Some("nobody"))
    );
    assert_eq!(status(&sandbox)["on_failure"], "open");
}

/// A rule may name a program by a link: whither that leads is looked up whenever the configuration is read.
#[test]
fn links_in_rules_are_followed_anew() {
    let folder = Folder::new("links");
    let at = |name: &str| folder.path().join(name);
    for name in ["one", "two"] {
        fs::copy("/usr/bin/curl", at(name)).unwrap();
    }
    symlink(at("one"), at("link")).unwrap();
    let config = format!(
        "mode = 'enforce'\n[[rule]]\nname = 'a'\nexe = '{}'\nimds = 'v1'\naction = 'allow'\n",
        at("link").display()
    );
    let sandbox = Sandbox::configured(GUARD, &config);
    let granted = || {
        ["one", "two"].map(|name| {
            let url = format!("http://{}{INSTANCE_ID_PATH}", ADDRESSES[0]);
            let mut command = sandbox.lab.command(Place::Host, at(name));
            run(command.args(["-s", "-o", "/dev/null", &url]));
            sandbox.request().rule.is_some()
        })
    };
    assert_eq!(granted(), [true, false]);
    fs::remove_file(at("link")).unwrap();
    symlink(at("two"), at("link")).unwrap();
    sandbox.guard.signal(Signal::SIGHUP).unwrap();
    assert_eq!(sandbox.change().change, Change::Reloaded);
    assert_eq!(granted(), [false, true]);
}

#[test]
fn a_configuration_is_read_again_when_told() {
    let sandbox = Sandbox::configured(GUARD, "");
    let conf_d = sandbox.lab.config().with_file_name("conf.d");
    // Files in a directory that was not there are not noticed by themselves.
    fs::create_dir(&conf_d).unwrap();
    fs::write(conf_d.join("50-mode.toml"), "mode = 'enforce'").unwrap();
    fs::write(conf_d.join("60-rules.toml"), DENY).unwrap();
    fs::write(conf_d.join("ignored.txt"), "nonsense").unwrap();
    fs::write(conf_d.join(".hidden.toml"), "nonsense").unwrap();
    sandbox.guard.signal(Signal::SIGHUP).unwrap();
    let change = sandbox.change();
    assert_eq!(
        (change.mode, change.rules, change.by),
        (Mode::Enforce, 1, None)
    );

    fs::write(conf_d.join("70-more.toml"), "hop_limit = 2\nlink = 'eth0'").unwrap();
    let said = sandbox.tell(GUARD, &["reload"]);
    assert!(said.starts_with("enforce mode, 1 rules"), "{said}");
    assert!(
        said.contains("takes effect at the next start: link"),
        "{said}"
    );
    let change = sandbox.change();
    assert_eq!(change.by.unwrap().uid, 0);
    assert_eq!(change.needs_restart, ["link"]);
}

/// D5: a request ends under the rules that it was judged by; the next one on the same connection is
/// judged by those that are there then.
#[test]
fn d5_a_request_in_flight_ends_as_it_was_judged() {
    let sandbox = Sandbox::configured(GUARD, "");
    sandbox.lab.imds().set_delay(Duration::from_secs(2));
    let script = format!(
        r"
import http.client
client = http.client.HTTPConnection('169.254.169.254', 80)
wait()
statuses = []
for _ in range(2):
    client.request('GET', '{INSTANCE_ID_PATH}')
    answer = client.getresponse()
    answer.read()
    statuses.append(answer.status)
print(*statuses)
"
    );
    let client = sandbox.python_waiting(Place::Host, &script);
    let served = thread::scope(|scope| {
        let served = scope.spawn(|| client.go());
        // It has been judged when it is on its way.
        while sandbox.lab.imds().requests().is_empty() {
            thread::yield_now();
        }
        sandbox.configure(DENY);
        assert_eq!(sandbox.change().rules, 1);
        served.join().unwrap()
    });
    assert_eq!(served, "200 403");
    let events = [sandbox.request(), sandbox.request()];
    assert_eq!(
        events.map(|event| event.reason),
        [Reason::NoToken, Reason::Rule]
    );
}

#[test]
fn the_mode_is_switched_for_a_time_and_it_is_known_by_whom() {
    let sandbox = Sandbox::configured(GUARD, "");
    let said = sandbox.tell(GUARD, &["mode", "enforce", "--for", "2s"]);
    assert!(said.starts_with("enforce mode until 20"), "{said}");
    let change = sandbox.change();
    assert_eq!((change.change, change.mode), (Change::Mode, Mode::Enforce));
    assert_eq!(change.by.unwrap().uid, 0);
    assert!(change.until.is_some());
    assert_eq!(v1(&sandbox), 401);
    assert_eq!(sandbox.request().mode, Mode::Enforce);
    let now = status(&sandbox);
    assert_eq!(
        (&now["mode"], &now["guard"]["configured_mode"]),
        (&json!("enforce"), &json!("audit"))
    );
    assert_eq!(now["on_failure"], "closed");

    let change = sandbox.change();
    assert_eq!(
        (change.change, change.mode),
        (Change::ModeReturned, Mode::Audit)
    );
    assert_eq!((change.by, change.until), (None, None));
    assert_eq!(v1(&sandbox), 200);
    assert_eq!(sandbox.request().verdict, Verdict::Audit);
    assert_eq!(status(&sandbox)["mode"], "audit");

    // For good, and back again; a new configuration does not end it.
    sandbox.tell(GUARD, &["mode", "enforce"]);
    assert_eq!(sandbox.change().until, None);
    sandbox.configure("hop_limit = 2");
    assert_eq!(sandbox.change().mode, Mode::Enforce);
    sandbox.tell(GUARD, &["mode", "configured"]);
    assert_eq!(sandbox.change().mode, Mode::Audit);
}

/// Tokens from before tokens were bound stay good when they are.
#[test]
fn a_client_with_a_token_notices_no_switch() {
    let sandbox = Sandbox::configured(GUARD, "");
    let used = |token: &str| {
        let header = format!("X-aws-ec2-metadata-token: {token}");
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        sandbox.curl(Place::Host, &["-H", &header, &url]).status
    };
    let plain = sandbox.token(Place::Host, ADDRESSES[0]);
    sandbox.tell(GUARD, &["mode", "enforce"]);
    assert_eq!(used(&plain), 200);
    let sealed = sandbox.token(Place::Host, ADDRESSES[0]);
    assert!(sealed.starts_with("IG1.") && !plain.starts_with("IG1."));
    sandbox.tell(GUARD, &["mode", "audit"]);
    assert_eq!((used(&plain), used(&sealed)), (200, 200));
}

/// E1: the control socket is root's alone.
#[test]
fn e1_only_root_controls() {
    let sandbox = Sandbox::configured(GUARD, "");
    let socket = sandbox.lab.run_dir().join("control.sock");
    let meta = fs::metadata(&socket).unwrap();
    assert_eq!((meta.uid(), meta.permissions().mode() & 0o777), (0, 0o600));
    assert_eq!(
        fs::metadata(sandbox.lab.run_dir())
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );

    // As a user who has found a way to the directory.
    let as_nobody = || {
        let script = "
import os, socket, sys
os.chdir(sys.argv[1])
os.setresuid(65534, 65534, 65534)
s = socket.socket(socket.AF_UNIX)
try:
    s.connect('control.sock')
    try: s.sendall(b'{\"v\":1,\"do\":\"mode\",\"mode\":\"audit\"}\\n')
    except BrokenPipeError: pass  # turned away before it has spoken
    print(s.recv(4096).decode())
except OSError as error: print(type(error).__name__)";
        let output = run(sandbox
            .lab
            .command(Place::Host, imds_guard_tests::python())
            .args(["-c", script])
            .arg(sandbox.lab.run_dir()));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(as_nobody(), "PermissionError");
    // Even if somebody opens the doors.
    for (path, mode) in [
        (sandbox.lab.run_dir().as_path(), 0o755),
        (socket.as_path(), 0o777),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let said = as_nobody();
    assert!(said.contains("only root may ask"), "{said}");
    let told = run(sandbox.lab.command(Place::Guard, GUARD).args([
        "mode",
        "audit",
        "--run-dir",
        "/nowhere",
    ]));
    assert_eq!(told.status.code(), Some(21));
}

/// The protocol, as `docs/control-api.md` has it.
#[test]
fn the_control_socket_speaks_lines_of_json() {
    let sandbox = Sandbox::configured(GUARD, DENY);
    let connect = || {
        let stream = UnixStream::connect(sandbox.lab.run_dir().join("control.sock")).unwrap();
        BufReader::new(stream)
    };
    fn line(client: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        // Whoever is turned away with something unread is cut off.
        let _cut_off = client.read_line(&mut line);
        serde_json::from_str(&line).unwrap_or(Value::Null)
    }
    fn ask(client: &mut BufReader<UnixStream>, text: &str) -> Value {
        client
            .get_mut()
            .write_all(format!("{text}\n").as_bytes())
            .unwrap();
        line(client)
    }
    let mut client = connect();
    let status = ask(&mut client, r#"{"v":1,"do":"status"}"#);
    assert_eq!(status["v"], 1);
    assert_eq!(status["ok"]["rules"][0]["name"], "nobody");
    let wrong = [
        (r#"{"v":2,"do":"status"}"#, "version 2"),
        (r#"{"v":1,"do":"dance"}"#, "unknown variant"),
        ("nonsense", "expected"),
        (
            r#"{"v":1,"do":"explain","pid":4194305}"#,
            "no process 4194305",
        ),
        (
            r#"{"v":1,"do":"explain","path":"/a%2fb"}"#,
            "refused in every mode",
        ),
    ];
    for (text, expected) in wrong {
        let answer = ask(&mut client, text);
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(expected), "{text}: {error}");
    }
    // A line without an end is not waited for in memory.
    let mut endless = connect();
    let _hung_up = endless.get_mut().write_all(&vec![b'x'; 100_000]);
    assert_eq!(line(&mut endless), Value::Null);

    let mut events = connect();
    assert_eq!(
        ask(&mut events, r#"{"v":1,"do":"events"}"#)["ok"],
        json!({})
    );
    assert_eq!(v1(&sandbox), 403);
    let event = line(&mut events);
    assert_eq!(
        (&event["event"], &event["rule"]),
        (&json!("request"), &json!("nobody"))
    );

    assert_eq!(ask(&mut client, r#"{"v":1,"do":"drain"}"#)["ok"], json!({}));
    let (status, _) = sandbox.guard.wait().unwrap();
    assert!(status.success());
    assert!(!sandbox.lab.run_dir().join("control.sock").exists());
}

#[test]
fn status_and_events_show_what_happened() {
    let sandbox = Sandbox::configured(GUARD, &format!("mode = 'enforce'\n{DENY}"));
    let follow = |arguments: &[&str]| {
        let mut command = sandbox.lab.command(Place::Guard, GUARD);
        command.args(["events", "--follow"]).args(arguments);
        command.env("IMDS_GUARD_RUN_DIR", sandbox.lab.run_dir());
        command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut all = follow(&["--json"]);
    let mut denied = follow(&["--verdict", "denied", "--imds", "v1", "--user", "root"]);
    // They listen when the guard says so, which nobody can see from here but by what they print.
    let mut first = String::new();
    let mut lines = BufReader::new(all.stdout.take().unwrap());
    let mut lines_of_denied = BufReader::new(denied.stdout.take().unwrap());
    let mut asked = 0;
    while first.is_empty() {
        let heard = thread::scope(|scope| {
            let reader = scope.spawn(|| lines.read_line(&mut first));
            while !reader.is_finished() {
                assert_eq!(v1(&sandbox), 403);
                asked += 1;
            }
            reader.join().unwrap()
        });
        heard.unwrap();
    }
    let event: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(event["rule"], "nobody");
    let mut line = String::new();
    thread::scope(|scope| {
        let reader = scope.spawn(|| lines_of_denied.read_line(&mut line));
        while !reader.is_finished() {
            let _token = sandbox.token(Place::Host, ADDRESSES[0]);
            assert_eq!(v1(&sandbox), 403);
            asked += 1;
        }
    });
    assert!(
        line.contains("deny    v1    403 GET /latest/meta-data/instance-id"),
        "{line}"
    );
    assert!(line.contains("(rule by \"nobody\")"), "{line}");
    for mut child in [all, denied] {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    let now = status(&sandbox);
    let guard = &now["guard"];
    assert_eq!(guard["rules"][0]["hits"], asked);
    assert_eq!(guard["totals"]["denied"], asked);
    let callers = guard["callers"].as_object().unwrap();
    let (caller, counts) = callers.iter().next().unwrap();
    assert!(caller.contains("/curl (root)"), "{caller}");
    assert_eq!(counts["v1"], asked);
    let text = sandbox.tell(GUARD, &["status"]);
    for words in [
        "mode        enforce",
        "nobody (deny)",
        "/curl (root)",
        "0 lost",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn status_is_shown_again_and_again() {
    let sandbox = Sandbox::configured(GUARD, "");
    let mut watch = sandbox
        .lab
        .command(Place::Guard, GUARD)
        .args(["status", "--watch"])
        .env("IMDS_GUARD_RUN_DIR", sandbox.lab.run_dir())
        .env("IMDS_GUARD_PINS", sandbox.lab.pins())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut shows = |words: &str| {
        let line = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(words)));
        assert!(line.is_some(), "{words} is never shown");
    };
    shows("mode        audit");
    sandbox.tell(GUARD, &["mode", "enforce"]);
    shows("mode        enforce");
    watch.kill().unwrap();
    watch.wait().unwrap();
}

/// Before an exception ends, whoever answers for it is told.
#[test]
fn it_is_said_a_week_before_that_a_rule_expires() {
    let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let rule = |name: &str, days: i64| {
        let day = today.checked_add(days.days()).unwrap();
        format!(
            "[[rule]]\nname = '{name}'\nowner = 'team {name}'\nexpires = {day}\naction = 'allow'\n"
        )
    };
    let config = [rule("over", -1), rule("soon", 3), rule("later", 30)].concat();
    let (mut said, writer) = std::io::pipe().unwrap();
    let lab = lab();
    fs::write(lab.config(), config).unwrap();
    let mut command = lab.guard_command(GUARD);
    let guard = Guard::spawn(command.env("RUST_LOG", "warn").stderr(writer)).unwrap();
    drop(command);
    let (events, _lab) = Sandbox { guard, lab }.stop();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut said, &mut text).unwrap();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("expire"))
        .collect();
    let day = |days: i64| today.checked_add(days.days()).unwrap();
    let expected = [
        format!("rule \"over\" has expired ({}; team over)", day(-1)),
        format!("rule \"soon\" expires soon ({}; team soon)", day(3)),
    ];
    assert_eq!(lines.len(), 2, "{text}");
    for (line, expected) in lines.iter().zip(&expected) {
        assert!(line.contains(expected), "{expected}: {text}");
    }
    let expired = events
        .iter()
        .filter(|event| matches!(event.kind, Kind::RuleExpired(_)));
    assert_eq!(expired.count(), 1, "{events:?}");
}

#[test]
fn explain_says_which_rule_decides_and_why_others_do_not() {
    let sandbox = Sandbox::configured(
        GUARD,
        "mode = 'enforce'
         [[rule]]
         name = 'over'
         expires = 2020-01-01
         action = 'allow'
         [[rule]]
         name = 'backup'
         user = 'backup'
         imds = 'v1'
         action = 'allow'
         [[rule]]
         name = 'pods'
         namespace = 'web'
         path = 'meta-data/iam'
         action = 'deny'",
    );
    let explain = |arguments: &[&str]| {
        let text = sandbox.tell(GUARD, &[&["explain", "--json"], arguments].concat());
        serde_json::from_str::<Value>(&text).unwrap()["explanation"].clone()
    };
    let by_mode = explain(&["--user", "www-data", "--imds", "v1"]);
    assert_eq!(
        (&by_mode["verdict"], &by_mode["status"]),
        (&json!("deny"), &json!(401))
    );
    assert_eq!(by_mode["rule"], Value::Null);
    assert_eq!(by_mode["rules"][0]["expired"], true);
    assert_eq!(by_mode["rules"][1]["mismatches"], json!(["user"]));
    assert_eq!(
        by_mode["rules"][2]["mismatches"],
        json!(["namespace", "path"])
    );
    let by_rule = explain(&["--user", "backup", "--imds", "v1"]);
    assert_eq!(
        (&by_rule["verdict"], &by_rule["rule"]),
        (&json!("allow"), &json!("backup"))
    );
    let pod = explain(&["--namespace", "web", "--path", "/latest/meta-data/iam/info"]);
    assert_eq!(
        (&pod["rule"], &pod["status"]),
        (&json!("pods"), &json!(403))
    );

    // A process that is there: this test.
    let pid = std::process::id().to_string();
    let text = sandbox.tell(GUARD, &["explain", "--pid", &pid, "--imds", "v1"]);
    let me = std::env::current_exe().unwrap();
    assert!(text.contains(me.to_str().unwrap()), "{text}");
    assert!(
        text.contains("rule     \"backup\": does not match: user"),
        "{text}"
    );
    assert!(
        text.contains("verdict  deny (no_token, answered with 401)"),
        "{text}"
    );
    // Without a guard, by the file.
    let config = sandbox.lab.config();
    let here = run(sandbox
        .lab
        .command(Place::Guard, GUARD)
        .args(["explain", "--user", "backup"])
        .args(["--imds", "v1", "--config", config.to_str().unwrap()]));
    let here = String::from_utf8_lossy(&here.stdout).into_owned();
    assert!(here.contains("decides  rule \"backup\""), "{here}");
}
