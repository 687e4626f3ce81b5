//! `imds-guard status`.

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use clap::Args;
use imds_guard_common::control;
use serde::Serialize;

use crate::{
    config::RUN_DIR,
    control::{Client, Request, Status},
    failure::Failure,
    kernel::{AliveUntil, Control, Counters, PERIMETER_PIN, PINS, Pins},
    record::{Counts, to_json_pretty},
};

/// For `--help`.
pub const ABOUT: &str = "\
Shows what is in force on this host: whether the guard is there, its mode and rules, who has called in \
the last hour, what its kernel programs do, and what they have counted.

Exit code 0 if a guard is there, 3 if its kernel programs are attached without one, 4 if nothing is.";

/// Arguments of `imds-guard status`.
#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for machines
    #[arg(long)]
    json: bool,

    /// Show it again every two seconds, until interrupted
    #[arg(long, short)]
    watch: bool,

    /// Where the kernel programs and maps are pinned
    #[arg(long, value_name = "PATH", default_value = PINS, env = "IMDS_GUARD_PINS")]
    pins: PathBuf,

    /// Directory of the control socket
    #[arg(long, value_name = "PATH", default_value = RUN_DIR, env = "IMDS_GUARD_RUN_DIR")]
    run_dir: PathBuf,
}

/// How often it is shown.
const WATCH: Duration = Duration::from_secs(2);

#[derive(Serialize)]
struct Report {
    /// Process id of the guard, if it is there.
    pid: Option<u32>,
    /// `audit` or `enforce`.
    mode: &'static str,
    /// What happens without a guard: `open` or `closed`.
    on_failure: &'static str,
    /// The layers, and whether each is on.
    redirect: bool,
    backstop: bool,
    /// Numbers of the uplinks that the perimeter guards; before Linux 6.6 they are not known here.
    perimeter: Vec<u32>,
    counts: Counts,
    /// What the guard itself says, if it is there and can be asked.
    guard: Option<Status>,
}

/// Prints what is in force.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if !arguments.watch {
        return show(arguments);
    }
    loop {
        if io::stdout().is_terminal() {
            // To the top left, and nothing below it.
            print!("\x1b[H\x1b[J");
        }
        show(arguments)?;
        thread::sleep(WATCH);
    }
}

fn show(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let pins = Pins::open(&arguments.pins)?;
    let links = pins.links();
    let Ok(control) = Control::open(&pins) else {
        pins.remove_if_empty();
        println!("imds-guard is not active on this host");
        return Ok(ExitCode::from(4));
    };
    let control = control.get();
    let attended = AliveUntil::open(&pins)?.is_attended();
    let report = Report {
        pid: attended.then_some(control.owner),
        mode: if control.mode == control::Mode::Enforce as u32 {
            "enforce"
        } else {
            "audit"
        },
        on_failure: if control.on_failure == control::OnFailure::Closed as u32 {
            "closed"
        } else {
            "open"
        },
        redirect: links.iter().any(|name| name == "connect4"),
        backstop: control.backstop == 1 && links.iter().any(|name| name == "backstop"),
        perimeter: links
            .iter()
            .filter_map(|name| name.strip_prefix(PERIMETER_PIN)?.parse().ok())
            .collect(),
        counts: Counters::open(&pins)?.read(),
        guard: match Client::connect(&arguments.run_dir)? {
            Some(mut guard) => guard.ask(Request::Status)?,
            None => None,
        },
    };
    if arguments.json {
        let json = to_json_pretty(&report).map_err(anyhow::Error::from)?;
        println!("{json}");
    } else {
        print(&report);
    }
    Ok(ExitCode::from(if attended { 0 } else { 3 }))
}

