//! Suggestions, tried as rules.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::{
    config::Keys,
    policy::{Ask, Request as Asked, Rules, SessionToken, Subject, path::Path},
};

/// A line of a log, as it may be found.
fn event(more: &Value) -> Event {
    let mut event = json!({
        "schema": 1, "time": "2026-01-02T03:04:05.000000Z", "host": "h", "event": "request",
        "verdict": "audit", "reason": "no_token", "mode": "audit", "imds": "v1", "method": "GET",
        "path": "/latest/meta-data/instance-id", "status": 200, "answered_by": "service",
        "endpoint": "ipv4", "hops": 1, "latency_us": {"guard": 1, "upstream": 1},
        "caller": {
            "pid": 7, "tid": 7, "uid": 33, "gid": 33, "comm": "app", "cgroup_id": 1,
            "netns_cookie": 1, "netns": "host", "resolved": true, "exe": "/usr/bin/app",
            "exe_verified": true, "user": "www-data"
        }
    });
    merge(&mut event, more);
    serde_json::from_value(event).unwrap()
}

fn merge(into: &mut Value, more: &Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more.clone(),
    }
}

/// What would be suggested for these.
fn suggested(events: &[Event]) -> (String, Keys) {
    let mut seen = Seen::default();
    for event in events {
        seen.add(event);
    }
    let text = seen.suggest(jiff::civil::date(2030, 1, 31)).unwrap();
    let keys = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (text, keys)
}

/// Whether a request of version 1 goes on under rules, in enforce mode.
fn goes_on(rules: &Keys, caller: &Caller, path: &str) -> bool {
    let keys = Keys {
        mode: Some(crate::policy::Mode::Enforce),
        ..rules.clone()
    };
    let mut policy = keys.settings().unwrap().policy;
    policy.rules = Arc::new(Rules::new(rules.rules.clone()));
    let subject = Subject {
        caller,
        endpoint: "ipv4",
        hops: 1,
    };
    let request = Asked {
        imds: Imds::V1,
        forwarded: false,
        flaw: None,
        path: Path::read(path).unwrap(),
        token: None,
    };
    let ask = Ask {
        imds: Imds::V1,
        method: "GET",
        path: &request.path,
    };
    let now = Timestamp::UNIX_EPOCH;
    let candidates = policy.rules.candidates(&subject);
    let terms = policy.terms(&candidates, now);
    let asked = (&request, &ask);
    let judged = policy.judge(&candidates, terms, asked, 1, SessionToken::Plain, now);
    judged.decision.verdict != Verdict::Deny
}

fn caller(event: &Event) -> &Caller {
    match &event.kind {
        Kind::Request(request) => &request.caller,
        _ => panic!("{event:?}"),
    }
}

