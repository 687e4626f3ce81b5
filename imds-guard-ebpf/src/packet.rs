//! A packet for a metadata endpoint: what it is, and what becomes of it.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_get_socket_cookie, bpf_get_socket_uid, bpf_skb_cgroup_id, bpf_skb_load_bytes,
    },
};
use imds_guard_common::{
    addr::{self, Words},
    event::Counter,
    flow::SynKey,
    packet::{Layer, Packet},
};

use crate::maps;

pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;

pub const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_DCCP: u8 = 33;
const IPPROTO_SCTP: u8 = 132;
const IPPROTO_UDPLITE: u8 = 136;

/// IPv6 extension headers that another header follows (RFC 8200, 4.1).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// More extension headers than any system sends.
const MAX_EXTENSIONS: usize = 4;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A packet that is for the metadata service's address.
pub struct Headers {
    pub source: Words,
    pub protocol: u8,
    pub ttl: u8,
    pub version: u8,
    /// Where the transport header begins; `None` in a fragment that has none.
    pub transport: Option<u32>,
}

/// Bytes of a packet; `None` if it is shorter.
#[inline(always)]
pub fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the context is valid while the program runs, and the buffer has the length that is said.
    let failed =
        unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    (failed == 0).then_some(bytes)
}

/// Four bytes of a packet as they are, without a call where the kernel has them in one piece, as it has
/// headers; `None` if it is shorter.
#[inline(always)]
pub fn word_at(skb: *mut __sk_buff, offset: usize) -> Option<u32> {
    // SAFETY: the context is valid while the program runs, and what is read lies before its end.
    unsafe {
        let word = (*skb).data as usize + offset;
        if word + 4 <= (*skb).data_end as usize {
            return Some(*(word as *const u32));
        }
    }
    load(skb, offset as u32).map(u32::from_ne_bytes)
}

/// What a SYN, and nothing else, is known by.
#[inline(always)]
pub fn syn_key(skb: *mut __sk_buff, transport: u32) -> Option<SynKey> {
    let start = load::<20>(skb, transport)?;
    if start[13] & (SYN | ACK) != SYN {
        return None;
    }
    // Without options it is shorter, and says so itself.
    let tcp = load::<{ SynKey::HEADER }>(skb, transport).unwrap_or_else(|| {
        let mut tcp = [0; SynKey::HEADER];
        tcp[..20].copy_from_slice(&start);
        tcp
    });
    Some(SynKey::of(&tcp))
}

#[inline(always)]
fn word(bytes: &[u8; 40], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// An IPv6 header's source and destination.
#[inline(always)]
pub fn addresses6(header: &[u8; 40]) -> (Words, Words) {
    (
        [
            word(header, 8),
            word(header, 12),
            word(header, 16),
            word(header, 20),
        ],
        [
            word(header, 24),
            word(header, 28),
            word(header, 32),
            word(header, 36),
        ],
    )
}

/// What an IPv4 header says of a packet.
#[inline(always)]
pub fn headers4(header: &[u8; 20], offset: u32) -> Headers {
    let source = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
    let is_later_fragment = (header[6] & 0x1f) != 0 || header[7] != 0;
    let length = u32::from(header[0] & 0x0f) * 4;
    Headers {
        source: addr::mapped(source),
        protocol: header[9],
        ttl: header[8],
        version: 4,
        transport: (!is_later_fragment).then_some(offset + length),
    }
}

/// What an IPv6 header and its extensions say of a packet.
#[inline(always)]
pub fn headers6(skb: *mut __sk_buff, header: &[u8; 40], offset: u32) -> Headers {
    let mut protocol = header[6];
    let mut transport = offset + 40;
    let mut found = true;
    for _ in 0..MAX_EXTENSIONS {
        if !matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            break;
        }
        let Some([next, length, high, low]) = load(skb, transport) else {
            found = false;
            break;
        };
        if protocol == FRAGMENT {
            // Thirteen bits of offset, in the upper part of two bytes.
            if high != 0 || low & 0xf8 != 0 {
                found = false;
            }
            transport += 8;
        } else {
            transport += (u32::from(length) + 1) * 8;
        }
        protocol = next;
    }
    if matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
        found = false;
    }
    let (source, _) = addresses6(header);
    Headers {
        source,
        protocol,
        ttl: header[7],
        version: 6,
        transport: found.then_some(transport),
    }
}

