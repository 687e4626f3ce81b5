//! File systems of the lab's own.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
    process, ptr,
};

/// A file system that is mounted nowhere (fsmount(2), Linux 5.2): it ends with this process, and all
/// that is in it, such as pinned programs, also when this process is killed.
#[derive(Debug)]
pub struct Mount {
    mount: OwnedFd,
}

impl Mount {
    /// Makes an empty BPF file system.
    ///
    /// # Errors
    /// The kernel refuses: this needs CAP_SYS_ADMIN.
    pub fn bpf() -> io::Result<Self> {
        Self::new(c"bpf")
    }

    /// Makes an empty file system for files.
    ///
    /// # Errors
    /// As [`Mount::bpf`].
    pub fn files() -> io::Result<Self> {
        Self::new(c"tmpfs")
    }

    fn new(kind: &CStr) -> io::Result<Self> {
        // The numbers are those of linux/mount.h.
        const FSOPEN_CLOEXEC: libc::c_uint = 1;
        const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
        const FSMOUNT_CLOEXEC: libc::c_uint = 1;
        // SAFETY: the name ends with NUL; results are checked before they are taken for descriptors.
        let context =
            owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
        // SAFETY: the descriptor is open; this command takes no key and no value.
        let created = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_CMD_CREATE,
                ptr::null::<u8>(),
                ptr::null::<u8>(),
                0,
            )
        };
        if created != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open.
        let mount = owned(unsafe {
            libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0)
        })?;
        Ok(Self { mount })
    }

    /// Where other processes find it while this one lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.mount.as_raw_fd()).into()
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just opened it for us.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
