//! Requests as the Open Cybersecurity Schema Framework has them, version 1.3: class HTTP Activity
//! (4002), as Amazon Security Lake takes it.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::{
    policy::{Caller, Verdict},
    record::{Endpoint, Event, Kind, Request, escaped},
};

const VERSION: &str = "1.3.0";
const NETWORK_ACTIVITY: u32 = 4;
const HTTP_ACTIVITY: u32 = 4002;

/// Appends a request as one line; other events have no place in the class.
pub fn write(event: &Event, out: &mut Vec<u8>) {
    if let Kind::Request(request) = &event.kind {
        out.extend_from_slice(escaped(activity(event, request).to_string()).as_bytes());
        out.push(b'\n');
    }
}

/// A request as an HTTP Activity.
pub fn activity(event: &Event, request: &Request) -> Value {
    let time = event.time.parse::<Timestamp>().unwrap_or_default();
    let activity = activity_id(&request.method);
    let is_denied = request.verdict == Verdict::Deny;
    let is_marked = request.verdict == Verdict::Audit;
    let (address, version) = match request.endpoint {
        Endpoint::Ipv4 | Endpoint::Ipv4Mapped => ("169.254.169.254", 4),
        Endpoint::Ipv6 => ("fd00:ec2::254", 6),
    };
    let latency = &request.latency_us;
    json!({
        "class_uid": HTTP_ACTIVITY,
        "class_name": "HTTP Activity",
        "category_uid": NETWORK_ACTIVITY,
        "category_name": "Network Activity",
        "activity_id": activity,
        "type_uid": HTTP_ACTIVITY * 100 + activity,
        "time": time.as_millisecond(),
        "severity_id": if is_denied { 3 } else if is_marked { 2 } else { 1 },
        "action_id": if is_denied { 2 } else { 1 },
        // Blocked, logged, allowed.
        "disposition_id": if is_denied { 2 } else if is_marked { 17 } else { 1 },
        "status_id": if request.status < 400 { 1 } else { 2 },
        "status_detail": request.reason.to_string(),
        "count": request.calls(),
        "duration": (latency.guard + latency.upstream) / 1000,
        "metadata": {
            "version": VERSION,
            "product": {
                "name": "imds-guard",
                "vendor_name": "imds-guard",
                "version": env!("CARGO_PKG_VERSION"),
            },
            "profiles": ["host", "security_control"],
            "log_name": "events",
            "original_time": event.time,
        },
        "device": some([
            ("hostname", Some(json!(event.host.name))),
            ("instance_uid", event.host.instance.as_ref().map(|it| json!(it))),
            ("type_id", Some(json!(1))),
        ]),
        "actor": actor(&request.caller),
        "http_request": some([
            ("http_method", Some(json!(request.method))),
            ("user_agent", request.user_agent.as_ref().map(|it| json!(it))),
            ("url", Some(json!({"scheme": "http", "hostname": address, "path": request.path, "port": 80}))),
        ]),
        "http_response": {"code": request.status},
        "src_endpoint": some([
            ("hostname", Some(json!(event.host.name))),
            ("uid", request.caller.container_id.as_ref().map(|it| json!(it))),
        ]),
        "dst_endpoint": {"ip": address, "port": 80, "svc_name": "imds"},
        "connection_info": {
            "direction_id": 2,
            "protocol_num": 6,
            "protocol_name": "tcp",
            "protocol_ver_id": version,
        },
        "firewall_rule": some([("name", Some(json!(request.rule.as_deref().unwrap_or(request.mode.as_str()))))]),
        "unmapped": {
            "imds": request.imds,
            "verdict": request.verdict,
            "reason": request.reason,
            "hops": request.hops,
            "caller": *request.caller,
        },
    })
}

fn actor(caller: &Caller) -> Value {
    let exe = caller.exe.as_deref();
    let file = exe.map(|path| {
        let name = path.rsplit('/').next().unwrap_or(path);
        // Regular file.
        json!({"path": path, "name": name, "type_id": 1})
    });
    let parent = caller.parents.first().map(|parent| {
        some([
            ("pid", Some(json!(parent.pid))),
            ("name", parent.exe.as_ref().map(|it| json!(it))),
        ])
    });
    let user = some([
        ("uid", Some(json!(caller.uid.to_string()))),
        ("name", caller.user.as_ref().map(|it| json!(it))),
    ]);
    let process = some([
        ("pid", Some(json!(caller.pid))),
        ("name", Some(json!(caller.comm))),
        ("tid", Some(json!(caller.tid))),
        ("file", file),
        (
            "cmd_line",
            caller.command_line.as_ref().map(|it| json!(it.join(" "))),
        ),
        ("user", Some(user.clone())),
        ("parent_process", parent),
    ]);
    json!({"process": process, "user": user})
}

/// The fields that have a value.
fn some<const N: usize>(fields: [(&str, Option<Value>); N]) -> Value {
    let present = fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(present.collect::<Map<_, _>>())
}

/// What OCSF calls a method.
fn activity_id(method: &str) -> u32 {
    match method {
        "CONNECT" => 1,
        "DELETE" => 2,
        "GET" => 3,
        "HEAD" => 4,
        "OPTIONS" => 5,
        "POST" => 6,
        "PUT" => 7,
        "TRACE" => 8,
        _ => 99,
    }
}
