//! `cargo xtask fuzz`: what clients control, fuzzed for a bounded time.

use std::{env, ffi::OsString, fs, path::Path, process::Command};

use anyhow::{Context, Result};
use xtask::{
    bpf,
    process::{self, cargo},
    workspace,
};

use crate::setup;

const CARGO_FUZZ: &str = "0.13.2";
/// Seconds for each target.
const SECONDS: u32 = 20;
/// A fuzzer that needs more has found something.
const MAX_MIB: u32 = 2048;

/// Runs the targets that are named, or all, for the seconds that are named.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::run_for_fuzz()?;
    let cargo_fuzz = bpf::tools().join("bin/cargo-fuzz");
    if !cargo_fuzz.exists() {
        setup::cargo_install("cargo-fuzz", CARGO_FUZZ, |_| {})?;
    }
    let mut seconds = SECONDS;
    let mut targets = Vec::new();
    for arg in args.iter().filter_map(|arg| arg.to_str()) {
        match arg.parse() {
            Ok(given) => seconds = given,
            Err(_) => targets.push(arg.to_owned()),
        }
    }
    if targets.is_empty() {
        targets = all()?;
    }
    for target in &targets {
        fuzz(&cargo_fuzz, target, seconds)?;
    }
    println!("fuzz: {} passed, 0 failed", targets.len());
    Ok(())
}

fn all() -> Result<Vec<String>> {
    let folder = workspace().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for file in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let file = file?.path();
        names.extend(file.file_stem().map(|name| name.display().to_string()));
    }
    names.sort();
    Ok(names)
}

fn fuzz(cargo_fuzz: &Path, target: &str, seconds: u32) -> Result<()> {
    let kept = workspace().join("fuzz/corpus").join(target);
    // What is found goes into the first folder, and not into the kept corpus.
    let found = workspace().join("target/fuzz/found").join(target);
    fs::create_dir_all(&found)?;
    let mut fuzz = Command::new(cargo_fuzz);
    fuzz.args(["run", "--sanitizer", "none", "--target-dir"])
        .arg(workspace().join("target/fuzz"))
        .arg("--fuzz-dir")
        .arg(workspace().join("fuzz"))
        .arg(target)
        .args([&found, &kept])
        .arg("--")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-rss_limit_mb={MAX_MIB}"))
        .args(["-timeout=10", "-max_len=20000", "-print_final_stats=1"])
        .current_dir(workspace())
        .env("CARGO", cargo())
        // Instrumentation is not stable yet, but complete.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("PATH", path()?);
    process::run(&mut fuzz)
        .with_context(|| format!("{target} found something, see fuzz/artifacts/{target}"))?;
    println!("fuzz: {target} ok, {seconds} s");
    Ok(())
}

/// With the cargo that runs this in front.
fn path() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo = cargo();
    let bin = Path::new(&cargo).parent().map(Path::to_path_buf);
    Ok(env::join_paths(
        bin.into_iter().chain(env::split_paths(&path)),
    )?)
}
