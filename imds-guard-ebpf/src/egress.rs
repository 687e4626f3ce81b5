//! Every packet of the watched cgroup on its way out: publish callers, and be the redirect's backstop.
//!
//! The SYN of a redirected connection is where its caller is published: only here the kernel has
//! chosen all that identifies it. What is for a metadata endpoint has gone around the redirect:
//! connections older than the guard, raw sockets, addresses translated on the way.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY},
    helpers::generated::bpf_get_socket_cookie,
    programs::SkBuffContext,
};
use aya_log_ebpf::warn;
use imds_guard_common::{event::Counter, packet::Layer};

use crate::{
    maps,
    packet::{self, ETH_P_IP, ETH_P_IPV6, IPPROTO_TCP, load},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// Where a packet goes, as far as it concerns us.
enum Destination {
    Metadata(packet::Headers),
    /// With the offset of the transport header.
    Listener(u32),
    Elsewhere,
}

/// Judges a packet by its destination. Others' packets leave after one load and two compares.
#[inline(always)]
pub fn egress(ctx: &SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    match destination(skb) {
        Destination::Elsewhere => PASS,
        Destination::Listener(transport) => {
            publish(ctx, skb, transport);
            PASS
        }
        Destination::Metadata(headers) => {
            if packet::judge(skb, Layer::Backstop, &headers) {
                PASS
            } else {
                DROP
            }
        }
    }
}

#[inline(always)]
fn destination(skb: *mut __sk_buff) -> Destination {
    // SAFETY: the context is valid while the program runs. The kernel sets the protocol from the
    // header that it made itself, or checked (raw sockets).
    let protocol = u16::from_be(unsafe { (*skb).protocol } as u16);
    if protocol == ETH_P_IP {
        let to = packet::word_at(skb, 16);
        let is_metadata = to == Some(maps::IMDS_V4.load());
        if !is_metadata && to != Some(maps::LISTENER_V4.load()) {
            return Destination::Elsewhere;
        }
        match load::<20>(skb, 0) {
            Some(header) if is_metadata => Destination::Metadata(packet::headers4(&header, 0)),
            Some(header) if header[9] == IPPROTO_TCP => {
                Destination::Listener(u32::from(header[0] & 0x0f) * 4)
            }
            _ => Destination::Elsewhere,
        }
    } else if protocol == ETH_P_IPV6 {
        // The addresses differ in their last word from all others that begin like them.
        let to = packet::word_at(skb, 36);
        if to != Some(maps::IMDS_V6.load()[3]) && to != Some(maps::LISTENER_V6.load()[3]) {
            return Destination::Elsewhere;
        }
        let Some(header) = load::<40>(skb, 0) else {
            return Destination::Elsewhere;
        };
        let (_, to) = packet::addresses6(&header);
        if to == maps::IMDS_V6.load() {
            Destination::Metadata(packet::headers6(skb, &header, 0))
        } else if to == maps::LISTENER_V6.load() && header[6] == IPPROTO_TCP {
            Destination::Listener(40)
        } else {
            Destination::Elsewhere
        }
    } else {
        Destination::Elsewhere
    }
}

/// Publishes the caller of a redirected connection under its SYN.
#[inline(always)]
fn publish(ctx: &SkBuffContext, skb: *mut __sk_buff, transport: u32) {
    let Some(port) = load::<2>(skb, transport + 2) else {
        return;
    };
    if u32::from(u16::from_ne_bytes(port)) != maps::LISTENER_PORT.load() {
        return;
    }
    let Some(key) = packet::syn_key(skb, transport) else {
        return;
    };
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    let pending = maps::PENDING.get_ptr_mut(cookie).map(|origin| {
        // SAFETY: the entry is this socket's own, and its SYNs are sent one after the other.
        unsafe { &mut *origin }
    });
    let pending = pending.filter(|origin| origin.sequence == 0 || origin.sequence == key.sequence);
    let Some(origin) = pending else {
        // Somebody connects to the listener without being redirected, or not for this connection: it
        // must not find an entry.
        let _absent = maps::FLOWS.remove(key);
        return;
    };
    origin.sequence = key.sequence;
    if maps::FLOWS.insert(key, *origin, BPF_ANY.into()).is_err() {
        maps::count(Counter::PublishFailed);
        warn!(
            ctx,
            "pid {} not published: the listener will refuse it", origin.pid
        );
    }
}
