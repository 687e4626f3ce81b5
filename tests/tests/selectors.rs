//! Rules, by what they are about and what they change.

use std::process::Command;

use imds_guard::{
    lab::Place,
    policy::{Reason, Verdict},
    record::Request,
};
use imds_guard_tests::{Sandbox, run};

use crate::{
    ADDRESSES, GUARD, INSTANCE_ID_PATH,
    rules::{Folder, only, real, v1},
};

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";

/// Least privilege for requests with tokens: by who asks and what for.
#[test]
fn rules_about_v2_by_caller_and_path() {
    let curl = real("curl");
    let sandbox = Sandbox::configured(
        GUARD,
        &format!(
            "
            [[rule]]
            name = 'web may not have credentials'
            uid = 33
            exe = '{}'
            path = ['meta-data/**', '!meta-data/instance-id']
            action = 'deny'
            answer = 404
            [[rule]]
            name = 'silence'
            uid = 34
            method = 'GET'
            action = 'deny'
            answer = 'drop'
            [[rule]]
            name = 'watched'
            gid = 35
            imds = 'v2'
            action = 'audit'
            [[rule]]
            name = 'containers'
            netns = 'other'
            hops = 2
            endpoint = 'ipv6'
            action = 'deny'
            answer = 401
            ",
            curl.display()
        ),
    );
    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    assert_eq!(sandbox.request().reason, Reason::TokenRequest);
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let ask = |place, user: [&str; 2], address: &str, path: &str| {
        let output = run(sandbox
            .lab
            .command(place, "setpriv")
            .args([
                "--reuid",
                user[0],
                "--regid",
                user[1],
                "--clear-groups",
                "curl",
            ])
            .args([
                "-sg",
                "--max-time",
                "3",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-H",
                &header,
            ])
            .arg(format!("http://{address}{path}")));
        let event = sandbox.request();
        let status = String::from_utf8_lossy(&output.stdout).into_owned();
        (status, event.verdict, event.rule)
    };
    let [v4, v6] = [ADDRESSES[0], ADDRESSES[1]];
    let (host, container) = (Place::Host, Place::Container);
    let rule = |name: &str| Some(name.to_owned());
    use Verdict::{Allow, Audit, Deny};
    let table = [
        (
            host,
            ["33", "33"],
            v4,
            CREDENTIALS,
            "404",
            Deny,
            rule("web may not have credentials"),
        ),
        (
            host,
            ["33", "33"],
            v6,
            CREDENTIALS,
            "404",
            Deny,
            rule("web may not have credentials"),
        ),
        (host, ["33", "33"], v4, INSTANCE_ID_PATH, "200", Allow, None),
        (
            host,
            ["34", "34"],
            v4,
            INSTANCE_ID_PATH,
            "000",
            Deny,
            rule("silence"),
        ),
        (
            host,
            ["36", "35"],
            v4,
            CREDENTIALS,
            "200",
            Audit,
            rule("watched"),
        ),
        (host, ["36", "36"], v4, CREDENTIALS, "200", Allow, None),
        (
            container,
            ["36", "36"],
            v6,
            INSTANCE_ID_PATH,
            "401",
            Deny,
            rule("containers"),
        ),
        (
            container,
            ["36", "36"],
            v4,
            INSTANCE_ID_PATH,
            "200",
            Allow,
            None,
        ),
    ];
    for (place, user, address, path, status, verdict, rule) in table {
        let got = ask(place, user, address, path);
        assert_eq!(
            got,
            (status.to_owned(), verdict, rule),
            "{place:?} {user:?} {address} {path}"
        );
    }
}

#[test]
fn a_rule_on_an_ancestor_is_about_the_file_that_it_runs() {
    let dash = real("sh");
    let sandbox = Sandbox::configured(
        GUARD,
        &only(&format!("ancestor_exe = '{}'", dash.display())),
    );
    let mut from_shell = sandbox.lab.command(Place::Host, "sh");
    let (status, _) = v1(&sandbox, from_shell.args(["-c", "curl \"$@\"; true", "sh"]));
    assert_eq!(status, "200");
    let folder = Folder::new("ancestor");
    let copy = folder.copy(&dash, "sh");
    let mut from_copy = sandbox.lab.command(Place::Host, &copy);
    let (status, _) = v1(&sandbox, from_copy.args(["-c", "curl \"$@\"; true", "sh"]));
    assert_eq!(status, "401");
}

/// An ancestor that may be the excluded one is taken for it.
#[test]
fn a_rule_that_excludes_an_ancestor_wants_to_know_them_all() {
    let sandbox = Sandbox::configured(
        GUARD,
        "[[rule]]\nname = 'only from cron'\nancestor_exe = '!/usr/sbin/cron'\naction = 'deny'\n",
    );
    let folder = Folder::new("ancestors");
    let shell = folder.copy(&real("sh"), "sh");
    let script = "rm \"$0\"; curl \"$@\"; true";
    let mut from_deleted = sandbox.lab.command(Place::Host, &shell);
    let (status, event) = v1(&sandbox, from_deleted.args(["-c", script]).arg(&shell));
    assert_eq!((status.as_str(), event.rule.is_some()), ("403", true));
}

