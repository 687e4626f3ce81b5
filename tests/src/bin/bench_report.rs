//! How fast logs of many hosts are read, and in how much memory: run by `cargo xtask bench`.
//!
//! ```text
//! bench-report [REQUESTS, 1000000 by default]
//! ```

use std::{env, fs, process::Command, thread, time::Instant};

use anyhow::{Context as _, ensure};
use imds_guard::forensics::{Logs, Progress, Summary, read, render::Report};
use nix::sys::resource::{UsageWho, getrusage};

fn main() -> anyhow::Result<()> {
    let requests = env::args().nth(1).unwrap_or_else(|| "1000000".into());
    let folder = env::temp_dir().join(format!("imds-guard-bench-{}", std::process::id()));
    fs::create_dir(&folder)?;
    let measured = (|| {
        let maker = env::current_exe()?.with_file_name("make-logs");
        let made = Command::new(maker)
            .arg(&folder)
            .args(["--requests", &requests])
            .status()?;
        ensure!(made.success(), "no logs were made");
        measure(&folder)
    })();
    fs::remove_dir_all(&folder)?;
    measured
}

fn measure(folder: &std::path::Path) -> anyhow::Result<()> {
    let threads = thread::available_parallelism()?.get();
    let begun = Instant::now();
    let logs = Logs::at(&[folder.to_owned()], None)?;
    let bytes = logs.bytes();
    let summary = read(&logs, threads, &Progress::default(), Summary::default)?;
    let report = Report::of(&summary);
    let took = begun.elapsed();
    ensure!(report.skipped == 0, "not all of it was read");
    let peak = getrusage(UsageWho::RUSAGE_SELF)
        .context("getrusage")?
        .max_rss();
    println!(
        "report: {} events of {} hosts, {} MiB on disk, in {:.1} s: {:.0} events/s with {threads} threads, \
         at most {} MiB of memory",
        report.events,
        report.hosts,
        bytes >> 20,
        took.as_secs_f64(),
        report.events as f64 / took.as_secs_f64(),
        peak >> 10,
    );
    Ok(())
}
