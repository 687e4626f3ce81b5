//! Who opened a redirected connection, and the key under which the daemon finds it.

/// What a connection's first packet carries, and no other one does: whoever publishes it has seen the
/// packet leave, whoever looks it up has seen it arrive. Address translation changes neither.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SynKey {
    /// The initial sequence number: unpredictable for others (RFC 6528).
    pub sequence: u32,
    /// The timestamp (RFC 7323), which Linux offsets by an unpredictable number for each pair of
    /// addresses; 0 where timestamps are off (`net.ipv4.tcp_timestamps`).
    pub timestamp: u32,
}

impl SynKey {
    /// How many bytes of a SYN's TCP header tell the key: without options, 20 are enough.
    pub const HEADER: usize = 32;

    /// The key of a SYN, from the beginning of its TCP header.
    ///
    /// Linux puts the timestamp right behind the maximum segment size, with selective
    /// acknowledgements or padding before it; elsewhere it is not looked for.
    #[must_use]
    #[inline(always)]
    pub const fn of(tcp: &[u8; Self::HEADER]) -> Self {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let words = tcp[12] >> 4;
        let timestamp = if words >= 8 && tcp[26] == 8 && tcp[27] == 10 {
            u32::from_be_bytes([tcp[28], tcp[29], tcp[30], tcp[31]])
        } else {
            0
        };
        Self {
            sequence,
            timestamp,
        }
    }
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
    /// The initial sequence number of the connection, once its SYN has left; 0 before. A later one of
    /// the same socket is another connection, which was not redirected.
    pub sequence: u32,
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

const _: () = assert!(size_of::<SynKey>() == 8);
const _: () = assert!(size_of::<Origin>() == 72);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: repr(C), plain integers, no padding (sizes asserted above), any bit pattern is valid.
    unsafe impl aya::Pod for super::SynKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Origin {}
}
