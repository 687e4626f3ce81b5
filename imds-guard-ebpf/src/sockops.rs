//! Just before the SYN leaves, the source port is known: publish the caller under the 4-tuple.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops},
    helpers::generated::bpf_get_socket_cookie,
    programs::SockOpsContext,
};
use aya_log_ebpf::warn;
use imds_guard_common::{
    addr::{self, Words},
    event::Counter,
    flow::FlowKey,
};

use crate::maps;

const AF_INET: u32 = 2;
/// What a sock_ops program returns matters for other callbacks alone.
const DONE: u32 = 1;

/// Publishes the caller of a redirected connection. Everything else leaves after one compare, other
/// outgoing connections after two.
#[inline(always)]
pub fn publish(ctx: &SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid while the program runs; both fields are readable.
    let (op, remote_port) = unsafe { ((*ops).op, (*ops).remote_port) };
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB {
        return DONE;
    }
    let listener_port = u32::from(u16::from_be(maps::LISTENER_PORT.load() as u16));
    if u32::from_be(remote_port) != listener_port {
        return DONE;
    }
    let Some(key) = key(ops, listener_port) else {
        return DONE;
    };
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is this socket's own: its thread is still in connect(2), and a slot that is
    // evicted is not used again before the program ends (kernel: RCU).
    match unsafe { maps::PENDING.get(cookie) } {
        Some(origin) => {
            if maps::FLOWS.insert(key, origin, BPF_ANY.into()).is_err() {
                maps::count(Counter::PublishFailed);
                warn!(
                    ctx,
                    "pid {} not published: the listener will refuse it", origin.pid
                );
            }
            let _absent = maps::PENDING.remove(cookie);
        }
        // Somebody connects to the listener without being redirected: it must not find the entry
        // of an earlier connection from the same port.
        None => {
            let _absent = maps::FLOWS.remove(key);
        }
    }
    DONE
}

/// The 4-tuple, if it leads to the listener.
#[inline(always)]
fn key(ops: *const bpf_sock_ops, listener_port: u32) -> Option<FlowKey> {
    // SAFETY: the context is valid while the program runs; addresses are read word by word.
    let (family, client_port) = unsafe { ((*ops).family, (*ops).local_port) };
    let (client, listener) = if family == AF_INET {
        // SAFETY: as above.
        let (local, remote) = unsafe { ((*ops).local_ip4, (*ops).remote_ip4) };
        (addr::mapped(local), addr::mapped(remote))
    } else {
        // SAFETY: as above.
        unsafe {
            (
                words(&raw const (*ops).local_ip6),
                words(&raw const (*ops).remote_ip6),
            )
        }
    };
    let ours =
        listener == maps::LISTENER_V6.load() || listener == addr::mapped(maps::LISTENER_V4.load());
    ours.then_some(FlowKey {
        client,
        listener,
        client_port,
        listener_port,
    })
}

/// # Safety
/// `ip` must point to an address field of a valid context.
#[inline(always)]
unsafe fn words(ip: *const Words) -> Words {
    let ip: *const u32 = ip.cast();
    // SAFETY: four words, by the caller's promise.
    unsafe {
        [
            ip.read_volatile(),
            ip.add(1).read_volatile(),
            ip.add(2).read_volatile(),
            ip.add(3).read_volatile(),
        ]
    }
}
