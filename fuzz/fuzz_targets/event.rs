//! Events: whatever a caller says, an event is one line, and says the same when it is read.
#![no_main]

use std::sync::Arc;

use imds_guard::{
    policy::{
        Caller, Malformed, Mode, Reason, Verdict,
        caller::{Netns, Parent},
        shortened,
    },
    record::{AnsweredBy, Endpoint, Event, Kind, Latency, Request},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\u{1}').map(|part| shortened(part, 512));
    let mut part = || parts.next().unwrap_or_default();
    let caller = Caller {
        pid: 1,
        tid: 1,
        uid: 0,
        gid: 0,
        comm: part(),
        cgroup_id: 1,
        netns_cookie: 1,
        netns: Netns::Host,
        resolved: true,
        unresolved: None,
        exe: Some(part()),
        command_line: Some(vec![part(), part()]),
        started: None,
        parents: vec![Parent {
            pid: 1,
            exe: Some(part()),
        }],
        cgroup: Some(part()),
        user: None,
        systemd_unit: Some(part()),
        container_id: None,
        container_runtime: None,
        pod_uid: None,
    };
    let event = Event::now(
        "host",
        Kind::Request(Box::new(Request {
            verdict: Verdict::Deny,
            reason: Reason::Malformed,
            malformed: Some(Malformed::Path),
            rule: None,
            mode: Mode::Enforce,
            imds: None,
            fallback: false,
            method: part(),
            path: part(),
            user_agent: Some(part()),
            status: 400,
            answered_by: AnsweredBy::Guard,
            upstream_failure: None,
            endpoint: Endpoint::Ipv4,
            hops: 1,
            caller: Arc::new(caller),
            latency_us: Latency {
                guard: 0,
                upstream: 0,
            },
        })),
    );
    let line = serde_json::to_string(&event).expect("an event");
    assert!(!line.bytes().any(|byte| byte < b' '), "{line:?}");
    let again: Event = serde_json::from_str(&line).expect("an event");
    assert_eq!(event, again);
});
