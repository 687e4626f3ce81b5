//! The command line of imds-guard.

use std::process::ExitCode;

fn main() -> ExitCode {
    imds_guard::cli::main()
}
