//! Who opened the connections that reach the listener.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use aya::maps::{HashMap, MapData, MapError};
use imds_guard_common::flow::{Origin, SynKey};

/// Finds the caller of a connection.
pub trait FlowTable: Send + Sync + 'static {
    /// Takes the caller of a connection out of the table; `None` if it was not redirected.
    ///
    /// # Errors
    /// The table cannot be read.
    fn take(&self, key: &SynKey) -> io::Result<Option<Origin>>;
}

/// The table that the kernel programs fill.
pub struct KernelFlows(Mutex<HashMap<MapData, SynKey, Origin>>);

impl KernelFlows {
    pub(super) fn new(map: HashMap<MapData, SynKey, Origin>) -> Self {
        Self(Mutex::new(map))
    }
}

impl FlowTable for KernelFlows {
    fn take(&self, key: &SynKey) -> io::Result<Option<Origin>> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Two calls, as BPF_MAP_LOOKUP_AND_DELETE_ELEM serves hash maps only from kernel 5.14 on.
        match map.get(key, 0) {
            Ok(origin) => {
                map.remove(key).or_else(absent_is_fine)?;
                Ok(Some(origin))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

fn absent_is_fine(error: MapError) -> io::Result<()> {
    match error {
        MapError::KeyNotFound => Ok(()),
        MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(())
        }
        error => Err(io::Error::other(error)),
    }
}

/// Takes everybody for the same caller: for running the proxy without kernel programs.
pub struct Everyone(pub Origin);

impl FlowTable for Everyone {
    fn take(&self, _: &SynKey) -> io::Result<Option<Origin>> {
        Ok(Some(self.0))
    }
}
