//! Who opened the connections that reach the listener.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use imds_guard_common::{
    addr,
    flow::{FlowKey, Origin},
};

/// Finds the caller of a connection.
pub trait FlowTable: Send + Sync + 'static {
    /// Takes the caller of a connection out of the table; `None` if it was not redirected.
    ///
    /// # Errors
    /// The table cannot be read.
    fn take(&self, key: &FlowKey) -> io::Result<Option<Origin>>;
}

/// The key of an accepted connection.
#[must_use]
pub fn flow_key(client: SocketAddr, listener: SocketAddr) -> FlowKey {
    FlowKey {
        client: addr::words(client.ip()),
        listener: addr::words(listener.ip()),
        client_port: client.port().into(),
        listener_port: listener.port().into(),
    }
}

/// The table that the kernel programs fill.
pub struct KernelFlows(Mutex<BpfHashMap<MapData, FlowKey, Origin>>);

impl KernelFlows {
    pub(super) fn new(map: BpfHashMap<MapData, FlowKey, Origin>) -> Self {
        Self(Mutex::new(map))
    }
}

impl FlowTable for KernelFlows {
    fn take(&self, key: &FlowKey) -> io::Result<Option<Origin>> {
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

/// A table in memory, for running the proxy without kernel programs.
#[derive(Default)]
pub struct MemoryFlows(Mutex<HashMap<FlowKey, Origin>>);

impl MemoryFlows {
    /// Publishes a caller, as the kernel programs do.
    pub fn publish(&self, key: FlowKey, origin: Origin) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, origin);
    }
}

impl FlowTable for MemoryFlows {
    fn take(&self, key: &FlowKey) -> io::Result<Option<Origin>> {
        Ok(self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key))
    }
}
