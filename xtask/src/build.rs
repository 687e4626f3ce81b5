//! `cargo xtask build`: the whole workspace, the kernel programs within.

use std::{ffi::OsString, process::Command};

use anyhow::Result;
use xtask::{
    process::{self, cargo},
    workspace,
};

use crate::setup;

/// Builds the default members.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::run()?;
    let mut build = Command::new(cargo());
    build.args(["build", "--locked"]).args(args);
    process::become_command(build.current_dir(workspace()))
}
