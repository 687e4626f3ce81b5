//! Who opened a redirected connection, and the key under which the daemon finds it.

use crate::addr::Words;

/// A redirected TCP connection, as both its ends see it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The client's address.
    pub client: Words,
    /// The address of the guard's listener.
    pub listener: Words,
    /// The client's port, in host byte order.
    pub client_port: u32,
    /// The listener's port, in host byte order.
    pub listener_port: u32,
}

/// Which form of a metadata address the client asked for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `169.254.169.254` on an `AF_INET` socket.
    Ipv4 = 1,
    /// `fd00:ec2::254`.
    Ipv6 = 2,
    /// `::ffff:169.254.169.254` on an `AF_INET6` socket.
    Ipv4Mapped = 3,
}

/// The caller of `connect(2)`, taken in its own context: it cannot be spoofed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Socket cookie: unique on the host until it reboots (`SO_COOKIE`).
    pub cookie: u64,
    /// Inode of the caller's cgroup v2 directory.
    pub cgroup_id: u64,
    /// Cookie of the socket's network namespace (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// When it connected: nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
    pub connected_at: u64,
    /// Process id in the initial pid namespace (the kernel's tgid).
    pub pid: u32,
    /// Thread id in the initial pid namespace (the kernel's pid).
    pub tid: u32,
    /// Real user id in the initial user namespace.
    pub uid: u32,
    /// Real group id in the initial user namespace.
    pub gid: u32,
    /// Name of the calling thread, padded with NUL.
    pub comm: [u8; 16],
    /// What it asked for: a [`Family`] as number.
    pub family: u32,
    /// Always 0: no byte of a map value may be left undefined.
    pub padding: u32,
}

impl Origin {
    /// The address form the client asked for, `None` if the number is unknown.
    #[must_use]
    pub const fn family(&self) -> Option<Family> {
        match self.family {
            1 => Some(Family::Ipv4),
            2 => Some(Family::Ipv6),
            3 => Some(Family::Ipv4Mapped),
            _ => None,
        }
    }
}

const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Origin>() == 72);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: repr(C), plain integers, no padding (sizes asserted above), any bit pattern is valid.
    unsafe impl aya::Pod for super::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Origin {}
}
