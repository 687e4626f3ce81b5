//! `cargo xtask bench`: what the guard costs, measured with nginx, haproxy and wrk.

use std::{ffi::OsString, process::Command};

use anyhow::Result;
use xtask::{
    process::{self, cargo},
    workspace,
};

use crate::{privilege::require_root, setup};

/// Builds the benchmark and becomes it.
pub fn run(args: &[OsString]) -> Result<()> {
    require_root(
        "the benchmark makes network namespaces, which needs root",
        "sudo -E env PATH=$PATH cargo xtask bench",
    )?;
    setup::run_for_bench()?;
    // The guard that is measured, too, which `cargo run` would leave as it is.
    process::run(
        Command::new(cargo())
            .args(["build", "--release", "--locked"])
            .args(["--package", "imds-guard-tests", "--bins"])
            .current_dir(workspace()),
    )?;
    for bench in ["bench-rules", "bench-events", "bench-report"] {
        process::run(
            Command::new(cargo())
                .args(["run", "--release", "--locked"])
                .args(["--package", "imds-guard-tests", "--bin", bench])
                .current_dir(workspace()),
        )?;
    }
    let mut bench = Command::new(cargo());
    bench
        .args(["run", "--release", "--locked"])
        .args(["--package", "imds-guard-tests", "--bin", "bench", "--"])
        .args(args);
    process::become_command(bench.current_dir(workspace()))
}
