//! What a decision costs, by how many rules there are: `cargo xtask bench` begins with it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use imds_guard::{
    config::Layers,
    policy::{
        Ask, Caller, Candidates, Imds, Policy, Request, SessionToken, Subject, caller::Missing,
        path::Path,
    },
};
use jiff::Timestamp;

const RULES: [usize; 3] = [1, 100, 10_000];
const DECISIONS: u32 = 1_000_000;
const CONNECTIONS: u32 = 500;
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

/// Rules, and who meets them.
struct Case {
    what: &'static str,
    rules: fn(usize) -> String,
    caller: Caller,
}

fn cases() -> [Case; 3] {
    let missing = Missing {
        container: true,
        ..Missing::default()
    };
    [
        Case {
            what: "about others but the last",
            rules: about_callers,
            caller: caller(),
        },
        Case {
            what: "that may be about the caller, whose container is not known",
            rules: about_callers,
            caller: Caller {
                container_id: Some("c0ffee".into()),
                missing,
                ..caller()
            },
        },
        Case {
            what: "about paths alone",
            rules: about_paths,
            caller: caller(),
        },
    ]
}

/// Rules as hosts have them: about programs, units, users, pods and patterns of these. The last one is
/// about [`caller`].
fn about_callers(count: usize) -> String {
    let mut text = String::new();
    for number in 0..count {
        let selector = match number % 5 {
            _ if number + 1 == count => "systemd_unit = \"web.service\"".to_owned(),
            0 => format!("exe = \"/opt/app-{number}/bin/server\""),
            1 => format!("systemd_unit = \"app-{number}.service\""),
            2 => format!("uid = {}", 100_000 + number),
            3 => format!("namespace = \"team-{number}\""),
            // One in a hundred cannot be looked up.
            _ if number % 100 == 4 => format!("cgroup = \"/app-{number}.slice/**\""),
            _ => format!("container_image = \"registry/app-{number}:1\""),
        };
        text += &rule(number, &selector, "[\"meta-data\", \"!meta-data/iam\"]");
    }
    text
}

/// Rules that every caller can meet, none of them with this request.
fn about_paths(count: usize) -> String {
    let path = |number| format!("\"meta-data/tags/instance/{number}\"");
    (0..count)
        .map(|number| rule(number, "", &path(number)))
        .collect()
}

fn rule(number: usize, selector: &str, path: &str) -> String {
    format!("[[rule]]\nname = \"rule {number}\"\n{selector}\npath = {path}\naction = \"deny\"\n")
}

/// A caller whom rules can be about in many ways.
fn caller() -> Caller {
    Caller {
        uid: 33,
        resolved: true,
        exe: Some("/usr/bin/curl".into()),
        exe_verified: true,
        cgroup: Some("/system.slice/web.service".into()),
        systemd_unit: Some("web.service".into()),
        user: Some("www-data".into()),
        ..Caller::default()
    }
}

fn main() -> Result<()> {
    for case in cases() {
        for count in RULES {
            measure(&case, count)?;
        }
    }
    Ok(())
}

fn measure(case: &Case, count: usize) -> Result<()> {
    let begun = Instant::now();
    let mut policy = read((case.rules)(count))?;
    for _ in 1..RELOADS {
        policy = read((case.rules)(count))?;
    }
    let reload = begun.elapsed() / RELOADS;
    let candidates = policy.rules.candidates(&subject(&case.caller));
    // As many as take about a second.
    let (few, _) = decide(&policy, &candidates, DECISIONS / 1000)?;
    let decisions = DECISIONS / u32::try_from(few / 1000 + 1)?;
    let (decision, allocations) = decide(&policy, &candidates, decisions)?;
    let connection = connect(&policy, &case.caller);
    println!(
        "{count:>6} rules {}: {decision} ns and {allocations} allocations a decision, {connection} ns a \
         connection, {reload:?} to read them",
        case.what
    );
    ensure!(allocations == 0, "a decision allocates");
    Ok(())
}

/// As the guard reads them, from a file.
fn read(rules: String) -> Result<Policy> {
    let file = std::env::temp_dir().join(format!("imds-guard-{}-bench.toml", std::process::id()));
    fs::write(&file, format!("mode = \"enforce\"\n{rules}"))?;
    let read = Layers::of_file(Some(&file)).read();
    fs::remove_file(&file)?;
    Ok(read?.settings()?.policy)
}

/// Nanoseconds a decision, and the allocations of all of them.
fn decide(policy: &Policy, candidates: &Candidates, decisions: u32) -> Result<(u128, u64)> {
    let now = Timestamp::now();
    let path = Path::read("/latest/meta-data/iam/security-credentials/role");
    let request = Request {
        imds: Imds::V2,
        forwarded: false,
        flaw: None,
        path: path.ok().context("that is no path")?,
        token: None,
    };
    let before = ALLOCATIONS.load(Relaxed);
    let begun = Instant::now();
    for _ in 0..decisions {
        let ask = Ask {
            imds: Imds::V2,
            method: "GET",
            path: &request.path,
        };
        let terms = policy.terms(black_box(candidates), now);
        let token = SessionToken::Plain;
        black_box(policy.judge(candidates, terms, (&request, &ask), 1, token, now));
    }
    let each = begun.elapsed().as_nanos() / u128::from(decisions);
    Ok((each, ALLOCATIONS.load(Relaxed) - before))
}

fn connect(policy: &Policy, caller: &Caller) -> u128 {
    let begun = Instant::now();
    for _ in 0..CONNECTIONS {
        black_box(policy.rules.candidates(black_box(&subject(caller))));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Alone in its binary, so that nobody else allocates meanwhile.
    #[test]
    fn a_decision_allocates_nothing() -> Result<()> {
        for case in cases() {
            let policy = read((case.rules)(200))?;
            let candidates = policy.rules.candidates(&subject(&case.caller));
            let (_, allocations) = decide(&policy, &candidates, 100)?;
            assert_eq!(allocations, 0, "{}", case.what);
        }
        Ok(())
    }
}
