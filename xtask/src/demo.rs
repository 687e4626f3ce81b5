//! `cargo xtask demo`: imds-guard's own demonstration, from a release build.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

use anyhow::Result;
use xtask::{
    process::{self, cargo},
    workspace,
};

use crate::{privilege::require_root, setup};

/// Builds imds-guard and becomes `imds-guard demo`.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::run()?;
    let mut build = Command::new(cargo());
    build.args(["build", "--release", "--locked", "--package", "imds-guard"]);
    process::run(build.current_dir(workspace()))?;

    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    let mut demo = Command::new(target.join("release/imds-guard"));
    demo.arg("demo").args(args);
    require_root(
        "imds-guard is built, and its demo needs root",
        &format!("sudo {}", process::line(&demo)),
    )?;
    process::become_command(&mut demo)
}
