//! What a decision costs, by how many rules there are: `cargo xtask bench` begins with it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fmt::Write as _,
    fs,
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use imds_guard::{
    config::Layers,
    policy::{Ask, Caller, Imds, Policy, Request, SessionToken, Subject, path::Path},
};
use jiff::Timestamp;

const RULES: [usize; 3] = [1, 100, 10_000];
const DECISIONS: u32 = 1_000_000;
const CONNECTIONS: u32 = 2_000;
const RELOADS: u32 = 5;

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as for the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as for the caller.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Rules as hosts have them: about programs, units, users, pods and patterns of these.
fn rules(count: usize) -> Result<String> {
    let mut text = "mode = \"enforce\"\n".to_owned();
    for number in 0..count {
        let selector = match number % 5 {
            0 => format!("exe = \"/opt/app-{number}/bin/server\""),
            1 => format!("systemd_unit = \"app-{number}.service\""),
            2 => format!("uid = {}", 100_000 + number),
            3 => format!("namespace = \"team-{number}\""),
            // One in a hundred cannot be looked up.
            _ if number % 100 == 4 => format!("cgroup = \"/app-{number}.slice/**\""),
            _ => format!("container_image = \"registry/app-{number}:1\""),
        };
        writeln!(
            text,
            "[[rule]]\nname = \"rule {number}\"\n{selector}\npath = [\"meta-data\", \"!meta-data/iam\"]\n\
             action = \"deny\""
        )?;
    }
    Ok(text)
}

fn main() -> Result<()> {
    let file = std::env::temp_dir().join(format!("imds-guard-{}-bench.toml", std::process::id()));
    let measured = RULES.iter().try_for_each(|count| {
        fs::write(&file, rules(*count)?)?;
        measure(*count, &file)
    });
    fs::remove_file(&file)?;
    measured
}

fn measure(count: usize, file: &std::path::Path) -> Result<()> {
    let begun = Instant::now();
    let mut policy = None;
    for _ in 0..RELOADS {
        policy = Some(Layers::of_file(Some(file)).read()?.settings()?.policy);
    }
    let reload = begun.elapsed() / RELOADS;
    let policy = policy.context("nothing was read")?;
    let (decision, allocations) = decide(&policy);
    let connection = connect(&policy);
    println!(
        "{count:>6} rules: {decision:>5} ns and {allocations} allocations a decision, {connection:>7} ns a \
         connection, {reload:?} to read them"
    );
    ensure!(allocations == 0, "a decision allocates");
    Ok(())
}

/// A caller whom the last of the rules is about, which does not speak of credentials.
fn caller() -> Caller {
    Caller {
        uid: 33,
        resolved: true,
        exe: Some("/usr/bin/curl".into()),
        exe_verified: true,
        cgroup: Some("/system.slice/web.service".into()),
        systemd_unit: Some("app-1.service".into()),
        user: Some("www-data".into()),
        ..Caller::default()
    }
}

fn decide(policy: &Policy) -> (u128, u64) {
    let caller = caller();
    let candidates = policy.rules.candidates(&subject(&caller));
    let now = Timestamp::now();
    let path = "/latest/meta-data/iam/security-credentials/role";
    let Ok(path) = Path::read(path) else {
        return (0, 0);
    };
    let request = Request {
        imds: Imds::V2,
        forwarded: false,
        flaw: None,
        path,
        token: None,
    };
    let before = ALLOCATIONS.load(Relaxed);
    let begun = Instant::now();
    for _ in 0..DECISIONS {
        let ask = Ask {
            imds: Imds::V2,
            method: "GET",
            path: &request.path,
        };
        let terms = policy.terms(black_box(&candidates), now);
        let token = SessionToken::Plain;
        black_box(policy.judge(&candidates, terms, (&request, &ask), 1, token, now));
    }
    let each = begun.elapsed().as_nanos() / u128::from(DECISIONS);
    (each, ALLOCATIONS.load(Relaxed) - before)
}

fn connect(policy: &Policy) -> u128 {
    let caller = caller();
    let begun = Instant::now();
    for _ in 0..CONNECTIONS {
        black_box(policy.rules.candidates(black_box(&subject(&caller))));
    }
    begun.elapsed().as_nanos() / u128::from(CONNECTIONS)
}

fn subject(caller: &Caller) -> Subject<'_> {
    Subject {
        caller,
        endpoint: "ipv4",
        hops: 1,
    }
}