/// Judges a packet for the metadata service's address. Returns whether it may pass.
///
/// Only the guard's own connections may speak to the endpoint. What is not for its port passes, and so
/// do TCP segments that neither open a connection nor carry anything: they can ask for nothing, and
/// the guard's own sockets send them when they are no longer known by their cookie.
#[inline(always)]
pub fn judge(skb: *mut __sk_buff, layer: Layer, headers: &Headers) -> bool {
    let mut source_port = 0;
    if let Some(transport) = headers.transport {
        match headers.protocol {
            IPPROTO_TCP => {
                let Some(tcp) = load::<14>(skb, transport) else {
                    return stop(skb, layer, headers, 0);
                };
                source_port = u16::from_be_bytes([tcp[0], tcp[1]]);
                // SAFETY: the context is valid while the program runs.
                let length = unsafe { (*skb).len };
                let data = transport + u32::from(tcp[12] >> 4) * 4;
                let carries_nothing = length <= data;
                if !is_for_endpoint([tcp[2], tcp[3]])
                    || (carries_nothing && tcp[13] & SYN == 0 && tcp[13] & (ACK | RST | FIN) != 0)
                {
                    return true;
                }
            }
            IPPROTO_UDP | IPPROTO_UDPLITE | IPPROTO_SCTP | IPPROTO_DCCP => {
                let Some(ports) = load::<4>(skb, transport) else {
                    return stop(skb, layer, headers, 0);
                };
                source_port = u16::from_be_bytes([ports[0], ports[1]]);
                if !is_for_endpoint([ports[2], ports[3]]) {
                    return true;
                }
            }
            // Others, such as ICMP, cannot ask for anything.
            _ => return true,
        }
    }
    // SAFETY: the context is valid while the program runs; without a socket the cookie is 0.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    if cookie != 0 && maps::is_exempt(cookie) {
        return true;
    }
    stop(skb, layer, headers, source_port)
}

#[inline(always)]
fn is_for_endpoint(port: [u8; 2]) -> bool {
    u32::from(u16::from_ne_bytes(port)) == maps::IMDS_PORT.load()
}

/// Drops the packet or lets it pass, as the daemon wants it, and says so.
#[inline(always)]
fn stop(skb: *mut __sk_buff, layer: Layer, headers: &Headers, source_port: u16) -> bool {
    let control = maps::control();
    if matches!(layer, Layer::Backstop) && control.backstop == 0 {
        return true;
    }
    let passes = !maps::stops(&control);
    maps::count(if passes {
        Counter::PacketsPassed
    } else {
        Counter::PacketsDropped
    });
    // Open and nobody there: these are the connections of ordinary clients.
    if maps::attended() || !passes {
        report(skb, layer, headers, source_port, !passes);
    }
    passes
}

/// Hands a packet to the daemon, unless there were too many lately.
#[inline(always)]
fn report(skb: *mut __sk_buff, layer: Layer, headers: &Headers, source_port: u16, dropped: bool) {
    let Some(unreported) = maps::spend(layer as u32) else {
        return;
    };
    // A daemon that does not read them loses them.
    let Some(mut entry) = maps::PACKETS.reserve(0) else {
        return;
    };
    // SAFETY: the context is valid while the program runs.
    let packet = unsafe {
        Packet {
            cgroup_id: bpf_skb_cgroup_id(skb),
            unreported,
            source: headers.source,
            layer: layer as u32,
            dropped: dropped.into(),
            uid: bpf_get_socket_uid(skb),
            interface: (*skb).ifindex,
            came_from: (*skb).ingress_ifindex,
            source_port,
            protocol: headers.protocol,
            ttl: headers.ttl,
            ip_version: headers.version,
            padding: [0; 7],
        }
    };
    entry.write(packet);
    entry.submit(0);
}
