//! Binds the guard's listeners.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use super::syn;
use crate::{config::Limits, failure::Failure};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// Listens on an address, with the options that its connections inherit.
///
/// # Errors
/// [`Failure::PortBusy`] if another process listens there.
pub fn listen(address: SocketAddr, limits: &Limits) -> Result<TcpListener, Failure> {
    match bind(address, limits) {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(Failure::PortBusy { address })
        }
        Err(error) => Err(error).with_context(|| format!("cannot listen on {address}"))?,
    }
}

fn bind(address: SocketAddr, limits: &Limits) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    prepare(&socket, limits)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Sets the options that connections inherit.
fn prepare(socket: &Socket, limits: &Limits) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(limits.stalled_timeout))?;
    syn::prepare(socket)?;
    socket.set_nonblocking(true)
}

/// Makes a listener that somebody else has opened one of ours.
///
/// # Errors
/// It is none.
pub fn adopt(listener: TcpListener, limits: &Limits) -> io::Result<TcpListener> {
    let socket = Socket::from(listener);
    prepare(&socket, limits)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
