//! The event schema stays as it is documented.

use std::{env, fs, path::PathBuf, sync::Arc};

use imds_guard::{
    policy::{
        Caller, Imds, Malformed, Mode, Reason, Verdict,
        caller::{Missing, Netns, Parent, Pod, Runtime, Sender, Unresolved, Via},
    },
    record::{
        AnsweredBy, By, Change, ConnectionRefusal, Counts, Endpoint, Event, Folded, Kind, Latency,
        Layer, Packet, PolicyChange, RefusedConnection, Request, RuleExpired, SCHEMA_VERSION,
        Started, Stopped, Unwatched, UpstreamFailure, UpstreamFailureKind,
    },
};

fn event(kind: Kind) -> Event {
    Event {
        schema: SCHEMA_VERSION,
        time: "2026-01-02T03:04:05.678901Z".into(),
        host: "ip-172-31-16-10".into(),
        kind,
        chain: None,
    }
}

/// A request that was refused.
pub fn a_request() -> Request {
    v1_request()
}

fn v1_request() -> Request {
    Request {
        verdict: Verdict::Deny,
        reason: Reason::NoToken,
        malformed: None,
        rule: Some("legacy".into()),
        fallback: true,
        answered_by: AnsweredBy::Guard,
        mode: Mode::Enforce,
        imds: Some(Imds::V1),
        method: "GET".into(),
        path: "/latest/meta-data/instance-id".into(),
        user_agent: Some("curl/8.5.0".into()),
        status: 401,
        upstream_failure: None,
        endpoint: Endpoint::Ipv4,
        hops: 1,
        caller: Arc::new(Caller {
            pid: 4242,
            tid: 4243,
            uid: 33,
            gid: 33,
            comm: "backup".into(),
            cgroup_id: 5150,
            netns_cookie: 1,
            netns: Netns::Host,
            resolved: true,
            unresolved: None,
            exe: Some("/usr/bin/curl".into()),
            exe_verified: true,
            exe_sha256: None,
            command_line: Some(vec!["curl".into(), "-s".into(), "169.254.169.254".into()]),
            started: Some("2026-01-02T03:04:05.50Z".into()),
            script: Some("/opt/backup/run.sh".into()),
            login: Some("alice".into()),
            login_session: Some(7),
            via: vec![Via::Sudo],
            parents: vec![
                Parent {
                    pid: 4000,
                    exe: Some("/usr/bin/dash".into()),
                    exe_verified: false,
                },
                Parent {
                    pid: 1,
                    exe: Some("/usr/lib/systemd/systemd".into()),
                    exe_verified: false,
                },
            ],
            cgroup: Some("/system.slice/backup.service".into()),
            user: Some("www-data".into()),
            group: Some("www-data".into()),
            systemd_unit: Some("backup.service".into()),
            container_id: None,
            container_runtime: None,
            pod_uid: None,
            container: None,
            pod: None,
            missing: Missing::default(),
        }),
        latency_us: Latency {
            guard: 180,
            upstream: 0,
        },
        folded: Some(Folded {
            count: 3,
            first: "2026-01-02T03:04:00.000000Z".into(),
            last: "2026-01-02T03:04:05.678901Z".into(),
        }),
    }
}

fn unresolved_request() -> Request {
    let named = v1_request();
    Request {
        verdict: Verdict::Audit,
        reason: Reason::Malformed,
        malformed: Some(Malformed::RepeatedToken),
        rule: None,
        fallback: false,
        answered_by: AnsweredBy::Nobody,
        mode: Mode::Audit,
        imds: None,
        // What a caller controls cannot end a line or a string.
        path: "/\"\\\n\u{1b}[31m\u{2028}".into(),
        user_agent: None,
        folded: None,
        upstream_failure: Some(UpstreamFailure {
            kind: UpstreamFailureKind::TimedOut,
            message: "169.254.169.254:80 did not answer within 5s".into(),
        }),
        status: 504,
        endpoint: Endpoint::Ipv4Mapped,
        hops: 3,
        caller: Arc::new(Caller {
            netns: Netns::Other,
            resolved: false,
            unresolved: Some(Unresolved::PidReused),
            exe: None,
            command_line: None,
            script: None,
            login: None,
            login_session: None,
            via: Vec::new(),
            started: None,
            parents: Vec::new(),
            cgroup: None,
            user: None,
            systemd_unit: None,
            ..(*named.caller).clone()
        }),
        ..named
    }
}

