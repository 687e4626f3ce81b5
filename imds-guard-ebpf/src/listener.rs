//! Every segment that arrives at the guard's listeners: only connections whose caller was published may
//! be begun, so that nobody fills the listener's queue with SYNs that he made up.

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
    // SAFETY: the value is only tested for presence.
    let is_published = unsafe { maps::FLOWS.get(key) }.is_some();
    // A few strangers are heard, to be refused at once and recorded by the daemon.
    if is_published || maps::spend(STRANGERS).is_some() {
        PASS
    } else {
        DROP
    }
}
