//! The guard's own connections to the metadata service are not redirected to the guard.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    maps::{HashMap, MapData},
    programs::ProgramFd,
};
use socket2::Socket;

/// Marks sockets as the guard's own, by their cookie: the kernel never uses one twice, and nobody
/// else can choose one.
#[derive(Clone, Default)]
pub struct Exempt(Option<Arc<Kernel>>);

struct Kernel {
    /// By cookie, the TTL of the last data that came.
    map: Mutex<HashMap<MapData, u64, u8>>,
    /// Notes it.
    filter: ProgramFd,
}

/// A socket is exempt as long as this lives.
pub struct Exemption {
    cookie: u64,
    from: Exempt,
}

impl Exempt {
    pub(super) fn new(map: HashMap<MapData, u64, u8>, filter: ProgramFd) -> Self {
        let map = Mutex::new(map);
        Self(Some(Arc::new(Kernel { map, filter })))
    }

    /// Forgets the sockets of a daemon that was killed. They are closed, and their cookies never used
    /// again, but the map is of a limited size.
    pub fn forget_all(&self) {
        if let Some(kernel) = &self.0 {
            let mut map = kernel.map();
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
        if let Some(kernel) = &self.0 {
            attach(socket, &kernel.filter)?;
            kernel
                .map()
                .insert(cookie, 0, 0)
                .map_err(io::Error::other)?;
        }
        Ok(Exemption {
            cookie,
            from: self.clone(),
        })
    }
}

impl Exemption {
    /// The TTL (IPv6: hop limit) with which the last data came; `None` if none came, or no kernel
    /// program looks.
    #[must_use]
    pub fn last_ttl(&self) -> Option<u8> {
        let kernel = self.from.0.as_ref()?;
        let ttl = kernel.map().get(&self.cookie, 0);
        ttl.ok().filter(|ttl| *ttl != 0)
    }
}

impl Drop for Exemption {
    fn drop(&mut self) {
        if let Some(kernel) = &self.from.0
            && let Err(error) = kernel.map().remove(&self.cookie)
        {
            log::warn!("a closed upstream connection stays exempt: {error}");
        }
    }
}

impl Kernel {
    fn map(&self) -> MutexGuard<'_, HashMap<MapData, u64, u8>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Attaches a socket filter (`SO_ATTACH_BPF`, socket(7), Linux 3.19).
fn attach(socket: &Socket, filter: &ProgramFd) -> io::Result<()> {
    let filter = filter.as_fd().as_raw_fd();
    // SAFETY: both descriptors are borrowed and open, the option is an int of the given size.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
