//! Addresses as the kernel programs compare them: 32-bit words in network byte order.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address as four words in network byte order; IPv4 in its IPv4-mapped form (RFC 4291, 2.5.5.2).
pub type Words = [u32; 4];

/// `::`, which stands for no address.
pub const UNSPECIFIED: Words = [0; 4];

/// The third word of an IPv4-mapped IPv6 address (`::ffff:a.b.c.d`), in network byte order.
const MAPPED_MARK: u32 = 0xffff_u32.to_be();

/// An IPv4 address as one word in network byte order.
#[must_use]
pub const fn word(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// Any IP address as four words.
#[must_use]
pub const fn words(address: IpAddr) -> Words {
    match address {
        IpAddr::V4(v4) => mapped(word(v4)),
        IpAddr::V6(v6) => words6(v6),
    }
}

/// An IPv4 address, given as one word, in its IPv4-mapped form.
#[must_use]
#[inline(always)]
pub const fn mapped(v4: u32) -> Words {
    [0, 0, MAPPED_MARK, v4]
}

/// The address that four words stand for.
#[must_use]
pub const fn address(words: Words) -> IpAddr {
    let [a, b, c, d] = [
        words[0].to_ne_bytes(),
        words[1].to_ne_bytes(),
        words[2].to_ne_bytes(),
        words[3].to_ne_bytes(),
    ];
    IpAddr::V6(Ipv6Addr::from_octets([
        a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2],
        d[3],
    ]))
}

const fn words6(address: Ipv6Addr) -> Words {
    let o = address.octets();
    [
        u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
        u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
        u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
        u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_becomes_its_mapped_form() {
        let v4 = Ipv4Addr::new(169, 254, 169, 254);
        let mapped_words = words(IpAddr::V4(v4));
        assert_eq!(mapped_words, words(IpAddr::V6(v4.to_ipv6_mapped())));
        assert_eq!(address(mapped_words).to_canonical(), IpAddr::V4(v4));
        assert_ne!(mapped_words, words(IpAddr::V6(Ipv6Addr::LOCALHOST)));
    }
}
