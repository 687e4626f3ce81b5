//! A connection's first packet: how many routers it passed, and by what it is known.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use imds_guard_common::flow::SynKey;

/// What a connection's SYN tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    /// TTL (IPv6: hop limit) with which it arrived.
    pub ttl: u8,
    /// What its caller was published under.
    pub key: SynKey,
}

/// How often a listener repeats its part of the handshake: half-open connections last seconds, not a
/// minute.
const SYN_ACKS: libc::c_int = 2;

/// Makes a listener keep the headers of each connection's SYN (`TCP_SAVE_SYN`, tcp(7), Linux 4.2), and
/// half-open connections not for long (`TCP_SYNCNT`).
pub fn prepare(listener: &impl AsFd) -> io::Result<()> {
    set(listener, libc::TCP_SAVE_SYN, 1)?;
    set(listener, libc::TCP_SYNCNT, SYN_ACKS)
}

fn set(socket: &impl AsFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed and open, the option is an int of the given size.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The SYN of an accepted connection; `None` if the kernel has not kept it (SYN cookies). The kernel
/// gives it once and frees it.
pub fn take(connection: &impl AsFd) -> Option<Syn> {
    // The headers with all their options; a buffer that is too short gives nothing at all.
    let mut headers = [0_u8; 256];
    let mut length = size_of_val(&headers) as libc::socklen_t;
    // SAFETY: the descriptor is borrowed and open, the buffer has the length that is said.
    let done = unsafe {
        libc::getsockopt(
            connection.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVED_SYN,
            headers.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done != 0 {
        return None;
    }
    parse(headers.get(..length as usize)?)
}

/// The TTL is the ninth byte of an IPv4 header (RFC 791), and the eighth of an IPv6 header (RFC 8200).
/// The kernel keeps IPv6 extension headers, but a SYN of ours has none.
fn parse(headers: &[u8]) -> Option<Syn> {
    let (ttl, network) = match headers.first()? >> 4 {
        4 => (*headers.get(8)?, usize::from(headers[0] & 0x0f) * 4),
        6 => (*headers.get(7)?, 40),
        _ => return None,
    };
    let transport = headers.get(network..).filter(|tcp| tcp.len() >= 20)?;
    let mut tcp = [0; SynKey::HEADER];
    let known = transport.len().min(tcp.len());
    tcp[..known].copy_from_slice(&transport[..known]);
    Some(Syn {
        ttl,
        key: SynKey::of(&tcp),
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_loopback_connection_has_lost_nothing_and_is_known() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            prepare(&listener).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let syn = take(&accepted).unwrap();
            assert_eq!(syn.ttl, 64, "{address}");
            assert_ne!(syn.key.sequence, 0);
            assert_ne!(syn.key.timestamp, 0);
            assert_eq!(take(&accepted), None, "given once");
            drop(client);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_header_makes_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..120)) {
            let _any = parse(&bytes);
        }
    }
}
