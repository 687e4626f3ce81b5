//! `cargo xtask setup`: installs what is missing, and is quick where nothing is.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use xtask::{
    bpf::{self, Compiler},
    process::{self, cargo},
};

use crate::{apt, clients, privilege::is_root};

/// A program, and the package that brings it.
type Need = (&'static str, &'static str);

/// What demo and tests call.
const NEEDS: [Need; 3] = [("curl", "curl"), ("ip", "iproute2"), ("python3", "python3")];

/// What only the tests call.
const TEST_NEEDS: [Need; 14] = [
    ("busybox", "busybox-static"),
    ("chromedriver", "chromium-driver"),
    ("chromium", "chromium"),
    ("cron", "cron"),
    ("javac", "default-jdk-headless"),
    ("iptables", "iptables"),
    ("node", "nodejs"),
    ("npm", "npm"),
    ("ssh", "openssh-client"),
    ("sudo", "sudo"),
    ("systemctl", "systemd"),
    ("tmux", "tmux"),
    ("wget", "wget"),
    ("wrk", "wrk"),
];

/// The packages of Docker; some releases have its command line in one of its own.
const DOCKER: [&str; 3] = ["docker.io", "containerd", "runc"];
const DOCKER_CLI: &str = "docker-cli";

/// What only fuzzing calls: libFuzzer is C++.
const FUZZ_NEEDS: [Need; 1] = [("c++", "g++")];

/// What tests and benchmark are put beside.
const PROXIES: [&str; 2] = ["nginx", "haproxy"];

/// Packages that together are a compiler for BPF: Debian's own, and its newer one in old releases.
const COMPILERS: [[&str; 2]; 2] = [
    ["rustc", "libstd-rust-dev-bpf"],
    ["rustc-web", "libstd-rust-web-dev-bpf"],
];

/// The bpf-linker that is compiled here, and the newest LLVM it can be compiled with.
const LINKER_VERSION: &str = "0.13.0";
const LINKER_NEWEST_LLVM: u32 = 23;

/// The bpf-linker that is fetched ready-made: a static program with an LLVM of its own, pinned by
/// the checksum for each architecture.
const PREBUILT_VERSION: &str = "0.11.1";
const PREBUILT_LLVM: u32 = 23;
const PREBUILT_SHA256: [(&str, &str); 2] = [
    (
        "x86_64",
        "e058a6aecc9e65fa4c977b298a8e4b738424d7629769fd352eed409fb57e16e8",
    ),
    (
        "aarch64",
        "341ec1c595496877cae2b073544c2226d78a922739632b5732dbaa48507f1380",
    ),
];

/// Installs what building, demo and tests need.
pub fn run() -> Result<()> {
    let packages = missing(&NEEDS);
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    let compiler = match Compiler::find() {
        Some(compiler) => compiler,
        None => install_compiler()?,
    };
    install_linker(compiler)
}

/// Installs what the tests need on top.
pub fn run_for_tests() -> Result<()> {
    run()?;
    let packages = missing(&TEST_NEEDS);
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    install_docker()?;
    install_proxies()?;
    // Servers that are not to start, or change anything, on this host.
    apt::unpack_once(&["prometheus"], &bpf::tools().join("prometheus"))?;
    apt::unpack_once(&["openssh-server"], &bpf::tools().join("openssh"))?;
    clients::install()
}

/// Puts Docker into the tools folder, unless the host has one. Installed as a package it would start,
/// and change the host's firewall.
fn install_docker() -> Result<()> {
    let folder = bpf::tools().join("docker");
    if process::find("dockerd").is_some() || folder.exists() {
        return Ok(());
    }
    if !apt::is_here() {
        bail!("this host has neither dockerd nor apt-get: install Docker with its package manager");
    }
    apt::update()?;
    let mut packages = DOCKER.to_vec();
    if apt::offers(&[DOCKER_CLI]) {
        packages.push(DOCKER_CLI);
    }
    apt::unpack_once(&packages, &folder)
}

/// Installs what fuzzing needs on top.
pub fn run_for_fuzz() -> Result<()> {
    run()?;
    let packages = missing(&FUZZ_NEEDS);
    if packages.is_empty() {
        return Ok(());
    }
    apt::install(&packages)
}

/// Installs what the benchmark needs on top.
pub fn run_for_bench() -> Result<()> {
    run()?;
    install_proxies()?;
    let packages = missing(&TEST_NEEDS);
    if packages.is_empty() {
        return Ok(());
    }
    apt::install(&packages)
}

/// Puts proxies into the tools folder. Installed as packages they would start.
fn install_proxies() -> Result<()> {
    for name in PROXIES {
        apt::unpack_once(&[name], &bpf::tools().join(name))?;
    }
    Ok(())
}

/// Installs the clippy that belongs to the BPF compiler.
pub fn clippy(compiler: Compiler) -> Result<()> {
    if bpf::has_clippy(compiler) {
        return Ok(());
    }
    match compiler {
        Compiler::Distribution if apt::has("rustc-web") => apt::install(&["rust-web-clippy"]),
        Compiler::Distribution => apt::install(&["rust-clippy"]),
        Compiler::Nightly => process::run(Command::new("rustup").args([
            "component",
            "add",
            "clippy",
            "--toolchain",
            "nightly",
        ])),
    }
}

