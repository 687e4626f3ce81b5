//! Writes event logs of many hosts, as guards would have written them over weeks: for the tests of report and
//! readiness, and to measure how fast they are read.
//!
//! ```text
//! make_logs DIRECTORY [--hosts 200] [--days 14] [--requests 200000] [--clean] [--end TIME] [--seed 1]
//! ```
//!
//! Each host gets a folder with a log, of which the older half is put away and compressed. The same arguments
//! give the same logs. Nine programs call; those that use IMDSv1 are fixed one after the other, the last ones
//! never. `--clean` leaves IMDSv1 out.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use imds_guard::{
    policy::{
        Caller, Imds, Mode, Reason, Verdict,
        caller::{Container, Netns, Parent, Pod, Runtime, Via},
    },
    record::{
        AnsweredBy, Counts, Endpoint, Event, Kind, Latency, Request, SCHEMA_VERSION, Started,
        Stopped,
    },
};
use jiff::{SignedDuration, Timestamp};

struct Plan {
    folder: PathBuf,
    hosts: u64,
    days: i64,
    requests: u64,
    clean: bool,
    end: Timestamp,
    seed: u64,
}

/// A program that calls: who it is, what it says it is, what it asks for, and for how much of the time it
/// still uses IMDSv1.
struct Program {
    caller: Caller,
    agent: &'static str,
    paths: &'static [&'static str],
    v1_until: f64,
    /// One host in so many has it.
    every: u64,
    weight: u64,
}

fn main() -> anyhow::Result<()> {
    let plan = Plan::parse(std::env::args().skip(1))?;
    let programs = programs();
    for host in 0..plan.hosts {
        write_host(&plan, &programs, host)?;
    }
    Ok(())
}

impl Plan {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let folder = arguments.next().context("name a folder")?;
        let mut plan = Self {
            folder: folder.into(),
            hosts: 200,
            days: 14,
            requests: 200_000,
            clean: false,
            end: Timestamp::now(),
            seed: 1,
        };
        while let Some(option) = arguments.next() {
            if option == "--clean" {
                plan.clean = true;
                continue;
            }
            let value = arguments.next().context("an option without a value")?;
            match option.as_str() {
                "--hosts" => plan.hosts = value.parse()?,
                "--days" => plan.days = value.parse()?,
                "--requests" => plan.requests = value.parse()?,
                "--end" => plan.end = value.parse()?,
                "--seed" => plan.seed = value.parse()?,
                _ => bail!("{option} is no option"),
            }
        }
        Ok(plan)
    }
}

fn write_host(plan: &Plan, programs: &[Program], number: u64) -> anyhow::Result<()> {
    let host = format!("ip-10-0-{}-{}", number / 250, number % 250);
    let folder = plan.folder.join(&host);
    fs::create_dir_all(&folder)?;
    let log = folder.join("events.jsonl");
    let mut random = Random(plan.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number) | 1);
    let seconds = plan.days * 86_400;
    let begin = plan.end.checked_sub(SignedDuration::from_secs(seconds))?;
    let mine: Vec<_> = programs
        .iter()
        .filter(|program| {
            number.is_multiple_of(program.every) && !(plan.clean && program.v1_until > 0.0)
        })
        .collect();
    let weights: u64 = mine.iter().map(|program| program.weight).sum();
    let requests = plan.requests / plan.hosts;
    // Signs of life every ten minutes, requests in between, in the order of time.
    let turns = seconds / 600;
    let mut out = BufWriter::new(File::create(&log)?);
    write(&mut out, &host, begin, Kind::Started(started()))?;
    let mut made = 0;
    for turn in 0..turns {
        let until = requests * (turn as u64 + 1) / turns as u64;
        let count = until - made;
        for place in 0..count {
            let at = turn * 600 + (600 * place / count.max(1)) as i64;
            let time = begin.checked_add(SignedDuration::from_secs(at))?;
            let mut pick = random.below(weights.max(1));
            let program = mine.iter().find(|program| {
                let is_it = pick < program.weight;
                pick = pick.saturating_sub(program.weight);
                is_it
            });
            let Some(program) = program else { continue };
            let is_v1 = (at as f64 / seconds as f64) < program.v1_until;
            let request = program.request(&mut random, is_v1);
            write(&mut out, &host, time, Kind::Request(Box::new(request)))?;
        }
        made = until;
        let time = begin.checked_add(SignedDuration::from_secs((turn + 1) * 600 - 1))?;
        let seen = Stopped {
            counts: Counts {
                redirected: made,
                ..Counts::default()
            },
            events_lost: 0,
            pid: 412,
            unwatched: Vec::new(),
        };
        write(&mut out, &host, time, Kind::Alive(seen))?;
        if turn == turns / 2 {
            out.flush()?;
            put_away(&log, time)?;
            out = BufWriter::new(File::create(&log)?);
        }
    }
    out.flush()?;
    Ok(())
}

