//! `cargo xtask lint`: formatting, clippy, and what the dependencies may be.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use xtask::{
    bpf::{self, Compiler},
    process::{self, cargo},
    workspace,
};

use crate::setup;

const DENY_VERSION: &str = "0.20.2";

/// Runs every check; the first that fails ends it.
pub fn run() -> Result<()> {
    setup::run()?;
    check(["fmt", "--all", "--check"])?;
    for outside in ["fuzz/Cargo.toml", "tests/clients/rust/Cargo.toml"] {
        check(["fmt", "--check", "--manifest-path", outside])?;
    }
    check([
        "clippy",
        "--workspace",
        "--exclude",
        "imds-guard-ebpf",
        "--all-targets",
        "--locked",
        "--",
        "--deny",
        "warnings",
    ])?;
    // The fuzz targets are no part of the workspace, and are run after tests that take long.
    check([
        "clippy",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--target-dir",
        "target",
        "--locked",
        "--",
        "--deny",
        "warnings",
    ])?;
    lint_kernel_programs()?;
    check_dependencies()
}

fn check<const N: usize>(args: [&str; N]) -> Result<()> {
    process::run(Command::new(cargo()).args(args).current_dir(workspace()))
}

/// With the compiler that builds them: on the host's target they would be other programs.
fn lint_kernel_programs() -> Result<()> {
    let compiler = Compiler::find().context("setup left no compiler for BPF")?;
    setup::clippy(compiler)?;
    bpf::clippy(compiler, env::consts::ARCH, &workspace().join("target/bpf"))
}

fn check_dependencies() -> Result<()> {
    let deny = cargo_deny()?;
    let deny = || {
        let mut command = Command::new(&deny);
        command.current_dir(workspace());
        command
    };
    process::run(deny().args([
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))?;
    // The advisories come from a git repository, which a host without internet cannot reach.
    if process::output(deny().args(["fetch", "db"])).is_none() {
        eprintln!("warning: the advisory database cannot be fetched: advisories were not checked");
        return Ok(());
    }
    process::run(deny().args(["check", "--disable-fetch", "advisories"]))
}

/// cargo-deny: any that is here, else one that is compiled now.
fn cargo_deny() -> Result<PathBuf> {
    let ours = bpf::tools().join("bin/cargo-deny");
    if ours.is_file() {
        return Ok(ours);
    }
    if let Some(file) = process::find("cargo-deny") {
        return Ok(file);
    }
    setup::cargo_install("cargo-deny", DENY_VERSION, |_| ())?;
    Ok(ours)
}
