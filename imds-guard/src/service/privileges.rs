//! What the process may do, and no longer.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What is needed after the start: to read the maps (`bpf(2)` asks for it at every call where
/// `kernel.unprivileged_bpf_disabled` is set, before Linux 6.0), to read other processes'
/// executables, and to remove the listener's addresses at the end. Not `CAP_DAC_READ_SEARCH`: of programs that
/// only their owner can reach the guard knows nothing for certain, and in return nobody reads every file by it.
const KEPT: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_NET_ADMIN,
];

/// Gives up everything else, for good. Must be called before threads are started, as capabilities
/// belong to threads.
///
/// # Errors
/// The kernel refuses; it never does for capabilities that the process has.
pub fn reduce() -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT
        .into_iter()
        .filter(|cap| permitted.contains(cap))
        .collect();
    if let Err(error) = nix::sys::prctl::set_no_new_privs() {
        log::warn!("no_new_privs cannot be set: {error}");
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

/// Allows as many open files as the hard limit does: each client connection takes one, and one more
/// upstream. systemd's default is 1024.
pub fn raise_file_limit(connections: usize) {
    let needed = connections as u64 * 2 + 64;
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) if limit >= needed => {}
        Ok(limit) => log::warn!(
            "only {limit} files may be open, too few for {connections} connections: raise \
             LimitNOFILE= to {needed}, or lower --max-connections"
        ),
        Err(error) => log::warn!("the limit of open files cannot be raised: {error}"),
    }
}

/// Cookie of the network namespace a socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
/// The kernel is older.
pub fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the descriptor is borrowed and open, the option is a u64 of the given size.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}