#[test]
fn what_was_asked_for_goes_on_and_no_secret_besides() {
    const ROLE: &str = "/latest/meta-data/iam/security-credentials/role";
    let many: Vec<String> = (0..20)
        .map(|it| format!("/latest/meta-data/{it}/x"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    #[rustfmt::skip]
    let table: [(&[&str], &[&str]); 12] = [
        // asked for                                            and so not
        (&["/latest/meta-data/"],                               &[ROLE, "/latest/user-data"]),
        (&["/latest/meta-data"],                                &[ROLE]),
        (&["/latest/"],                                         &[ROLE, "/latest/user-data"]),
        (&["/"],                                                &[ROLE, "/latest/user-data"]),
        (&["/1.0/meta-data/"],                                  &["/1.0/meta-data/iam/security-credentials/role"]),
        (&["/latest/meta-data/", ROLE],                         &["/latest/user-data"]),
        (&["/latest/meta-data/iam/"],                           &[ROLE]),
        (&["/latest/meta-data/iam/security-credentials/"],      &["/latest/user-data"]),
        (&["/", "/latest/user-data"],                           &[ROLE]),
        (&many,                                                 &[ROLE, "/latest/user-data"]),
        (&["/latest//meta-data/./local-ipv4", "/latest/meta-data/%69am/info"], &[ROLE, "/latest/meta-data/mac"]),
        (&["/latest/meta-data/a%20b*", "/latest/meta-data/a..b"], &[ROLE, "/latest/meta-data/axxxb"]),
    ];
    for (asked, others) in table {
        let events: Vec<_> = asked
            .iter()
            .map(|path| event(&json!({"path": path})))
            .collect();
        let (text, rules) = suggested(&events);
        assert_eq!(rules.rules.len(), 1, "{text}");
        assert!(rules.rules[0].path.is_some(), "{text}");
        for path in asked {
            assert!(goes_on(&rules, caller(&events[0]), path), "{path}: {text}");
        }
        for path in others {
            assert!(!goes_on(&rules, caller(&events[0]), path), "{path}: {text}");
        }
    }
    // Cut by the log in the middle of a letter.
    let (text, _) = suggested(&[event(&json!({"path": "/latest/meta-data/tags/%4"}))]);
    assert!(
        text.contains("path = [\"/latest/meta-data/tags\"]"),
        "{text}"
    );
}

#[test]
fn each_caller_is_known_by_what_lasts_and_is_its_own() {
    let pod = |more: Value| {
        let mut pod = json!({"netns": "other", "exe_verified": false, "pod_uid": "a-pod", "user": null,
            "container_id": "c0ffee", "pod": {"name": "web-5d-x", "namespace": "shop",
            "service_account": "default", "owner": "Deployment/web", "labels": {}}});
        merge(&mut pod, &more);
        pod
    };
    let table = [
        (json!({}), "exe = \"/usr/bin/app\"\nuser = \"www-data\""),
        (json!({"user": null}), "exe = \"/usr/bin/app\"\nuid = 33"),
        (
            pod(json!({"pod": {"service_account": "web"}})),
            "namespace = \"shop\"\nservice_account = \"web\"",
        ),
        (
            pod(json!({"container": {"image": "i:1"}})),
            "namespace = \"shop\"\ncontainer_image = \"i:1\"",
        ),
        (pod(json!({})), "namespace = \"shop\"\npod = \"web-*\""),
        (
            pod(json!({"pod": {"owner": null}})),
            "namespace = \"shop\"\npod_uid = \"a-pod\"",
        ),
        (
            pod(json!({"pod": {"owner": "Node/web"}})),
            "namespace = \"shop\"\npod_uid = \"a-pod\"",
        ),
        (
            pod(json!({"pod": {"owner": "Job/other"}})),
            "namespace = \"shop\"\npod_uid = \"a-pod\"",
        ),
        // What nobody writes, but may be in a log.
        (
            pod(json!({"pod": {"namespace": "", "owner": "/", "name": ""}})),
            "pod_uid = \"a-pod\"",
        ),
        (
            pod(json!({"pod": {"namespace": "", "owner": null}, "pod_uid": null})),
            "uid = 33",
        ),
    ];
    for (seen, expected) in table {
        let (text, rules) = suggested(&[event(&json!({"caller": seen}))]);
        assert_eq!(rules.rules.len(), 1, "{text}");
        assert!(text.contains(expected), "{expected}: {text}");
        let namespace = &rules.rules[0].namespace;
        let others = Caller {
            resolved: true,
            pod_uid: Some("other".into()),
            pod: Some(Arc::new(Pod {
                name: "db-0".into(),
                namespace: "shop".into(),
                ..Pod::default()
            })),
            ..Caller::default()
        };
        assert!(
            !goes_on(&rules, &others, "/latest/meta-data/instance-id"),
            "{namespace:?} {text}"
        );
    }
}

#[test]
fn whoever_relies_on_an_exception_keeps_it() {
    let exception = json!({"verdict": "allow", "reason": "rule", "rule": "old", "mode": "enforce"});
    let (text, rules) = suggested(&[event(&exception)]);
    assert_eq!(rules.rules.len(), 1, "{text}");
    assert!(
        text.contains("1 v1 requests") && text.contains("action = \"allow\""),
        "{text}"
    );
    let upgrade =
        json!({"verdict": "upgrade", "reason": "upgraded", "rule": "old", "mode": "enforce"});
    let (text, _) = suggested(&[event(&upgrade), event(&upgrade)]);
    assert!(text.contains("action = \"upgrade\""), "{text}");
    let (text, _) = suggested(&[event(&upgrade), event(&json!({}))]);
    assert!(text.contains("action = \"allow\""), "{text}");
    // Nobody else needs one.
    let v2 = json!({"verdict": "allow", "reason": "session_token", "imds": "v2"});
    let denied = json!({"verdict": "deny", "reason": "rule", "rule": "old"});
    let (text, rules) = suggested(&[event(&v2), event(&denied)]);
    assert!(rules.rules.is_empty(), "{text}");
    assert!(
        text.contains("Not covered: 1 requests refused or marked for rule."),
        "{text}"
    );
}
