//! Development tasks, run as `cargo xtask TASK`.

use std::{env, ffi::OsString, process::ExitCode};

use anyhow::{Result, bail};

mod apt;
mod bench;
mod build;
mod clients;
mod demo;
mod fuzz;
mod lint;
mod privilege;
mod setup;
mod test;
mod vm;

const HELP: &str = "\
Usage: cargo xtask TASK [ARGUMENTS]

  setup            install what is missing: the BPF toolchain, and what demo and test need
  build [ARGS]     build the workspace; ARGS go to `cargo build`
  demo  [ARGS]     build imds-guard and show it at work; ARGS go to `imds-guard demo`
  test  [ARGS]     run all tests (needs root); ARGS go to `cargo test`
  vm-test [ARGS]   run the kernel tests on older kernels, in qemu (needs root); ARGS are
                   kernels (5.10) and tests, in place of all
  fuzz [ARGS]      fuzz what clients control; ARGS are targets (head, event), in place of all, and
                   seconds for each
  lint             rustfmt, clippy (the kernel programs too) and cargo-deny
  bench [ARGS]     measure what the guard costs (needs root); ARGS go to the benchmark
";

fn main() -> ExitCode {
    let mut args = env::args_os().skip(1);
    let task = args.next().unwrap_or_default();
    let args: Vec<_> = args.collect();
    let result = match task.to_str() {
        Some("setup") => no_arguments(&args).and_then(|()| setup::run_for_tests()),
        Some("build") => build::run(&args),
        Some("demo") => demo::run(&args),
        Some("test") => test::run(&args),
        Some("lint") => no_arguments(&args).and_then(|()| lint::run()),
        Some("vm-test") => vm::run(&args),
        Some("fuzz") => fuzz::run(&args),
        Some("bench") => bench::run(&args),
        Some("help" | "-h" | "--help") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn no_arguments(args: &[OsString]) -> Result<()> {
    if let Some(arg) = args.first() {
        bail!(
            "this task takes no arguments, but was given {}",
            arg.display()
        );
    }
    Ok(())
}