fn write(out: &mut impl Write, host: &str, time: Timestamp, kind: Kind) -> anyhow::Result<()> {
    let event = Event {
        schema: SCHEMA_VERSION,
        time: format!("{time:.6}"),
        host: host.into(),
        kind,
        chain: None,
    };
    serde_json::to_writer(&mut *out, &event)?;
    out.write_all(b"\n")?;
    Ok(())
}

/// As the guard does when it rotates.
fn put_away(log: &Path, time: Timestamp) -> anyhow::Result<()> {
    let name = time
        .strftime("events.jsonl.%Y%m%dT%H%M%S%.6fZ.zst")
        .to_string();
    let mut out = zstd::Encoder::new(File::create(log.with_file_name(name))?, 3)?;
    std::io::copy(&mut File::open(log)?, &mut out)?;
    out.finish()?;
    fs::remove_file(log)?;
    Ok(())
}

fn started() -> Started {
    Started {
        version: "0.1.0".into(),
        mode: Mode::Audit,
        cgroup: "/sys/fs/cgroup".into(),
        listeners: vec!["169.254.171.254:254".into()],
        on_failure: "open".into(),
        backstop: true,
        uplinks: vec!["ens5".into()],
        adopted: false,
        counts: Counts::default(),
        took_over_from: None,
    }
}

impl Program {
    fn request(&self, random: &mut Random, is_v1: bool) -> Request {
        let is_token = !is_v1 && random.below(5) == 0;
        let path = self.paths[random.below(self.paths.len() as u64) as usize];
        let pid = 1000 + random.below(30_000) as u32;
        Request {
            verdict: if is_v1 {
                Verdict::Audit
            } else {
                Verdict::Allow
            },
            reason: match (is_v1, is_token) {
                (true, _) => Reason::NoToken,
                (false, true) => Reason::TokenRequest,
                (false, false) => Reason::SessionToken,
            },
            malformed: None,
            rule: None,
            mode: Mode::Audit,
            imds: Some(match (is_v1, is_token) {
                (true, _) => Imds::V1,
                (false, true) => Imds::Token,
                (false, false) => Imds::V2,
            }),
            fallback: false,
            method: if is_token { "PUT" } else { "GET" }.into(),
            path: if is_token { "/latest/api/token" } else { path }.into(),
            user_agent: Some(self.agent.into()),
            status: 200,
            answered_by: AnsweredBy::Service,
            upstream_failure: None,
            endpoint: Endpoint::Ipv4,
            hops: 1,
            caller: Arc::new(Caller {
                pid,
                tid: pid,
                ..self.caller.clone()
            }),
            latency_us: Latency {
                guard: 80 + random.below(200),
                upstream: 400 + random.below(2000),
            },
            folded: None,
        }
    }
}

