//! The metadata service's clients that the tests call: unchanged, with pinned versions, and without
//! anything on this machine being started or configured.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use xtask::{bpf, process, workspace};

use crate::apt;

/// What cloud-init imports.
const CLOUD_INIT_NEEDS: [&str; 9] = [
    "python3-configobj",
    "python3-jinja2",
    "python3-jsonpatch",
    "python3-jsonschema",
    "python3-netifaces",
    "python3-oauthlib",
    "python3-requests",
    "python3-serial",
    "python3-yaml",
];

/// AWS's SDK for Go, and what it imports.
const GO_PACKAGES: [&str; 2] = [
    "golang-github-aws-aws-sdk-go-dev",
    "golang-github-jmespath-go-jmespath-dev",
];

/// Installs those that are missing.
pub fn install() -> Result<()> {
    install_node_client()?;
    install_go_client()?;
    install_rust_client()?;
    install_cloud_init()
}

fn folder() -> PathBuf {
    bpf::tools().join("clients")
}

/// The SDK for JavaScript, as `package-lock.json` has it.
fn install_node_client() -> Result<()> {
    let (source, folder) = (
        workspace().join("tests/clients/node"),
        folder().join("node"),
    );
    let lock = "package-lock.json";
    let wanted = fs::read(source.join(lock)).with_context(|| format!("cannot read {lock}"))?;
    // npm's own copy of the lock, written last, says that everything is there.
    let stamp = folder.join("installed.json");
    if fs::read(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(());
    }
    fs::create_dir_all(&folder)?;
    for name in ["package.json", lock, "index.js"] {
        fs::copy(source.join(name), folder.join(name))?;
    }
    process::run(
        Command::new("npm")
            .args(["ci", "--no-audit", "--no-fund", "--ignore-scripts"])
            .current_dir(&folder),
    )?;
    Ok(fs::write(stamp, wanted)?)
}

/// The SDK for Go, compiled with a compiler that is gone again afterwards.
fn install_go_client() -> Result<()> {
    let client = folder().join("go-client");
    if client.exists() {
        return Ok(());
    }
    apt::update()?;
    let compiler = apt::depends("golang-go")
        .into_iter()
        .find(|name| name.ends_with("-go"))
        .context("this release of Debian has no golang-go")?;
    let sources = compiler.replace("-go", "-src");
    let unpacked = bpf::tools().join("go-unfinished");
    let mut packages = vec![compiler.as_str(), sources.as_str()];
    packages.extend(GO_PACKAGES);
    apt::unpack(&packages, &unpacked)?;
    let root = unpacked
        .join("usr/lib")
        .join(compiler.replace("golang-", "go-").trim_end_matches("-go"));
    fs::create_dir_all(folder())?;
    process::run(
        Command::new(root.join("bin/go"))
            .args(["build", "-o"])
            .arg(&client)
            .arg("main.go")
            .current_dir(workspace().join("tests/clients/go"))
            .env("GOROOT", &root)
            .env("GOPATH", unpacked.join("usr/share/gocode"))
            .env("GOCACHE", unpacked.join("cache"))
            .env("GO111MODULE", "off")
            .env("CGO_ENABLED", "0"),
    )?;
    fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))
}

/// The SDK for Rust, with a lock file of its own.
fn install_rust_client() -> Result<()> {
    let source = workspace().join("tests/clients/rust");
    process::run(
        Command::new(process::cargo())
            .args(["build", "--quiet", "--locked", "--manifest-path"])
            .arg(source.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(folder().join("rust")),
    )
}

/// cloud-init, only unpacked: installed, it would configure this machine when it starts next.
fn install_cloud_init() -> Result<()> {
    let folder = folder().join("cloud-init");
    let missing: Vec<_> = CLOUD_INIT_NEEDS
        .into_iter()
        .filter(|package| !apt::has(package))
        .collect();
    if !missing.is_empty() {
        apt::install(&missing)?;
    }
    apt::unpack_once(&["cloud-init"], &folder)
}
