//! What the kernel programs count.

/// Index of a counter in the per-CPU array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections turned to the guard's listener.
    Redirected = 0,
    /// The guard's own upstream connections, let through.
    Exempt = 1,
    /// Connections that could not be served, refused in enforce mode: their caller could not be
    /// remembered, there is no listener for IPv6, or their socket is bound to another interface.
    Refused = 2,
    /// The same, let past the guard in audit mode.
    Bypassed = 3,
    /// Redirected connections whose caller could not be published: the listener refuses them.
    PublishFailed = 4,
    /// Connections refused while no daemon was there (closed).
    UnattendedRefused = 5,
    /// Connections let past while no daemon was there (open).
    UnattendedBypassed = 6,
    /// Packets that a layer dropped.
    PacketsDropped = 7,
    /// Packets that a layer let pass, though they are not the guard's.
    PacketsPassed = 8,
}

/// How many counters there are.
pub const COUNTERS: u32 = 9;
