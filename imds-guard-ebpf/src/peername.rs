//! `getpeername(2)`: a redirected client sees the address that it asked for.
//!
//! Stateless: whoever has the listener as its peer is shown the metadata address, also the one who
//! connected to the listener itself, whom the guard does not serve.

use aya_ebpf::programs::SockAddrContext;
use imds_guard_common::addr;

use crate::{
    connect::{read_ip6, write_ip6},
    maps,
};

/// getpeername hooks can only go on; the kernel rejects programs that could return anything else.
const GO_ON: i32 = 1;

/// `getpeername(2)` on an `AF_INET` socket.
#[inline(always)]
pub fn v4(ctx: &SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; these fields are readable and writable.
    unsafe {
        if (*addr).user_port == maps::LISTENER_PORT.load()
            && (*addr).user_ip4 == maps::LISTENER_V4.load()
        {
            (*addr).user_ip4 = maps::IMDS_V4.load();
            (*addr).user_port = maps::IMDS_PORT.load();
        }
    }
    GO_ON
}

/// `getpeername(2)` on an `AF_INET6` socket.
#[inline(always)]
pub fn v6(ctx: &SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; this field is readable.
    if unsafe { (*addr).user_port } != maps::LISTENER_PORT.load() {
        return GO_ON;
    }
    let ip = read_ip6(addr);
    let asked_for = if ip == maps::LISTENER_V6.load() {
        maps::IMDS_V6.load()
    } else if ip == addr::mapped(maps::LISTENER_V4.load()) {
        addr::mapped(maps::IMDS_V4.load())
    } else {
        return GO_ON;
    };
    write_ip6(addr, &asked_for);
    // SAFETY: the context is valid; the field is writable.
    unsafe { (*addr).user_port = maps::IMDS_PORT.load() };
    GO_ON
}
