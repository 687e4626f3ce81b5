//! Every frame that leaves the host through an uplink: what is for a metadata endpoint must be the
//! guard's own, whoever sent it: virtual machines and containers that are forwarded, packet sockets,
//! sockets outside the watched cgroup.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use imds_guard_common::{addr::UNSPECIFIED, packet::Layer};

use crate::{
    maps,
    packet::{self, ETH_P_IP, ETH_P_IPV6, load},
};

/// Length of an Ethernet header.
const ETH_HLEN: u32 = 14;
const VLAN_HLEN: u32 = 4;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// More than any network uses: one for a provider, one for its customer. A receiver may take off any
/// number of tags that only say a priority, so a frame with more is not looked through, but stopped.
const MAX_TAGS: usize = 2;

/// What is said of a frame that nobody has looked into.
const UNREAD: packet::Headers = packet::Headers {
    source: UNSPECIFIED,
    protocol: 0,
    ttl: 0,
    version: 4,
    transport: None,
};

#[inline(always)]
fn is_tag(kind: u16) -> bool {
    kind == ETH_P_8021Q || kind == ETH_P_8021AD
}

/// Judges a frame. Others' frames leave after two loads and three compares.
#[inline(always)]
pub fn egress(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    if passes(skb).unwrap_or(true) {
        // The other programs of the interface decide.
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// `None` if it is not for a metadata endpoint.
#[inline(always)]
fn passes(skb: *mut __sk_buff) -> Option<bool> {
    // Most frames leave here: they are for other addresses.
    if let Some(kind) = packet::word_at(skb, 12) {
        let kind = u16::from_be(kind as u16);
        let to = |at| packet::word_at(skb, ETH_HLEN as usize + at);
        if (kind == ETH_P_IP && to(16)? != maps::IMDS_V4.load())
            || (kind == ETH_P_IPV6 && to(36)? != maps::IMDS_V6.load()[3])
        {
            return None;
        }
    }
    // From the frame itself: a packet socket can tell the kernel another protocol than it sends.
    let mut kind = u16::from_be_bytes(load(skb, 12)?);
    let mut network = ETH_HLEN;
    for _ in 0..MAX_TAGS {
        if !is_tag(kind) {
            break;
        }
        kind = u16::from_be_bytes(load(skb, network + 2)?);
        network += VLAN_HLEN;
    }
    let headers = if kind == ETH_P_IP {
        let header = load::<20>(skb, network)?;
        let to = u32::from_ne_bytes([header[16], header[17], header[18], header[19]]);
        if to != maps::IMDS_V4.load() {
            return None;
        }
        packet::headers4(&header, network)
    } else if kind == ETH_P_IPV6 {
        let header = load::<40>(skb, network)?;
        let (_, to) = packet::addresses6(&header);
        if to != maps::IMDS_V6.load() {
            return None;
        }
        packet::headers6(skb, &header, network)
    } else if is_tag(kind) {
        UNREAD
    } else {
        return None;
    };
    Some(packet::judge(skb, Layer::Perimeter, &headers))
}
