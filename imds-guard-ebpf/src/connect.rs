//! `connect(2)`: match, let the guard's own upstream pass, remember the caller, rewrite.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{
            bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie,
            bpf_ktime_get_boot_ns, bpf_setsockopt,
        },
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::{debug, warn};
use imds_guard_common::{
    addr::{self, UNSPECIFIED, Words},
    event::Counter,
    flow::{Family, Origin},
};

use crate::maps;

const ALLOW: i32 = 1;
/// `connect(2)` fails with EPERM.
const REFUSE: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;

/// Whether a matched connection goes on, and if so, whether it was claimed for the guard.
enum Claim {
    Redirect,
    LeaveAlone,
    Refuse,
}

/// `connect(2)` on an `AF_INET` socket. Calls that are not ours leave after two compares.
#[inline(always)]
pub fn v4(ctx: &SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; these fields are readable in connect4.
    let (port, ip) = unsafe { ((*addr).user_port, (*addr).user_ip4) };
    if port != maps::IMDS_PORT.load() || ip != maps::IMDS_V4.load() {
        return ALLOW;
    }
    match claim(ctx, Family::Ipv4, true) {
        Claim::LeaveAlone => ALLOW,
        Claim::Refuse => REFUSE,
        Claim::Redirect => {
            // SAFETY: as above; both fields are writable in connect4.
            unsafe {
                (*addr).user_ip4 = maps::LISTENER_V4.load();
                (*addr).user_port = maps::LISTENER_PORT.load();
            }
            ALLOW
        }
    }
}

/// `connect(2)` on an `AF_INET6` socket, which can ask for an IPv4-mapped address, too.
#[inline(always)]
pub fn v6(ctx: &SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; this field is readable in connect6.
    if unsafe { (*addr).user_port } != maps::IMDS_PORT.load() {
        return ALLOW;
    }
    let ip = read_ip6(addr);
    let (family, listener) = if ip == maps::IMDS_V6.load() {
        (Family::Ipv6, maps::LISTENER_V6.load())
    } else if ip == addr::mapped(maps::IMDS_V4.load()) {
        (Family::Ipv4Mapped, addr::mapped(maps::LISTENER_V4.load()))
    } else {
        return ALLOW;
    };
    match claim(ctx, family, listener != UNSPECIFIED) {
        Claim::LeaveAlone => ALLOW,
        Claim::Refuse => REFUSE,
        Claim::Redirect => {
            write_ip6(addr, &listener);
            // SAFETY: the context is valid; the field is writable in connect6.
            unsafe { (*addr).user_port = maps::LISTENER_PORT.load() };
            ALLOW
        }
    }
}

#[inline(always)]
fn claim(ctx: &SockAddrContext, family: Family, served: bool) -> Claim {
    // SAFETY: plain reads of a valid context, and a helper that takes it.
    let (protocol, cookie) = unsafe {
        (
            (*ctx.sock_addr).protocol,
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    // Other protocols have no listener to be turned to; their packets are the backstop's.
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return Claim::LeaveAlone;
    }
    if maps::is_exempt(cookie) {
        maps::count(Counter::Exempt);
        return Claim::LeaveAlone;
    }
    let control = maps::control();
    if !maps::attended() {
        return if maps::stops(&control) {
            maps::count(Counter::UnattendedRefused);
            Claim::Refuse
        } else {
            maps::count(Counter::UnattendedBypassed);
            Claim::LeaveAlone
        };
    }
    let origin = caller(ctx, cookie, family);
    // A second connect on the same socket replaces the first.
    if !served
        || !can_reach(ctx, origin.netns_cookie)
        || maps::PENDING
            .insert(cookie, origin, BPF_ANY.into())
            .is_err()
    {
        return if maps::stops(&control) {
            maps::count(Counter::Refused);
            warn!(ctx, "pid {} refused: it cannot be served", origin.pid);
            Claim::Refuse
        } else {
            maps::count(Counter::Bypassed);
            warn!(
                ctx,
                "pid {} not redirected: it cannot be served", origin.pid
            );
            Claim::LeaveAlone
        };
    }
    maps::count(Counter::Redirected);
    debug!(ctx, "pid {} redirected, socket {}", origin.pid, cookie);
    Claim::Redirect
}

/// Whether the listener can be reached: not by a socket of the guard's own network namespace that is bound
/// to an interface, as the listener is on another one. Such a socket is freed, if its owner could do so
/// (from 5.7 on that takes CAP_NET_RAW).
#[inline(always)]
fn can_reach(ctx: &SockAddrContext, netns_cookie: u64) -> bool {
    // SAFETY: the context is valid while the program runs, and its socket is there.
    let is_bound = unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && (*sk).bound_dev_if != 0
    };
    if !is_bound || netns_cookie != maps::OWN_NETNS.load() {
        return true;
    }
    let mut none = [0_u8; 4];
    // SAFETY: the buffer has the length that is said.
    let failed = unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            none.as_mut_ptr().cast(),
            none.len() as i32,
        )
    };
    failed == 0
}

#[inline(always)]
fn caller(ctx: &SockAddrContext, cookie: u64, family: Family) -> Origin {
    let pid_tgid = bpf_get_current_pid_tgid();
    let uid_gid = bpf_get_current_uid_gid();
    // SAFETY: helpers without preconditions; the context is valid.
    let (cgroup_id, netns_cookie, connected_at) = unsafe {
        (
            bpf_get_current_cgroup_id(),
            bpf_get_netns_cookie(ctx.as_ptr()),
            bpf_ktime_get_boot_ns(),
        )
    };
    Origin {
        cookie,
        cgroup_id,
        netns_cookie,
        connected_at,
        pid: (pid_tgid >> 32) as u32,
        tid: pid_tgid as u32,
        uid: uid_gid as u32,
        gid: (uid_gid >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
        family: family as u32,
        sequence: 0,
    }
}

/// The address, word by word: the verifier refuses array copies from a context.
#[inline(always)]
pub fn read_ip6(addr: *const bpf_sock_addr) -> Words {
    // SAFETY: the context is valid, and user_ip6 is readable in connect6 and getpeername6.
    unsafe {
        [
            (&raw const (*addr).user_ip6[0]).read_volatile(),
            (&raw const (*addr).user_ip6[1]).read_volatile(),
            (&raw const (*addr).user_ip6[2]).read_volatile(),
            (&raw const (*addr).user_ip6[3]).read_volatile(),
        ]
    }
}

/// Writes the address, word by word.
#[inline(always)]
pub fn write_ip6(addr: *mut bpf_sock_addr, words: &Words) {
    // SAFETY: the context is valid, and user_ip6 is writable in connect6 and getpeername6.
    unsafe {
        (&raw mut (*addr).user_ip6[0]).write_volatile(words[0]);
        (&raw mut (*addr).user_ip6[1]).write_volatile(words[1]);
        (&raw mut (*addr).user_ip6[2]).write_volatile(words[2]);
        (&raw mut (*addr).user_ip6[3]).write_volatile(words[3]);
    }
}
