//! Every map: who writes it, its key, how long an entry lives.

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use imds_guard_common::{
    addr::Words,
    event::{COUNTERS as COUNTER_COUNT, Counter, Mode},
    flow::{FlowKey, Origin},
};

// The addresses live in `.rodata`: a map that the daemon fills before the programs load and that is
// frozen then. Reading it is one load from a known address, without a map look-up.

/// IPv4 metadata address, network byte order.
#[unsafe(no_mangle)]
pub static IMDS_V4: Global<u32> = Global::new(0);
/// IPv6 metadata address.
#[unsafe(no_mangle)]
pub static IMDS_V6: Global<Words> = Global::new([0; 4]);
/// Metadata port of both, network byte order in the low 16 bits.
#[unsafe(no_mangle)]
pub static IMDS_PORT: Global<u32> = Global::new(0);
/// The guard's IPv4 listener address, network byte order.
#[unsafe(no_mangle)]
pub static LISTENER_V4: Global<u32> = Global::new(0);
/// The guard's IPv6 listener address.
#[unsafe(no_mangle)]
pub static LISTENER_V6: Global<Words> = Global::new([0; 4]);
/// Port of both listeners, network byte order in the low 16 bits.
#[unsafe(no_mangle)]
pub static LISTENER_PORT: Global<u32> = Global::new(0);

/// What to do in doubt: a [`Mode`] as number. Written by the daemon, also while running; read only
/// for connections to a metadata endpoint.
#[btf_map]
pub static MODE: Array<u32, 1> = Array::new();

/// Socket cookies of the guard's own upstream connections. Written by the daemon before it connects,
/// removed when the connection closes.
#[btf_map]
pub static EXEMPT: HashMap<u64, u8, 4096> = HashMap::new();

/// The caller, by socket cookie, from its `connect(2)` until its source port is chosen a moment later
/// in the same call. LRU: what a failed connect leaves behind is evicted in time. Not socket storage:
/// that is charged to the socket's option memory, which the client itself can use up beforehand.
#[btf_map]
pub static PENDING: LruHashMap<u64, Origin, 16384> = LruHashMap::new();

/// The caller of each connection on its way to the listener. Written when the source port is known,
/// removed by the daemon when it accepts. LRU: what is never accepted is evicted in time.
#[btf_map]
pub static FLOWS: LruHashMap<FlowKey, Origin, 16384> = LruHashMap::new();

/// What happened, by [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_COUNT as usize }> = PerCpuArray::new();

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own, and a program is not moved to another one.
        unsafe { *value += 1 }
    }
}

/// Whether doubt means refusal.
#[inline(always)]
pub fn enforcing() -> bool {
    MODE.get(0)
        .is_some_and(|mode| *mode == Mode::Enforce as u32)
}
