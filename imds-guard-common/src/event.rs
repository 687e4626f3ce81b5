//! What the kernel programs count and are told.

/// Index of a counter in the per-CPU array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections turned to the guard's listener.
    Redirected = 0,
    /// The guard's own upstream connections, let through.
    Exempt = 1,
    /// Connections that could not be served, refused in enforce mode: their caller could not be
    /// remembered, or there is no listener for IPv6.
    Refused = 2,
    /// The same, let past the guard in audit mode.
    Bypassed = 3,
    /// Redirected connections whose caller could not be published: the listener refuses them.
    PublishFailed = 4,
}

/// How many counters there are.
pub const COUNTERS: u32 = 5;

/// The mode as the kernel programs know it, the one entry of the array `MODE`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Watch: when in doubt, let it pass and count.
    Audit = 0,
    /// Enforce: when in doubt, refuse.
    Enforce = 1,
}
