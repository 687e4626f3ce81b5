//! imds-guard's kernel programs: entry points only.
//!
//! `connect*` turns connections for a metadata endpoint to the guard's listener, `egress` tells the
//! listener who made them and stops what went around, `perimeter` stops what never passed `egress`,
//! `listener` keeps made-up connections from the guard, `service` reads the instance's hop limit,
//! `getpeername*` shows the client the address it asked for.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    reason = "the entry points are documented in their modules"
)]

mod connect;
mod egress;
mod listener;
mod maps;
mod packet;
mod peername;
mod perimeter;
mod service;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, classifier, socket_filter},
    programs::{SkBuffContext, SockAddrContext, TcContext},
};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::v4(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::v6(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::v4(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::v6(&ctx)
}

#[cgroup_skb(egress)]
pub fn backstop(ctx: SkBuffContext) -> i32 {
    egress::egress(&ctx)
}

#[socket_filter]
pub fn listener(ctx: SkBuffContext) -> i64 {
    listener::filter(&ctx)
}

#[socket_filter]
pub fn service(ctx: SkBuffContext) -> i64 {
    service::filter(&ctx)
}

#[classifier]
pub fn imds_perimeter(ctx: TcContext) -> i32 {
    perimeter::egress(&ctx)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The licence the kernel is told: helpers marked GPL-only need one that is compatible.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