fn request_from_a_pod() -> Request {
    let named = v1_request();
    Request {
        verdict: Verdict::Allow,
        reason: Reason::SessionToken,
        imds: Some(Imds::V2),
        status: 200,
        hops: 2,
        caller: Arc::new(Caller {
            netns: Netns::Other,
            cgroup: Some("/kubepods.slice/…".into()),
            user: None,
            systemd_unit: None,
            container_id: Some("3f4a0e6d1b2c…".into()),
            container_runtime: Some(Runtime::Containerd),
            pod_uid: Some("1a2b3c4d-1111-2222-3333-444455556666".into()),
            pod: Some(Arc::new(Pod {
                name: "web-7d9f4c6b5-x2x4z".into(),
                namespace: "shop".into(),
                owner: Some("Deployment/web".into()),
                service_account: Some("web".into()),
                labels: [("app".to_owned(), "web".to_owned())].into(),
            })),
            ..(*named.caller).clone()
        }),
        ..named
    }
}

#[test]
fn every_kind_of_event_is_written_as_documented() {
    let kinds = [
        Kind::Request(Box::new(v1_request())),
        Kind::Request(Box::new(unresolved_request())),
        Kind::Request(Box::new(request_from_a_pod())),
        Kind::ConnectionRefused(RefusedConnection {
            reason: ConnectionRefusal::NotRedirected,
            peer: "10.88.0.2:40000".into(),
            pid: None,
            uid: None,
            comm: None,
        }),
        Kind::ConnectionRefused(RefusedConnection {
            reason: ConnectionRefusal::TooMany,
            peer: "169.254.171.254:40000".into(),
            pid: Some(4242),
            uid: Some(33),
            comm: Some("backup".into()),
        }),
        Kind::EventsLost { count: 7 },
        Kind::Started(Started {
            version: "0.1.0".into(),
            mode: Mode::Audit,
            cgroup: "/sys/fs/cgroup".into(),
            listeners: vec!["169.254.171.254:254".into()],
            on_failure: "closed".into(),
            backstop: true,
            uplinks: vec!["ens5".into()],
            adopted: true,
            counts: Counts {
                redirected: 12,
                ..Counts::default()
            },
            took_over_from: Some(411),
        }),
        Kind::Alive(Stopped::default()),
        Kind::Packet(Packet {
            verdict: Verdict::Deny,
            layer: Layer::Perimeter,
            protocol: "tcp".into(),
            endpoint: Endpoint::Ipv4,
            source: [192, 168, 122, 7].into(),
            source_port: Some(50123),
            ttl: 63,
            interface: "ens5".into(),
            came_from: Some("virbr0".into()),
            sender: None,
            unreported: 0,
        }),
        Kind::Packet(Packet {
            verdict: Verdict::Audit,
            layer: Layer::Backstop,
            protocol: "udp".into(),
            endpoint: Endpoint::Ipv6,
            source: "2001:db8::7".parse().unwrap(),
            source_port: None,
            ttl: 64,
            interface: "ens5".into(),
            came_from: None,
            sender: Some(Sender {
                uid: 33,
                cgroup_id: 5150,
                cgroup: Some("/system.slice/backup.service".into()),
                systemd_unit: Some("backup.service".into()),
                container_id: None,
            }),
            unreported: 17,
        }),
        Kind::Policy(PolicyChange {
            change: Change::Mode,
            by: Some(By {
                pid: 4711,
                uid: 0,
                login: Some("ec2-user".into()),
            }),
            mode: Mode::Audit,
            until: Some("2026-01-02T05:04:05Z".into()),
            rules: 3,
            error: None,
            needs_restart: Vec::new(),
        }),
        Kind::Policy(PolicyChange {
            change: Change::Rejected,
            by: None,
            mode: Mode::Enforce,
            until: None,
            rules: 3,
            error: Some("/etc/imds-guard/config.toml:1:1: unknown key `mod`".into()),
            needs_restart: vec!["listen".into()],
        }),
        Kind::RuleExpired(RuleExpired {
            rule: "legacy".into(),
            owner: Some("storage team".into()),
            expires: "2026-01-01".into(),
        }),
        Kind::Stopped(Stopped {
            counts: Counts {
                redirected: 12,
                exempt: 3,
                ..Counts::default()
            },
            events_lost: 0,
            pid: 412,
            unwatched: vec![Unwatched::OtherCgroups, Unwatched::Perimeter],
        }),
    ];
    let lines: Vec<String> = kinds
        .into_iter()
        .map(|kind| {
            let event = event(kind);
            let line = serde_json::to_string(&event).unwrap();
            assert!(!line.contains(|c: char| c.is_ascii_control()), "{line:?}");
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
            line
        })
        .collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn the_published_schema_is_that_of_the_types() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/events.schema.json");
    let schema = serde_json::to_string_pretty(&Event::json_schema()).unwrap() + "\n";
    if env::var_os("UPDATE_SCHEMA").is_some() {
        fs::write(&path, &schema).unwrap();
    }
    let published = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        published == schema,
        "docs/events.schema.json is old: run this test with UPDATE_SCHEMA=1"
    );
}
