//! Builds the kernel programs, and puts the object where `include_bytes!` finds it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use xtask::bpf::{self, Toolchain};

/// A ready-made object, for who builds packages without a BPF toolchain.
const OBJECT_VARIABLE: &str = "IMDS_GUARD_EBPF_OBJECT";

enum Source {
    Object(PathBuf),
    Code(Toolchain),
}

/// Cargo repeats all output of a script that exits with failure. That buries the one sentence that
/// says what is missing, but it is the only way for a compiler's message to be seen.
fn main() -> ExitCode {
    let source = match source() {
        Ok(source) => source,
        Err(error) => {
            println!("cargo::error={error:#}");
            return ExitCode::SUCCESS;
        }
    };
    match provide(&source) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn source() -> Result<Source> {
    println!("cargo::rerun-if-env-changed={OBJECT_VARIABLE}");
    if let Some(object) = env::var_os(OBJECT_VARIABLE) {
        let object = PathBuf::from(object);
        ensure!(
            object.is_file(),
            "{OBJECT_VARIABLE} names {}, which is not a file: correct it, or unset it to have the \
             kernel programs compiled",
            object.display()
        );
        rerun_if_changed(&object);
        return Ok(Source::Object(object));
    }
    println!("cargo::rerun-if-env-changed={}", bpf::LINKER_VARIABLE);
    for path in [
        "Cargo.lock",
        "Cargo.toml",
        "imds-guard-common/Cargo.toml",
        "imds-guard-common/src",
        "imds-guard-ebpf/Cargo.toml",
        "imds-guard-ebpf/src",
    ] {
        rerun_if_changed(&xtask::workspace().join(path));
    }
    Toolchain::find().map(Source::Code)
}

fn provide(source: &Source) -> Result<()> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let object = match source {
        Source::Object(object) => object,
        Source::Code(toolchain) => {
            let arch = env::var("CARGO_CFG_TARGET_ARCH").context("the target is not set")?;
            &toolchain.build(&arch, &out_dir.join("target"))?
        }
    };
    fs::copy(object, out_dir.join("imds-guard.bpf.o"))
        .with_context(|| format!("cannot copy the kernel programs from {}", object.display()))?;
    Ok(())
}

fn rerun_if_changed(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}
