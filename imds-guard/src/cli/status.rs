//! `imds-guard status`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use imds_guard_common::control;
use serde::Serialize;

use crate::{
    failure::Failure,
    kernel::{AliveUntil, Control, Counters, PERIMETER_PIN, PINS, Pins},
    record::Counts,
};

/// For `--help`.
pub const ABOUT: &str = "\
Shows what is in force on this host: whether the guard is there, what its kernel programs do, and what \
they have counted.

Exit code 0 if a guard is there, 3 if its kernel programs are attached without one, 4 if nothing is.";

/// Arguments of `imds-guard status`.
#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for machines
    #[arg(long)]
    json: bool,

    /// Where the kernel programs and maps are pinned
    #[arg(long, value_name = "PATH", default_value = PINS)]
    pins: PathBuf,
}

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
}

/// Prints what is in force.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
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
    };
    if arguments.json {
        let json = serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)?;
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
    println!("mode        {}", report.mode);
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
}
