//! Every map: who writes it, its key, how long an entry lives.

use aya_ebpf::{
    Global,
    bindings::BPF_ANY,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
    helpers::generated::bpf_ktime_get_ns,
    macros::btf_map,
};
use imds_guard_common::{
    addr::Words,
    control::{Control, Mode, OnFailure},
    event::{COUNTERS as COUNTER_COUNT, Counter},
    flow::{Origin, SynKey},
    packet::{BUDGETS as BUDGET_COUNT, Budget, CONNECTIONS_PER_SECOND, PER_SECOND, Packet},
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

/// Cookie of the guard's own network namespace; 0 where the kernel does not tell it (before 5.14).
#[unsafe(no_mangle)]
pub static OWN_NETNS: Global<u64> = Global::new(0);

/// What to do, and whether anybody is there. Written by the daemon; read only for connections and
/// packets to a metadata endpoint.
#[btf_map]
pub static CONTROL: Array<Control, 1> = Array::new();

/// Until when a daemon vouches that it is there, in nanoseconds (`CLOCK_MONOTONIC`). Its heartbeat
/// puts it off several times a second.
#[btf_map]
pub static ALIVE_UNTIL: Array<u64, 1> = Array::new();

/// The guard's own upstream connections, by socket cookie, with the TTL of the last data from the
/// service. Written by the daemon before it connects, removed when the connection closes.
#[btf_map]
pub static EXEMPT: HashMap<u64, u8, 4096> = HashMap::new();

/// The caller of `connect(2)`, by socket cookie, until its SYN leaves: a moment later in the same call,
/// and again whenever it is retransmitted. LRU: evicted in time. Not socket storage: that is charged
/// to the socket's option memory, which the client itself can use up beforehand.
#[btf_map]
pub static PENDING: LruHashMap<u64, Origin, 16384> = LruHashMap::new();

/// The caller of each connection on its way to the listener. Written when its SYN leaves, removed by
/// the daemon when it accepts. LRU: what is never accepted is evicted in time.
#[btf_map]
pub static FLOWS: LruHashMap<SynKey, Origin, 16384> = LruHashMap::new();

/// Packets for a metadata endpoint that are not the guard's, for the daemon to record.
#[btf_map]
pub static PACKETS: RingBuf<Packet, 65536> = RingBuf::new();

/// What may be reported or heard, by [`imds_guard_common::packet::Layer`] or `STRANGERS`.
#[btf_map]
pub static BUDGETS: Array<Budget, { BUDGET_COUNT as usize }> = Array::new();

/// How many connections each caller has begun lately, by user or by cgroup. LRU: who begins none is
/// forgotten.
#[btf_map]
pub static CALLERS: LruHashMap<u64, Budget, 4096> = LruHashMap::new();

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

/// What the daemon wants; what an array that was never written says is audit and open.
#[inline(always)]
pub fn control() -> Control {
    CONTROL.get(0).copied().unwrap_or_default()
}

/// Whether a daemon is there.
#[inline(always)]
pub fn attended() -> bool {
    // SAFETY: a helper without preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    ALIVE_UNTIL.get(0).is_some_and(|until| now < *until)
}

/// Whether those whom the guard is there to stop are stopped.
#[inline(always)]
pub fn stops(control: &Control) -> bool {
    if attended() {
        control.mode == Mode::Enforce as u32
    } else {
        control.on_failure == OnFailure::Closed as u32
    }
}

/// Whether this socket is one of the guard's own upstream connections.
#[inline(always)]
pub fn is_exempt(cookie: u64) -> bool {
    // SAFETY: the value is only tested for presence.
    unsafe { EXEMPT.get(cookie) }.is_some()
}

/// Spends one of a budget. Returns how often nothing was left since the last time; `None` if nothing is.
#[inline(always)]
pub fn spend(budget: u32) -> Option<u64> {
    let budget = BUDGETS.get_ptr_mut(budget)?;
    // SAFETY: the slot exists as long as the program.
    unsafe { spend_of(budget, PER_SECOND) }
}

/// Whether a caller may begin one more connection now.
#[inline(always)]
pub fn may_begin(origin: &Origin) -> bool {
    // Root is many, in containers, too; other users can make cgroups of their own.
    let caller = if origin.uid == 0 {
        origin.cgroup_id
    } else {
        1 << 63 | u64::from(origin.uid)
    };
    match CALLERS.get_ptr_mut(caller) {
        // SAFETY: an entry that is evicted is not used again before the program ends (kernel: RCU).
        Some(budget) => unsafe { spend_of(budget, CONNECTIONS_PER_SECOND) }.is_some(),
        None => {
            // SAFETY: a helper without preconditions.
            let began = unsafe { bpf_ktime_get_ns() };
            let first = Budget {
                began,
                spent: 1,
                denied: 0,
            };
            let _full = CALLERS.insert(caller, first, BPF_ANY.into());
            true
        }
    }
}

/// CPUs that write at once can spend one more or less, which is all the same.
///
/// # Safety
/// `budget` must point to a map's value.
#[inline(always)]
unsafe fn spend_of(budget: *mut Budget, per_second: u64) -> Option<u64> {
    // SAFETY: by the caller's promise.
    unsafe {
        let now = bpf_ktime_get_ns();
        if now - (*budget).began > 1_000_000_000 {
            (*budget).began = now;
            (*budget).spent = 0;
        }
        if (*budget).spent >= per_second {
            (*budget).denied += 1;
            return None;
        }
        (*budget).spent += 1;
        Some(core::mem::take(&mut (*budget).denied))
    }
}
