//! Every segment that the metadata service sends the guard: with which TTL it came. That of the answer to
//! a token request is the instance's own hop limit (`HttpPutResponseHopLimit`).

use aya_ebpf::{
    bindings::{__sk_buff, bpf_hdr_start_off::BPF_HDR_START_NET},
    helpers::generated::{bpf_get_socket_cookie, bpf_skb_load_bytes_relative},
    programs::SkBuffContext,
};

use crate::{maps, packet};

/// Keep all of it.
const PASS: i64 = 0xffff_ffff;

/// Notes the TTL of a segment, which begins with its TCP header, if it carries data.
#[inline(always)]
pub fn filter(ctx: &SkBuffContext) -> i64 {
    let skb = ctx.skb.skb;
    let header_len = packet::load::<1>(skb, 12).map_or(0, |[offset]| u32::from(offset >> 4) * 4);
    if ctx.len() > header_len
        && let Some(ttl) = ttl(skb)
    {
        // SAFETY: the context is valid while the program runs.
        let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
        if let Some(noted) = maps::EXEMPT.get_ptr_mut(cookie) {
            // SAFETY: an entry that is removed is not used again before the program ends (kernel: RCU).
            unsafe { *noted = ttl }
        }
    }
    PASS
}

/// TTL of IPv4, hop limit of IPv6.
#[inline(always)]
fn ttl(skb: *mut __sk_buff) -> Option<u8> {
    let mut header = [0_u8; 9];
    // SAFETY: the context is valid while the program runs, and the buffer has the length that is said.
    let failed = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            0,
            header.as_mut_ptr().cast(),
            header.len() as u32,
            BPF_HDR_START_NET,
        )
    };
    match header[0] >> 4 {
        _ if failed != 0 => None,
        4 => Some(header[8]),
        6 => Some(header[7]),
        _ => None,
    }
}
