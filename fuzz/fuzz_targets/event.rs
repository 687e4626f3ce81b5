//! Events: whatever a caller says, an event is one line, and says the same when it is read.
#![no_main]

use std::sync::Arc;

use imds_guard::{
    policy::{
        Caller, Malformed, Mode, Reason, Verdict,
        caller::{Container, Parent, Pod},
        shortened,
    },
    record::{AnsweredBy, Endpoint, Event, Kind, Latency, Request, to_json},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\u{1}').map(|part| shortened(part, 512));
    let mut part = || parts.next().unwrap_or_default();
    let caller = Caller {
        comm: part(),
        resolved: true,
        exe: Some(part()),
        command_line: Some(vec![part(), part()]),
        parents: vec![Parent {
            pid: 1,
            exe: Some(part()),
            exe_verified: false,
        }],
        cgroup: Some(part()),
        systemd_unit: Some(part()),
        container: Some(Arc::new(Container {
            name: Some(part()),
            image: Some(part()),
        })),
        pod: Some(Arc::new(Pod {
            name: part(),
            namespace: part(),
            labels: [(part(), part())].into(),
            ..Pod::default()
        })),
        ..Caller::default()
    };
    let event = Event::now(
        &"host".into(),
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
            folded: None,
        })),
    );
    let line = to_json(&event).expect("an event");
    // What a terminal obeys, or shows in another order.
    let obeyed = |it: char| {
        it.is_control()
            || matches!(it, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!line.chars().any(obeyed), "{line:?}");
    let again: Event = serde_json::from_str(&line).expect("an event");
    assert_eq!(event, again);
});
