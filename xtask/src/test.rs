//! `cargo xtask test`: all tests, those in network namespaces and with AWS's own SDK included.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use xtask::{
    process::{self, cargo},
    workspace,
};

use crate::{privilege::require_root, setup, vm};

/// Tells the tests which Python has boto3.
const PYTHON_VARIABLE: &str = "IMDS_GUARD_TEST_PYTHON";

/// Runs `cargo test`, and then the kernel tests on other kernels, unless some tests were asked for.
pub fn run(args: &[OsString]) -> Result<()> {
    require_root(
        "the tests make network namespaces and cgroups, which needs root",
        "sudo -E env PATH=$PATH cargo xtask test",
    )?;
    setup::run_for_tests()?;
    let python = python()?;
    let mut test = Command::new(cargo());
    test.args(["test", "--workspace", "--exclude", "imds-guard-ebpf"])
        .arg("--locked")
        .args(args)
        .env(PYTHON_VARIABLE, python);
    test.current_dir(workspace());
    if !args.is_empty() {
        return process::become_command(&mut test);
    }
    process::run(&mut test)?;
    vm::run(&[])
}

/// The Python of a virtual environment that holds exactly `tests/requirements.txt`.
pub fn python() -> Result<PathBuf> {
    let requirements = workspace().join("tests/requirements.txt");
    let wanted = read(&requirements)?;
    let venv = workspace().join("target/venv");
    let python = venv.join("bin/python");
    // A copy of the requirements, written last, says that the environment is complete.
    let stamp = venv.join("requirements.txt");
    if python.exists() && fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    process::run(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv),
    )?;
    process::run(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(["--disable-pip-version-check", "--no-input", "--requirement"])
            .arg(&requirements),
    )?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(python)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}
