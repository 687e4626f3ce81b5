//! Debian's and Ubuntu's packages.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, bail};
use xtask::process;

use crate::privilege::is_root;

const INSTALL: [&str; 3] = ["install", "--yes", "--no-install-recommends"];

/// Whether this host has apt at all.
pub fn is_here() -> bool {
    process::find("apt-get").is_some()
}

/// Fetches the package lists, once: a fresh host has none, another one old ones.
pub fn update() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    process::run(apt_get().arg("update"))
}

/// Whether all these packages can be installed from the lists at hand.
pub fn offers(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        process::output(Command::new("apt-cache").args(["policy", package])).is_some_and(|policy| {
            policy
                .lines()
                .filter_map(|line| line.trim().strip_prefix("Candidate: "))
                .any(|candidate| candidate != "(none)")
        })
    })
}

/// Whether a package is installed.
pub fn has(package: &str) -> bool {
    let query = ["--show", "--showformat=${db:Status-Status}", package];
    process::output(Command::new("dpkg-query").args(query)).as_deref() == Some("installed")
}

/// Unpacks packages into a folder, where they neither start nor configure anything, and installs the
/// libraries that they need.
pub fn unpack(packages: &[&str], folder: &Path) -> Result<()> {
    update()?;
    let libraries = libraries(packages);
    let missing: Vec<_> = libraries
        .iter()
        .map(String::as_str)
        .filter(|library| !has(library))
        .collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    let downloads = folder.with_extension("deb");
    fs::create_dir_all(&downloads)
        .with_context(|| format!("cannot create {}", downloads.display()))?;
    process::run(
        apt_get()
            .args(["--option", "APT::Sandbox::User=root", "download"])
            .args(packages)
            .current_dir(&downloads),
    )?;
    for archive in fs::read_dir(&downloads)? {
        let archive = archive?.path();
        process::run(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&archive)
                .arg(folder),
        )?;
    }
    fs::remove_dir_all(&downloads).with_context(|| format!("cannot remove {}", downloads.display()))
}

/// Unpacks packages into a folder that has its name only when it is complete.
pub fn unpack_once(packages: &[&str], folder: &Path) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    if !is_here() {
        bail!(
            "this host has no apt-get to fetch what Debian calls {}",
            packages.join(", ")
        );
    }
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    let unfinished = folder.with_extension("unfinished");
    unpack(packages, &unfinished)?;
    fs::rename(&unfinished, folder)
        .with_context(|| format!("cannot rename {}", unfinished.display()))
}

/// The libraries that packages depend on.
fn libraries(packages: &[&str]) -> Vec<String> {
    let all = packages.iter().flat_map(|package| depends(package));
    all.filter(|name| name.starts_with("lib")).collect()
}

/// The packages that a package depends on.
pub fn depends(package: &str) -> Vec<String> {
    let mut query = Command::new("apt-cache");
    query.args(["depends", "--important", package]);
    let answer = process::output(&mut query).unwrap_or_default();
    answer
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .collect()
}

/// Installs packages, asking nothing and removing nothing; whoever is not root learns how.
pub fn install(packages: &[&str]) -> Result<()> {
    if !is_here() {
        bail!(
            "this host has no apt-get: install what Debian calls {} with its own package manager",
            packages.join(", ")
        );
    }
    if !is_root() {
        bail!(
            "packages are missing: run `sudo apt-get {} {}`",
            INSTALL.join(" "),
            packages.join(" ")
        );
    }
    update()?;
    process::run(apt_get().args(INSTALL).arg("--no-remove").args(packages))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Unattended upgrades may hold the lock just now.
        .args(["--quiet", "--option", "DPkg::Lock::Timeout=300"]);
    command
}
