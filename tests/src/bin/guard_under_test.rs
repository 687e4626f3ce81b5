//! imds-guard, under a name that does not clash with the real one.

use std::process::ExitCode;

fn main() -> ExitCode {
    imds_guard::cli::main()
}
