//! Root, where it is needed.

use std::{fs, os::unix::fs::MetadataExt};

use anyhow::{Result, bail};

/// Whether we run as root: /proc/self belongs to the effective user.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Fails with the command to run instead, unless we run as root.
pub fn require_root(why: &str, command: &str) -> Result<()> {
    if !is_root() {
        bail!("{why}: run `{command}`");
    }
    Ok(())
}