fn print(report: &Report) {
    let on = |on: bool| if on { "on" } else { "off" };
    match report.pid {
        Some(pid) => println!("guard       running, pid {pid}"),
        None => println!(
            "guard       not there: connections are {}",
            if report.on_failure == "closed" {
                "refused (start it, or remove the kernel programs with `imds-guard detach`)"
            } else {
                "let past"
            }
        ),
    }
    match &report.guard {
        Some(guard) => println!("mode        {}{}", guard.mode, switched(guard)),
        None => println!("mode        {}", report.mode),
    }
    println!("on failure  {}", report.on_failure);
    println!("redirect    {}", on(report.redirect));
    println!("backstop    {}", on(report.backstop));
    match report.perimeter.len() {
        0 => {
            println!("perimeter   off (or, before Linux 6.6, see `tc filter show dev NAME egress`)")
        }
        count => println!("perimeter   on {count} uplinks"),
    }
    let counts = &report.counts;
    println!(
        "counted     {} connections redirected, {} refused, {} past; {} packets dropped, {} noted",
        counts.redirected,
        counts.refused + counts.unattended_refused,
        counts.bypassed + counts.unattended_bypassed,
        counts.packets_dropped,
        counts.packets_passed,
    );
    if let Some(guard) = &report.guard {
        print_guard(guard);
    }
}

/// What is to be said of a mode that is not the configured one.
fn switched(guard: &Status) -> String {
    let standing = &guard.standing;
    match &standing.mode_until {
        _ if guard.mode == standing.configured_mode && standing.mode_until.is_none() => {
            String::new()
        }
        Some(until) => format!(", until {until}; then {}", standing.configured_mode),
        None => format!(", though {} is configured", standing.configured_mode),
    }
}

fn print_guard(guard: &Status) {
    let totals = &guard.totals;
    let standing = &guard.standing;
    let (minutes, seconds) = (guard.uptime_seconds / 60, guard.uptime_seconds % 60);
    let (days, hours) = (minutes / 60 / 24, minutes / 60 % 24);
    println!(
        "up          {days} d {hours} h {} min {seconds} s",
        minutes % 60
    );
    println!(
        "requests    {} v1, {} v2, {} for tokens; {} refused, {} marked",
        totals.requests.v1,
        totals.requests.v2,
        totals.requests.token,
        totals.denied,
        totals.audited
    );
    println!(
        "dropped     {} packets by the backstop, {} by the perimeter",
        totals.backstop_dropped, totals.perimeter_dropped
    );
    let mut lost = format!("events      {} lost", guard.events_lost);
    for (output, events) in guard.lost_by_output.iter().filter(|(_, lost)| **lost > 0) {
        lost += &format!(", {output} lost {events}");
    }
    for (output, removed) in guard
        .removed_by_output
        .iter()
        .filter(|(_, it)| it.files > 0)
    {
        let (files, kib) = (removed.files, removed.bytes.div_ceil(1024));
        lost += &format!("; {files} old files of {output} removed to make room ({kib} KiB)");
    }
    println!("{lost}");
    match standing.files.is_empty() {
        true => println!("files       none: defaults, environment and command line hold"),
        false => println!("files       {}", standing.files.join(", ")),
    }
    if let Some(rejected) = &standing.rejected {
        println!("rejected    {rejected}");
    }
    if !standing.needs_restart.is_empty() {
        println!("restart     for {}", standing.needs_restart.join(", "));
    }
    for rule in &guard.rules {
        let action = rule.action.map_or("by mode".into(), |action| {
            format!("{action:?}").to_lowercase()
        });
        let expires = match (&rule.expires, rule.expired) {
            (Some(expires), true) => format!(", expired {expires}"),
            (Some(expires), false) => format!(", until {expires}"),
            (None, _) => String::new(),
        };
        println!(
            "rule        {:>8}  {} ({action}{expires})",
            rule.hits, rule.name
        );
    }
    for (caller, count) in &guard.callers {
        let caller = caller.escape_default();
        println!(
            "caller      {:>6} v1 {:>6} v2 {:>6} tokens  {caller}",
            count.v1, count.v2, count.token
        );
    }
}
