//! How far what is sent over a connection travels.

use std::io;

use socket2::{Domain, SockRef};
use tokio::net::TcpStream;

/// Sets the TTL (IPv6: hop limit) of everything that is still to be sent over a connection. It is not
/// taken back after a token: what is lost on the way is sent again later.
///
/// # Errors
/// The kernel refuses; it never does for 1 to 255.
pub fn set(stream: &TcpStream, ttl: u8) -> io::Result<()> {
    let socket = SockRef::from(stream);
    match socket.domain()? {
        Domain::IPV6 => socket.set_unicast_hops_v6(ttl.into()),
        _ => socket.set_ttl_v4(ttl.into()),
    }
}
