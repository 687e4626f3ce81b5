//! The guard's own connections to the metadata service are not redirected to the guard.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, MapData};
use socket2::Socket;

/// Marks sockets as the guard's own, by their cookie: the kernel never uses one twice, and nobody
/// else can choose one.
#[derive(Clone, Default)]
pub struct Exempt(Option<Arc<Mutex<HashMap<MapData, u64, u8>>>>);

/// A socket is exempt as long as this lives.
pub struct Exemption {
    cookie: u64,
    from: Exempt,
}

impl Exempt {
    pub(super) fn new(map: HashMap<MapData, u64, u8>) -> Self {
        Self(Some(Arc::new(Mutex::new(map))))
    }

    /// Forgets the sockets of a daemon that was killed. They are closed, and their cookies never used
    /// again, but the map is of a limited size.
    pub fn forget_all(&self) {
        if let Some(map) = &self.0 {
            let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
            let cookies: Vec<u64> = map.keys().flatten().collect();
            for cookie in cookies {
                let _gone = map.remove(&cookie);
            }
        }
    }

    /// Nothing to be exempt from: no kernel programs are attached.
    #[must_use]
    pub fn nothing() -> Self {
        Self(None)
    }

    /// Exempts a socket that is not connected yet.
    ///
    /// # Errors
    /// The map is full or cannot be written. The socket must not be connected then: it would reach
    /// the guard's own listener.
    pub fn socket(&self, socket: &Socket) -> io::Result<Exemption> {
        let cookie = socket.cookie()?;
        if let Some(map) = &self.0 {
            let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
            map.insert(cookie, 0, 0).map_err(io::Error::other)?;
        }
        Ok(Exemption {
            cookie,
            from: self.clone(),
        })
    }
}

impl Drop for Exemption {
    fn drop(&mut self) {
        if let Some(map) = &self.from.0 {
            let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = map.remove(&self.cookie) {
                log::warn!("a closed upstream connection stays exempt: {error}");
            }
        }
    }
}
