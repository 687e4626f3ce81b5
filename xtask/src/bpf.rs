//! The BPF toolchain: which one the host has, and how it builds the kernel programs.
//!
//! rustup ships no `core` for BPF, so there are two ways to get one: a distribution that packages
//! it ready-made (Debian), or a nightly compiler that builds it from `rust-src`. Both link with
//! bpf-linker, whose LLVM must be at least as new as the compiler's.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    process::{self, cargo},
    workspace,
};

/// Names the bpf-linker to use instead of any that would be found.
pub const LINKER_VARIABLE: &str = "IMDS_GUARD_BPF_LINKER";

const PACKAGE: &str = "imds-guard-ebpf";
const TARGET: &str = "bpfel-unknown-none";
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";
const DISTRIBUTION_CLIPPY: &str = "/usr/bin/cargo-clippy";

/// What cargo tells its build scripts, and what would lead a cargo of another toolchain astray.
const OUTER_CARGO: [&str; 11] = [
    "CARGO",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC",
    "RUSTC_LINKER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// A Rust compiler that can target BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// The distribution's own rustc, beside a packaged `core` for BPF.
    Distribution,
    /// rustup's nightly, which builds `core` from `rust-src`.
    Nightly,
}

impl Compiler {
    /// The compiler this host has; the distribution's first, for it does not change by the day.
    pub fn find() -> Option<Self> {
        [Self::Distribution, Self::Nightly]
            .into_iter()
            .find(|compiler| compiler.has_core())
    }

    fn has_core(self) -> bool {
        let core = match self {
            Self::Distribution => format!("lib/rustlib/{TARGET}/lib"),
            Self::Nightly => "lib/rustlib/src/rust/library/core".into(),
        };
        process::output(self.rustc().args(["--print", "sysroot"]))
            .is_some_and(|sysroot| Path::new(&sysroot).join(core).is_dir())
    }

    /// The major version of the compiler's LLVM.
    pub fn llvm(self) -> Result<u32> {
        process::output(self.rustc().arg("-vV"))
            .as_deref()
            .and_then(|version| {
                version
                    .lines()
                    .find_map(|line| line.strip_prefix("LLVM version: "))
            })
            .and_then(|version| version.split('.').next()?.parse().ok())
            .with_context(|| format!("`{}` does not name its LLVM", process::line(&self.rustc())))
    }

    fn rustc(self) -> Command {
        match self {
            Self::Distribution => independent(DISTRIBUTION_RUSTC),
            Self::Nightly => nightly("rustc"),
        }
    }

    /// A cargo subcommand on the kernel programs, with this compiler.
    fn cargo(self, subcommand: &str, arch: &str, linker: Option<&Path>) -> Command {
        let mut command = match (self, subcommand) {
            (Self::Distribution, "clippy") => independent(DISTRIBUTION_CLIPPY),
            (Self::Distribution, _) => independent(cargo()),
            (Self::Nightly, _) => nightly("cargo"),
        };
        command.arg(subcommand);
        match self {
            Self::Distribution => command
                .env("CARGO", cargo())
                .env("RUSTC", DISTRIBUTION_RUSTC)
                // BPF is no stable target.
                .env("RUSTC_BOOTSTRAP", "1"),
            Self::Nightly => command.args(["-Z", "build-std=core"]),
        };
        command
            .args(["--release", "--locked", "--package", PACKAGE])
            .args(["--target", TARGET])
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags(arch, linker))
            .current_dir(workspace());
        command
    }
}

/// A compiler and a linker: all that a build needs.
#[derive(Clone, Debug)]
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

impl Toolchain {
    /// The toolchain this host has; the error says what to run where there is none.
    pub fn find() -> Result<Self> {
        let Some(compiler) = Compiler::find() else {
            bail!(
                "no Rust compiler for BPF is installed: run `cargo xtask setup`, or install one \
                 yourself (Debian: `apt-get install rustc-web libstd-rust-web-dev-bpf`; elsewhere: \
                 `rustup toolchain install nightly --component rust-src`)"
            );
        };
        let Some(linker) = linker()? else {
            bail!(
                "bpf-linker is not installed: run `cargo xtask setup`, or name one in \
                 {LINKER_VARIABLE}"
            );
        };
        Ok(Self { compiler, linker })
    }

    /// Builds the kernel programs for a host of this architecture, and returns the object file.
    ///
    /// The target folder must not be that of a cargo that waits for us: cargo locks it.
    pub fn build(&self, arch: &str, target_dir: &Path) -> Result<PathBuf> {
        let mut build = self.compiler.cargo("build", arch, Some(&self.linker));
        build.arg("--target-dir").arg(target_dir);
        process::run(&mut build).with_context(|| {
            format!(
                "the kernel programs were not built; the compiler's message is above (one about \
                 bitcode means that {} has an older LLVM than the compiler: `cargo xtask setup` \
                 installs one that fits)",
                self.linker.display()
            )
        })?;
        Ok(target_dir.join(TARGET).join("release").join(PACKAGE))
    }
}

/// Runs clippy on the kernel programs, every warning being an error.
pub fn clippy(compiler: Compiler, arch: &str, target_dir: &Path) -> Result<()> {
    let mut clippy = compiler.cargo("clippy", arch, None);
    clippy.arg("--target-dir").arg(target_dir);
    process::run(clippy.args(["--", "-D", "warnings"]))
        .context("clippy does not accept the kernel programs")
}

/// Whether this compiler's clippy is installed.
pub fn has_clippy(compiler: Compiler) -> bool {
    match compiler {
        Compiler::Distribution => Path::new(DISTRIBUTION_CLIPPY).is_file(),
        Compiler::Nightly => {
            process::output(nightly("cargo").args(["clippy", "--version"])).is_some()
        }
    }
}

/// The folder that `cargo xtask setup` installs tools to, as `cargo install --root` lays it out.
pub fn tools() -> PathBuf {
    workspace().join("target/tools")
}

/// The bpf-linker to use: the one asked for, else the one that setup installed, else any other.
fn linker() -> Result<Option<PathBuf>> {
    if let Some(file) = env::var_os(LINKER_VARIABLE) {
        let file = PathBuf::from(file);
        if !file.is_file() {
            bail!(
                "{LINKER_VARIABLE} names {}, which is not a file: correct it, or unset it",
                file.display()
            );
        }
        return Ok(Some(file));
    }
    let ours = Some(tools().join("bin/bpf-linker"));
    let users = env::home_dir().map(|home| home.join(".cargo/bin/bpf-linker"));
    Ok(ours
        .filter(|file| file.is_file())
        .or_else(|| process::find("bpf-linker"))
        .or_else(|| users.filter(|file| file.is_file())))
}

/// `linker` is only needed where something is linked.
fn rustflags(arch: &str, linker: Option<&Path>) -> OsString {
    let mut flags = OsString::from(format!("--cfg=bpf_target_arch=\"{arch}\"\x1f-Cdebuginfo=2"));
    if let Some(linker) = linker {
        flags.push("\x1f-Clinker=");
        flags.push(linker);
        flags.push("\x1f-Clink-arg=--btf");
    }
    flags
}

fn nightly(program: &str) -> Command {
    let mut command = independent("rustup");
    command.args(["run", "nightly", program]);
    command
}

/// A command that the cargo around us has no say in.
fn independent(program: impl Into<OsString>) -> Command {
    let mut command = Command::new(program.into());
    for key in OUTER_CARGO {
        command.env_remove(key);
    }
    command
}
