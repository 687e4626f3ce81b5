//! What the daemon tells the kernel programs while they run.

/// What to do with those whom the guard is there to stop.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Watch: let it pass, and say so.
    Audit = 0,
    /// Enforce: refuse.
    Enforce = 1,
}

/// What to do while no daemon is there to decide.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// Connections go straight to the metadata service.
    Open = 0,
    /// Connections are refused.
    Closed = 1,
}

/// The one entry of the array `CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// A [`Mode`] as number.
    pub mode: u32,
    /// An [`OnFailure`] as number.
    pub on_failure: u32,
    /// 1 if the backstop judges packets, 0 if it is switched off.
    pub backstop: u32,
    /// Process id of the daemon that is in charge: the last one that started.
    pub owner: u32,
    /// Which listener addresses a daemon has added: bit 0 for IPv4, bit 1 for IPv6.
    pub addresses: u32,
    /// Always 0.
    pub padding: u32,
}

const _: () = assert!(size_of::<Control>() == 24);

#[cfg(feature = "user")]
// SAFETY: repr(C), plain integers, no padding (size asserted above), any bit pattern is valid.
unsafe impl aya::Pod for Control {}
