//! A migration as owners go through it: watch, write down the exceptions, enforce, and let them expire,
//! while clients that speak IMDSv2 notice nothing.

use std::{
    fs,
    io::Read as _,
    process::{Command, Stdio},
    time::Duration,
};

use imds_guard::{
    lab::{Place, fake_imds::INSTANCE_ID},
    policy::Mode,
    record::{Change, Kind},
};
use imds_guard_tests::{Sandbox, python, run};
use jiff::Timestamp;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

const HOSTNAME_PATH: &str = "/latest/meta-data/hostname";

/// Events that are not about the load.
fn next(sandbox: &Sandbox, seen: &mut Vec<String>) -> Kind {
    loop {
        let (line, event) = sandbox.guard.line().unwrap();
        match event.kind {
            Kind::Request(request) if request.caller.comm == "wrk" => {}
            kind => {
                seen.push(line);
                return kind;
            }
        }
    }
}

#[test]
fn from_audit_to_enforce() {
    let sandbox = Sandbox::configured(GUARD, "");
    let mut seen = Vec::new();
    let host = |program: &str| sandbox.lab.command(Place::Host, program);
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");

    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    assert!(matches!(next(&sandbox, &mut seen), Kind::Request(_)));
    // It stops by itself at the latest.
    let mut load = host("wrk")
        .args(["-t", "1", "-c", "4", "-d", "90s", "-H"])
        .arg(format!("X-aws-ec2-metadata-token: {token}"))
        .arg(&url)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();

    // Five callers: four that do not know of tokens, and one that does.
    let as_user = |uid: &str, program: &[&str]| -> Command {
        let mut command = host("setpriv");
        command
            .args(["--reuid", uid, "--clear-groups"])
            .args(program);
        command
    };
    let python = python();
    let fetch = format!("import urllib.request; print(urllib.request.urlopen('{url}').status)");
    let modern = format!(
        "t=$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token); \
         curl -s -H \"X-aws-ec2-metadata-token: $t\" {url}"
    );
    let hostname = format!("http://169.254.169.254{HOSTNAME_PATH}");
    let backup = || as_user("34", &["curl", "-s", "-f", &url, &hostname]);
    let agent = || as_user("65534", &["curl", "-s", "-f", &url]);
    let script = || as_user("0", &[&python, "-c", &fetch]);
    let old_tool = || as_user("33", &["wget", "-q", "-O", "-", &url]);
    let sdk = || as_user("13", &["sh", "-c", &modern]);
    let mut works = |mut command: Command, requests: usize| {
        let output = run(&mut command);
        for _ in 0..requests {
            assert!(matches!(next(&sandbox, &mut seen), Kind::Request(_)));
        }
        output.status.success() && !output.stdout.is_empty()
    };
    assert!(works(backup(), 2) && works(agent(), 1) && works(script(), 1));
    assert!(works(old_tool(), 1) && works(sdk(), 2));

    // What would have to be let go on?
    let events = sandbox.lab.config().with_file_name("events.jsonl");
    fs::write(&events, seen.join("\n")).unwrap();
    let file = events.to_str().unwrap();
    let suggested = sandbox.tell(GUARD, &["policy", "suggest", "--file", file]);
    let rules: toml::Table = suggested
        .parse()
        .unwrap_or_else(|error| panic!("{error}: {suggested}"));
    let rules = rules["rule"].as_array().unwrap();
    assert_eq!(rules.len(), 4, "{suggested}");
    assert!(
        rules
            .iter()
            .all(|rule| rule["imds"].as_str() == Some("v1") && rule.get("expires").is_some())
    );
    // As it is, it would do.
    let trial = |config: &str, uid: &str, path: &str| {
        let file = sandbox.lab.config().with_file_name("trial.toml");
        fs::write(&file, config).unwrap();
        let user = if uid == "34" { "backup" } else { "nobody" };
        let curl = fs::canonicalize("/usr/bin/curl").unwrap();
        let arguments = [
            "explain", "--json", "--imds", "v1", "--uid", uid, "--user", user,
        ];
        let arguments = [
            &arguments[..],
            &["--exe", curl.to_str().unwrap(), "--path", path],
        ]
        .concat();
        let arguments = [&arguments[..], &["--config", file.to_str().unwrap()]].concat();
        let answer: serde_json::Value =
            serde_json::from_str(&sandbox.tell(GUARD, &arguments)).unwrap();
        answer["explanation"]["verdict"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let whole = format!("mode = 'enforce'\n{suggested}");
    assert_eq!(trial(&whole, "34", HOSTNAME_PATH), "allow");
    assert_eq!(
        trial(&whole, "65534", HOSTNAME_PATH),
        "deny",
        "it has not asked for that"
    );

    // Review: two of them stay, one of these not for long.
    let curl = fs::canonicalize("/usr/bin/curl").unwrap();
    let expires = Timestamp::now() + Duration::from_secs(12);
    let reviewed = format!(
        "mode = 'enforce'
         [[rule]]
         name = 'backup'
         owner = 'storage team'
         expires = {expires:.3}
         user = 'backup'
         exe = '{0}'
         imds = 'v1'
         path = ['{INSTANCE_ID_PATH}', '{HOSTNAME_PATH}']
         action = 'allow'
         [[rule]]
         name = 'agent'
         expires = 2099-12-31
         user = 'nobody'
         exe = '{0}'
         imds = 'v1'
         path = '{INSTANCE_ID_PATH}'
         action = 'allow'
         ",
        curl.display()
    );
    let mut seen = Vec::new();
    let mut change = || loop {
        match next(&sandbox, &mut seen) {
            Kind::Policy(change) => return change,
            Kind::RuleExpired(_) => {}
            other => panic!("{other:?}"),
        }
    };
    sandbox.configure(&reviewed);
    assert_eq!(change().mode, Mode::Enforce);
    let mut seen = Vec::new();
    let mut works = |mut command: Command, requests: usize| {
        let output = run(&mut command);
        let mut left = requests;
        while left > 0 {
            match next(&sandbox, &mut seen) {
                Kind::Request(_) => left -= 1,
                Kind::RuleExpired(expired) => {
                    panic!("{expired:?}: too slow a machine for this story")
                }
                other => panic!("{other:?}"),
            }
        }
        output.status.success() && !output.stdout.is_empty()
    };
    assert!(works(backup(), 2) && works(agent(), 1) && works(sdk(), 2));
    assert!(!works(script(), 1) && !works(old_tool(), 1));

    // One exception expires by itself.
    let mut later = Vec::new();
    match next(&sandbox, &mut later) {
        Kind::RuleExpired(expired) => {
            assert_eq!(
                (expired.rule.as_str(), expired.owner.as_deref()),
                ("backup", Some("storage team"))
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(!works(backup(), 2) && works(agent(), 1));

    // A slip of the pen changes nothing.
    sandbox.configure(&reviewed.replace("action", "actoin"));
    let rejected = change();
    assert_eq!(
        (rejected.change, rejected.mode),
        (Change::Rejected, Mode::Enforce)
    );
    assert!(rejected.error.unwrap().contains("did you mean `action`?"));
    assert!(works(agent(), 1) && !works(script(), 1));

    // Something is on fire: back to audit for a while.
    sandbox.tell(GUARD, &["mode", "audit", "--for", "3s"]);
    assert_eq!(
        (change().change, change_mode(&sandbox)),
        (Change::Mode, "audit".into())
    );
    assert!(works(script(), 1) && works(old_tool(), 1));
    assert_eq!(change().change, Change::ModeReturned);
    assert!(!works(script(), 1) && works(agent(), 1));

    // All the while: not one request with a token failed.
    kill(Pid::from_raw(load.id() as i32), Signal::SIGINT).unwrap();
    let mut report = String::new();
    load.stdout
        .take()
        .unwrap()
        .read_to_string(&mut report)
        .unwrap();
    load.wait().unwrap();
    assert!(
        !report.contains("Non-2xx") && !report.contains("Socket errors"),
        "{report}"
    );
    let served: u64 = report
        .lines()
        .find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok())
        .unwrap();
    assert!(served > 1000, "{report}");
    assert!(
        sandbox
            .curl(
                Place::Host,
                &["-H", &format!("X-aws-ec2-metadata-token: {token}"), &url]
            )
            .body
            == INSTANCE_ID
    );
}

fn change_mode(sandbox: &Sandbox) -> String {
    let status = sandbox.tell(GUARD, &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["mode"].as_str().unwrap().to_owned()
}
