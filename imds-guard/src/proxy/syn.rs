//! The TTL with which a connection's first packet arrived: how many routers it passed.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// Makes a listener keep the headers of each connection's SYN (`TCP_SAVE_SYN`, tcp(7), Linux 4.2).
pub fn save(listener: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is borrowed and open, the option is an int of the given size.
    let done = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVE_SYN,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// TTL (IPv6: hop limit) of an accepted connection's SYN. The kernel gives it once and frees it.
pub fn ttl(connection: &impl AsFd) -> Option<u8> {
    // An IPv6 header has 40 bytes; the rest is not needed, but a buffer that is too short gives
    // nothing at all.
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
    ttl_of(headers.get(..length as usize)?)
}

/// RFC 791: the TTL is the ninth byte; RFC 8200: the hop limit is the eighth.
fn ttl_of(ip_header: &[u8]) -> Option<u8> {
    match ip_header.first()? >> 4 {
        4 => ip_header.get(8).copied(),
        6 => ip_header.get(7).copied(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_loopback_connection_has_lost_nothing() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            save(&listener).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert_eq!(ttl(&accepted), Some(64), "{address}");
            assert_eq!(ttl(&accepted), None, "given once");
            drop(client);
        }
    }
}
