//! Packets for a metadata endpoint that did not come from the guard.

use crate::addr::Words;

/// Which layer saw a packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// In the cgroup of the socket that sent it, on its way out of the socket's network namespace.
    Backstop = 0,
    /// On an uplink of the host.
    Perimeter = 1,
}

/// Index of the budget of connections to the listener that were not redirected; layers come before.
pub const STRANGERS: u32 = 2;
/// How many budgets there are.
pub const BUDGETS: u32 = 3;

/// An entry of the ring buffer `PACKETS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Inode of the cgroup v2 directory of the socket that sent it; 0 if it was forwarded.
    pub cgroup_id: u64,
    /// Packets of this layer that were not reported since the last one that was.
    pub unreported: u64,
    /// Where it comes from.
    pub source: Words,
    /// A [`Layer`] as number.
    pub layer: u32,
    /// 1 if it was dropped, 0 if it was let pass.
    pub dropped: u32,
    /// Owner of the socket that sent it, in the initial user namespace.
    pub uid: u32,
    /// Interface through which it was about to leave.
    pub interface: u32,
    /// Interface through which it had come; 0 if this host made it.
    pub came_from: u32,
    /// Source port, in host byte order; 0 if the protocol has none, or a fragment hides it.
    pub source_port: u16,
    /// Protocol number (IANA).
    pub protocol: u8,
    /// Time to live (IPv6: hop limit).
    pub ttl: u8,
    /// 4 or 6.
    pub ip_version: u8,
    /// Always 0.
    pub padding: [u8; 7],
}

/// How many packets a layer reports, or how many strangers the listener hears, within how long.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// When the current second began, in nanoseconds (`CLOCK_MONOTONIC`).
    pub began: u64,
    /// What was spent in it.
    pub spent: u64,
    /// What found nothing left since.
    pub denied: u64,
}

/// What a budget allows in a second.
pub const PER_SECOND: u64 = 20;

/// Connections that one caller may begin in a second: many times what the service itself lets through
/// (1024 packets a second for each network interface), and little for the guard. More are not lost: a
/// client sends its SYN again, after a second.
pub const CONNECTIONS_PER_SECOND: u64 = 8000;

const _: () = assert!(size_of::<Packet>() == 64);
const _: () = assert!(size_of::<Budget>() == 24);

#[cfg(feature = "user")]
// SAFETY: repr(C), plain integers, no padding (size asserted above), any bit pattern is valid.
unsafe impl aya::Pod for Packet {}