#[test]
fn a_rate_is_kept_for_each_caller() {
    let sandbox = Sandbox::configured(
        GUARD,
        "[[rule]]\nname = 'slow down'\nuid = [33, 34]\nrate = 3\n",
    );
    // In one go, so that no second passes in between.
    let ask = |uid: &str| {
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        let output = run(sandbox
            .lab
            .command(Place::Host, "setpriv")
            .args([
                "--reuid",
                uid,
                "--clear-groups",
                "curl",
                "-s",
                "--max-time",
                "20",
            ])
            .args(["-w", "%{http_code} ", "-o", "/dev/null"])
            .args([&url; 40].map(|url| ["-o", "/dev/null", url]).concat()));
        let statuses = String::from_utf8_lossy(&output.stdout).into_owned();
        let events: Vec<Request> = (0..40).map(|_| sandbox.request()).collect();
        let refused = events
            .iter()
            .filter(|event| event.reason == Reason::Rate)
            .count();
        assert_eq!(statuses.matches("429").count(), refused, "{statuses}");
        (statuses, refused)
    };
    for uid in ["33", "34"] {
        let (statuses, refused) = ask(uid);
        assert!(statuses.starts_with("200 200 200 "), "{statuses}");
        assert!(refused > 10, "{statuses}");
    }
    assert_eq!(ask("35").1, 0);
}

#[test]
fn a_rule_on_a_unit_or_a_group_is_about_these_or_all_but_these() {
    let sandbox = Sandbox::configured(
        GUARD,
        "
        mode = 'enforce'
        [[rule]]
        name = 'others'
        systemd_unit = '!backup.service'
        group = ['!www-data', '!nogroup']
        action = 'deny'
        answer = 404
        [[rule]]
        name = 'backup'
        systemd_unit = 'backup.service'
        imds = 'v1'
        action = 'allow'
        [[rule]]
        name = 'web'
        group = 'www-*'
        imds = 'v1'
        action = 'allow'
        ",
    );
    let service = sandbox.lab.add_room(Place::Host, "backup.service").unwrap();
    let other = sandbox.lab.add_room(Place::Host, "other.service").unwrap();
    let by_group = |mut command: Command, group: &str| {
        command.args(["--regid", group, "--clear-groups", "curl"]);
        let (status, event) = v1(&sandbox, &mut command);
        (status, event.rule)
    };
    let expected = |status: &str, rule: Option<&str>| (status.to_owned(), rule.map(str::to_owned));
    let got = by_group(service.command("setpriv"), "0");
    assert_eq!(got, expected("200", Some("backup")));
    let got = by_group(other.command("setpriv"), "0");
    assert_eq!(got, expected("404", Some("others")));
    let got = by_group(other.command("setpriv"), "33");
    assert_eq!(got, expected("200", Some("web")));
    let got = by_group(other.command("setpriv"), "65534");
    assert_eq!(got, expected("401", None));
}

#[test]
fn a_rule_binds_the_tokens_of_its_callers_alone() {
    let sandbox = Sandbox::configured(
        GUARD,
        "
        mode = 'enforce'
        [[rule]]
        name = 'narrow'
        uid = 33
        token_binding = 'cgroup'
        [[rule]]
        name = 'wide'
        uid = 34
        token_binding = 'off'
        ",
    );
    let other = sandbox.lab.add_room(Place::Host, "other").unwrap();
    let curl = |mut command: Command, uid: &str, arguments: &[&str]| {
        let output = run(command
            .args(["--reuid", uid, "--clear-groups", "curl", "-s"])
            .args(["--max-time", "20", "-w", "\n%{http_code}"])
            .args(arguments));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap();
        (body.to_owned(), status.to_owned(), sandbox.request())
    };
    // Under the general binding, a token is good in the whole network namespace of the host.
    let table = [
        ("33", true, "401", Reason::ForeignToken),
        ("34", false, "200", Reason::SessionToken),
        ("35", true, "200", Reason::SessionToken),
    ];
    for (uid, is_sealed, status, reason) in table {
        let host = || sandbox.lab.command(Place::Host, "setpriv");
        let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60";
        let url = "http://169.254.169.254/latest/api/token";
        let (token, got, _) = curl(host(), uid, &["-X", "PUT", "-H", ttl, url]);
        assert_eq!(
            (got.as_str(), token.starts_with("IG1.")),
            ("200", is_sealed)
        );
        let header = format!("X-aws-ec2-metadata-token: {token}");
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        let (_, here, _) = curl(host(), uid, &["-H", &header, &url]);
        assert_eq!(here, "200", "{uid}");
        let (_, there, event) = curl(other.command("setpriv"), uid, &["-H", &header, &url]);
        assert_eq!((there.as_str(), event.reason), (status, reason), "{uid}");
    }
}
