//! How many events a second the event log takes without losing one, and what they cost: run by
//! `cargo xtask bench`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use imds_guard::{
    policy::{Caller, Imds, Mode, Reason, Verdict},
    record::{
        AnsweredBy, Endpoint, Kind, Latency, Recorder, Request,
        output::{Format, Lines, LogFile, Outputs, Rotation, Sync},
    },
};
use nix::sys::resource::{UsageWho, getrusage};

const EVENTS: u64 = 1_000_000;
/// Events that may wait; the queue takes more.
const WAITING: usize = 4096;

fn main() -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("imds-guard-bench-{}", std::process::id()));
    for (name, format) in [("json", Format::Json), ("chained", Format::chained())] {
        std::fs::create_dir(&folder)?;
        let measured = measure(name, format, &folder.join("events.jsonl"));
        std::fs::remove_dir_all(&folder)?;
        measured?;
    }
    Ok(())
}

fn measure(name: &str, format: Format, path: &std::path::Path) -> anyhow::Result<()> {
    let rotation = Rotation {
        size: 64 << 20,
        age: Duration::from_secs(86_400),
        total: 1 << 30,
        sync: Sync::Second,
    };
    let file = LogFile::open(path, rotation)?;
    let outputs = Outputs::default().with("events", Lines::to_file(format, file));
    let (recorder, writer) = Recorder::start("bench", outputs)?;
    let caller = Arc::new(Caller {
        comm: "curl".into(),
        exe: Some("/usr/bin/curl".into()),
        command_line: Some(vec![
            "curl".into(),
            "-s".into(),
            "http://169.254.169.254/".into(),
        ]),
        systemd_unit: Some("backup.service".into()),
        cgroup: Some("/system.slice/backup.service".into()),
        user: Some("root".into()),
        resolved: true,
        ..Caller::default()
    });
    let (begun, used) = (Instant::now(), processor_time()?);
    for _ in 0..EVENTS {
        while recorder.waiting() > WAITING {
            std::thread::sleep(Duration::from_micros(200));
        }
        recorder.record(Kind::Request(Box::new(request(&caller))));
    }
    let lost = recorder.lost();
    drop(recorder);
    writer.finish();
    let (took, used) = (begun.elapsed(), processor_time()? - used);
    println!(
        "event log, {name:<8} {:>8.0} events/s, {lost} lost, {:.1} µs of processor time each (compression included)",
        EVENTS as f64 / took.as_secs_f64(),
        used.as_secs_f64() * 1e6 / EVENTS as f64,
    );
    Ok(())
}

fn request(caller: &Arc<Caller>) -> Request {
    Request {
        verdict: Verdict::Audit,
        reason: Reason::NoToken,
        malformed: None,
        rule: None,
        mode: Mode::Audit,
        imds: Some(Imds::V1),
        fallback: false,
        method: "GET".into(),
        path: "/latest/meta-data/instance-id".into(),
        user_agent: Some("curl/8.5.0".into()),
        status: 200,
        answered_by: AnsweredBy::Service,
        upstream_failure: None,
        endpoint: Endpoint::Ipv4,
        hops: 1,
        caller: Arc::clone(caller),
        latency_us: Latency {
            guard: 90,
            upstream: 600,
        },
        folded: None,
    }
}

/// Of all threads of this process.
fn processor_time() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time =
        |it: nix::sys::time::TimeVal| Duration::new(it.tv_sec() as u64, it.tv_usec() as u32 * 1000);
    Ok(time(usage.user_time()) + time(usage.system_time()))
}
