//! What imds-guard's build script and its development tasks share: the BPF toolchain.
//!
//! The tasks themselves are the modules of the `xtask` binary, one file each.

use std::path::Path;

pub mod bpf;
pub mod process;

/// The workspace's top folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in a folder of the workspace")
}
