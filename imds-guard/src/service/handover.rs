//! From one daemon to the next: listening sockets that stay open in between, so that a client at
//! worst waits.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::FileTypeExt as _,
    },
};

use anyhow::Context as _;
use sd_notify::NotifyState;
use socket2::{SockRef, Socket};

use crate::{
    failure::Failure,
    kernel::{Charge, Pins},
};

/// Names our sockets in systemd's store of file descriptors.
const STORE: &str = "listener";

/// Listeners from systemd: of a socket unit, or stored by the daemon before.
///
/// # Errors
/// systemd's variables make no sense.
pub fn from_systemd() -> anyhow::Result<Vec<TcpListener>> {
    let passed = sd_notify::listen_fds().context("LISTEN_FDS")?;
    // SAFETY: systemd has opened these for us, and nobody else here knows of them.
    let passed = passed.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(passed.filter_map(listener).collect())
}

/// What a daemon that is still running hands over.
pub struct Legacy {
    /// Its process id.
    pub from: u32,
    /// Its listeners.
    pub listeners: Vec<TcpListener>,
    /// Its charge of the pins, which does not end with it any more.
    pub charge: Charge,
}

/// Takes copies of what a running daemon holds.
///
/// # Errors
/// The process is gone, is no daemon of ours, or does not let us.
pub fn from_process(pid: u32, pins: &Pins) -> anyhow::Result<Legacy> {
    let process = pidfd_open(pid).with_context(|| format!("process {pid} cannot be opened"))?;
    let theirs = fs::read_dir(format!("/proc/{pid}/fd"))
        .with_context(|| format!("the files of process {pid} cannot be listed"))?;
    let mut listeners = Vec::new();
    let mut charge = None;
    for file in theirs.flatten() {
        let Some(number) = file.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(kind) = fs::metadata(file.path()).map(|meta| meta.file_type()) else {
            continue;
        };
        if !kind.is_socket() && !kind.is_dir() {
            continue;
        }
        let copy = match pidfd_getfd(process.as_fd(), number) {
            // A client's connection that has ended meanwhile; listeners stay.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            copy => {
                copy.with_context(|| format!("process {pid} does not hand over its listeners"))?
            }
        };
        if kind.is_socket() {
            listeners.extend(listener(copy));
        } else {
            charge = charge.or(pins.share_charge(copy));
        }
    }
    let charge = charge.with_context(|| format!("process {pid} is not in charge of the pins"))?;
    Ok(Legacy {
        from: pid,
        listeners,
        charge,
    })
}

/// Has systemd keep the listeners for the next daemon. Returns whether it does.
pub fn store(listeners: &[TcpListener]) -> bool {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return false;
    }
    let sockets: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
    let state = [NotifyState::FdStore, NotifyState::FdName(STORE)];
    match sd_notify::notify_with_fds(&state, &sockets) {
        Ok(()) => true,
        Err(error) => {
            log::warn!("systemd does not keep the listeners: {error}");
            false
        }
    }
}

/// Tells systemd, if it has started us, that we serve, or stop.
pub fn tell_systemd(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("systemd cannot be told: {error}");
    }
}

/// The listener with an address, taken out of those that were handed over.
pub fn take(handed_over: &mut Vec<TcpListener>, address: SocketAddr) -> Option<TcpListener> {
    let at = handed_over
        .iter()
        .position(|listener| listener.local_addr().is_ok_and(|own| own == address))?;
    Some(handed_over.swap_remove(at))
}

/// # Errors
/// [`Failure::Settings`] if any are left over: they are not ours, or the configuration has changed.
pub fn none_left(handed_over: &[TcpListener]) -> Result<(), Failure> {
    match handed_over.first().map(TcpListener::local_addr) {
        Some(Ok(address)) => Err(Failure::Settings(format!(
            "systemd has passed a listener on {address}, which is not the guard's: correct \
             ListenStream= of the socket unit, or --listen"
        ))),
        _ => Ok(()),
    }
}

/// A listening TCP socket, or nothing. The one for metrics is not handed over, but shares its port.
fn listener(fd: OwnedFd) -> Option<TcpListener> {
    let socket = SockRef::from(&fd);
    let listens = socket.is_listener().unwrap_or(false);
    let is_shared = socket.reuse_port().unwrap_or(false);
    let is_ip = socket
        .local_addr()
        .is_ok_and(|own| own.as_socket().is_some());
    (listens && is_ip && !is_shared).then(|| TcpListener::from(Socket::from(fd)))
}

/// pidfd_open(2), Linux 5.3.
fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is checked before it is taken for a descriptor.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_getfd(2), Linux 5.6: needs CAP_SYS_PTRACE.
fn pidfd_getfd(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: as above.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