fn programs() -> Vec<Program> {
    let on_host = |exe: &str, unit: &str| Caller {
        comm: exe
            .rsplit('/')
            .next()
            .unwrap_or(exe)
            .chars()
            .take(15)
            .collect(),
        exe: Some(exe.into()),
        exe_verified: true,
        resolved: true,
        netns: Netns::Host,
        user: Some("root".into()),
        systemd_unit: Some(unit.into()),
        cgroup: Some(format!("/system.slice/{unit}")),
        command_line: Some(vec![exe.into()]),
        started: Some("2026-01-02T03:04:05.50Z".into()),
        parents: vec![Parent {
            pid: 1,
            exe: Some("/usr/lib/systemd/systemd".into()),
            exe_verified: false,
        }],
        ..Caller::default()
    };
    let in_pod = |exe: &str, namespace: &str, name: &str| Caller {
        comm: "app".into(),
        exe: Some(exe.into()),
        resolved: true,
        netns: Netns::Other,
        container_id: Some("3f4a0e6d1b2c3f4a0e6d1b2c".into()),
        container_runtime: Some(Runtime::Containerd),
        container: Some(Arc::new(Container {
            name: Some(name.into()),
            image: Some(format!("registry.example/{namespace}/{name}:1.4")),
        })),
        pod_uid: Some("1a2b3c4d-1111-2222-3333-444455556666".into()),
        pod: Some(Arc::new(Pod {
            name: format!("{name}-7d9f4c6b5-x2x4z"),
            namespace: namespace.into(),
            owner: Some(format!("Deployment/{name}")),
            service_account: Some("default".into()),
            labels: [("app".to_owned(), name.to_owned())].into(),
        })),
        ..Caller::default()
    };
    let scripted = |caller: Caller, script: &str, via: Vec<Via>| Caller {
        script: Some(script.into()),
        via,
        ..caller
    };
    const KEYS: &[&str] = &[
        "/latest/meta-data/iam/security-credentials/",
        "/latest/meta-data/iam/security-credentials/app",
    ];
    const FACTS: &[&str] = &[
        "/latest/meta-data/instance-id",
        "/latest/meta-data/placement/region",
        "/latest/dynamic/instance-identity/document",
    ];
    const ALL: &[&str] = &[
        "/latest/meta-data/iam/security-credentials/app",
        "/latest/user-data",
        "/latest/meta-data/instance-id",
    ];
    let python = "/usr/bin/python3.6";
    let program = |caller, agent, paths, v1_until, every, weight| Program {
        caller,
        agent,
        paths,
        v1_until,
        every,
        weight,
    };
    vec![
        program(
            on_host("/usr/bin/amazon-ssm-agent", "amazon-ssm-agent.service"),
            "aws-sdk-go/1.44.0",
            KEYS,
            0.0,
            1,
            30,
        ),
        program(
            on_host("/usr/bin/aws", "deploy.service"),
            "aws-cli/2.15.0 Python/3.11",
            KEYS,
            0.0,
            1,
            30,
        ),
        program(
            in_pod("/app/web", "shop", "web"),
            "aws-sdk-go-v2/1.30.0",
            KEYS,
            0.0,
            2,
            40,
        ),
        program(
            scripted(
                on_host("/usr/bin/bash", "backup.service"),
                "/opt/backup/run.sh",
                vec![Via::Timer],
            ),
            "curl/7.61.1",
            ALL,
            1.1,
            1,
            6,
        ),
        program(
            scripted(
                on_host(python, "sync.service"),
                "/opt/app/sync.py",
                Vec::new(),
            ),
            "Boto3/1.9.0 Python/3.6 Botocore/1.12.0",
            KEYS,
            0.7,
            2,
            8,
        ),
        program(
            scripted(
                in_pod("/usr/lib/jvm/bin/java", "billing", "invoices"),
                "com.example.invoices.Main",
                Vec::new(),
            ),
            "aws-sdk-java/1.11.600 Linux/5.4 OpenJDK",
            KEYS,
            0.5,
            4,
            10,
        ),
        program(
            in_pod("/usr/bin/node", "shop", "mailer"),
            "aws-sdk-nodejs/2.500.0 linux",
            KEYS,
            0.3,
            5,
            8,
        ),
        program(
            scripted(
                on_host(python, "cron.service"),
                "/etc/cron.hourly/inventory",
                vec![Via::Cron],
            ),
            "Python-urllib/3.6",
            FACTS,
            1.1,
            10,
            4,
        ),
        program(
            on_host("/opt/vendor/agent", "vendor-agent.service"),
            "vendor-agent/3",
            ALL,
            0.9,
            3,
            5,
        ),
    ]
}

/// A small generator of numbers (xorshift64), the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }
}