/// The packages of the programs that are not here.
fn missing(needs: &[Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needs
        .iter()
        .filter(|(program, _)| process::find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    // Debian takes pip, and with it virtual environments, out of Python's package.
    let needs_python = needs.iter().any(|(program, _)| *program == "python3");
    if needs_python
        && process::output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_none()
    {
        packages.push("python3-venv");
    }
    packages
}

/// From apt where it has one and we may install it, else from rustup.
fn install_compiler() -> Result<Compiler> {
    if apt::is_here() && is_root() {
        apt::update()?;
    }
    let packages = COMPILERS.iter().find(|packages| apt::offers(*packages));
    match packages {
        Some(packages) if is_root() => apt::install(packages)?,
        _ => {
            let how = packages.map_or_else(
                || "use a Debian release that offers libstd-rust-dev-bpf".to_owned(),
                |packages| format!("run `sudo apt-get install {}`", packages.join(" ")),
            );
            process::run(Command::new("rustup").args([
                "toolchain",
                "install",
                "nightly",
                "--profile",
                "minimal",
                "--component",
                "rust-src",
            ]))
            .with_context(|| {
                format!("rustup gave no nightly compiler for BPF: make it work, or {how}")
            })?;
        }
    }
    Compiler::find().context(
        "the compiler that was just installed has no `core` for BPF: remove its packages or the \
         nightly toolchain, and run `cargo xtask setup` again",
    )
}

/// Puts a bpf-linker that fits the compiler into the tools folder, unless one was named.
///
/// One in PATH is not trusted here: nothing tells how old its LLVM is.
fn install_linker(compiler: Compiler) -> Result<()> {
    let llvm = compiler.llvm()?;
    if env::var_os(bpf::LINKER_VARIABLE).is_some() || installed_llvm() >= Some(llvm) {
        return Ok(());
    }
    if compiler == Compiler::Distribution {
        let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
        let missing: Vec<_> = packages
            .iter()
            .map(String::as_str)
            .filter(|package| !apt::has(package))
            .collect();
        if !missing.is_empty() {
            apt::install(&missing)?;
        }
    }
    let llvm = match (llvm..=LINKER_NEWEST_LLVM).find(|llvm| has_llvm(*llvm)) {
        Some(llvm) => {
            compile_linker(llvm)?;
            llvm
        }
        None if llvm <= PREBUILT_LLVM => {
            fetch_linker().with_context(|| {
                format!(
                    "bpf-linker cannot be had: install llvm-{llvm}-dev \
                     and run `cargo xtask setup` again, or name a bpf-linker in {}",
                    bpf::LINKER_VARIABLE
                )
            })?;
            PREBUILT_LLVM
        }
        None => bail!(
            "the BPF compiler has LLVM {llvm}, and no bpf-linker known here has one so new: name \
             one in {}",
            bpf::LINKER_VARIABLE
        ),
    };
    fs::write(llvm_stamp(), llvm.to_string())
        .with_context(|| format!("cannot write {}", llvm_stamp().display()))
}

/// The LLVM of the bpf-linker in the tools folder.
fn installed_llvm() -> Option<u32> {
    if !bpf::tools().join("bin/bpf-linker").is_file() {
        return None;
    }
    fs::read_to_string(llvm_stamp()).ok()?.parse().ok()
}

/// Says which LLVM the bpf-linker beside it has, for the program does not.
fn llvm_stamp() -> PathBuf {
    bpf::tools().join("bpf-linker.llvm")
}

fn llvm_prefix(llvm: u32) -> PathBuf {
    format!("/usr/lib/llvm-{llvm}").into()
}

/// Whether this LLVM is here with all that linking to it takes.
fn has_llvm(llvm: u32) -> bool {
    let prefix = llvm_prefix(llvm);
    prefix.join("bin/llvm-config").exists() && prefix.join("lib/libLLVM.so").exists()
}

fn compile_linker(llvm: u32) -> Result<()> {
    let prefix = llvm_prefix(llvm);
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(
        [prefix.join("bin")]
            .into_iter()
            .chain(env::split_paths(&path)),
    )?;
    cargo_install("bpf-linker", LINKER_VERSION, |install| {
        install
            .args(["--no-default-features", "--features"])
            .arg(format!("llvm-{llvm}"))
            .env("LLVM_PREFIX", &prefix)
            .env("PATH", path)
            .env("RUSTFLAGS", format!("-L {}/lib", prefix.display()));
    })
}

fn fetch_linker() -> Result<()> {
    let arch = env::consts::ARCH;
    let Some((_, sha256)) = PREBUILT_SHA256.iter().find(|(known, _)| *known == arch) else {
        bail!("there is no ready-made bpf-linker for {arch}");
    };
    let packages = missing(&[("zstd", "zstd")]);
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    let bin = bpf::tools().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    let archive = bpf::tools().join("bpf-linker.tar.zst");
    process::run(
        Command::new("curl")
            .args(["--fail", "--silent", "--show-error", "--location"])
            .args(["--proto", "=https", "--output"])
            .arg(&archive)
            .arg(format!(
                "https://github.com/aya-rs/bpf-linker/releases/download/v{PREBUILT_VERSION}/\
                 bpf-linker-{arch}-unknown-linux-musl.tar.zst"
            )),
    )?;
    let actual = process::output(Command::new("sha256sum").arg(&archive)).unwrap_or_default();
    if !actual.starts_with(sha256) {
        bail!(
            "{} is not the release that was expected: its SHA-256 must be {sha256}",
            archive.display()
        );
    }
    process::run(
        Command::new("tar")
            .args(["--zstd", "--extract", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(&bin)
            .arg("bpf-linker"),
    )
}

/// Compiles a published program into the tools folder.
pub fn cargo_install(name: &str, version: &str, options: impl FnOnce(&mut Command)) -> Result<()> {
    let mut install = Command::new(cargo());
    install
        .args(["install", "--locked", "--force", name, "--version", version])
        .arg("--root")
        .arg(bpf::tools());
    options(&mut install);
    process::run(&mut install)
}
