//! Every segment that arrives at the guard's listeners: only connections whose caller was published may
//! be begun, and not too many by one caller, so that nobody fills the listener's queues.

use aya_ebpf::programs::SkBuffContext;
use imds_guard_common::packet::STRANGERS;

use crate::{maps, packet};

/// Keep all of it.
const PASS: i64 = 0xffff_ffff;
const DROP: i64 = 0;

/// Judges a segment, which begins with its TCP header.
#[inline(always)]
pub fn filter(ctx: &SkBuffContext) -> i64 {
    let Some(key) = packet::syn_key(ctx.skb.skb, 0) else {
        return PASS;
    };
    // SAFETY: an entry that is evicted is not used again before the program ends (kernel: RCU).
    let may_begin = match unsafe { maps::FLOWS.get(key) } {
        Some(origin) => maps::may_begin(origin),
        // A few strangers are heard, to be refused at once and recorded by the daemon.
        None => maps::spend(STRANGERS).is_some(),
    };
    if may_begin { PASS } else { DROP }
}
