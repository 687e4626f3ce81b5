//! Notices that configuration files change.

use std::{
    future::pending,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    time::Duration,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use crate::config::drop_ins;

/// How long files are left alone after a change, as there may be more.
const SETTLE: Duration = Duration::from_millis(200);

/// Watches the directories that the configuration is in. A file is only noticed when whoever writes it
/// has closed it, or has moved it to its place.
pub struct FileWatch {
    inotify: Option<AsyncFd<Watches>>,
}

impl FileWatch {
    /// Must be called within a tokio runtime. Where files cannot be watched, they are read again on
    /// demand alone, and it says so.
    pub fn start(file: &Path) -> Self {
        let inotify = watch(file)
            .inspect_err(|error| {
                log::info!(
                    "changes of {} are read on SIGHUP and `imds-guard reload` alone: {error}",
                    file.display()
                );
            })
            .ok();
        Self { inotify }
    }

    /// Waits until something has changed, and no longer does.
    pub async fn changed(&mut self) {
        let Some(inotify) = &mut self.inotify else {
            return pending().await;
        };
        if read(inotify).await.is_err() {
            log::warn!("configuration files are not watched any more");
            self.inotify = None;
            return pending().await;
        }
        while let Ok(Ok(())) = tokio::time::timeout(SETTLE, read(inotify)).await {}
    }
}

struct Watches(Inotify);

impl AsFd for Watches {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Watches {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn watch(file: &Path) -> io::Result<AsyncFd<Watches>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(file.parent().unwrap_or(Path::new("/")), changes)?;
    if let Err(error) = inotify.add_watch(&drop_ins(file), changes) {
        log::debug!("{} is not watched: {error}", drop_ins(file).display());
    }
    // SAFETY: the descriptor is owned by what is registered, which gives no other one and closes it only
    // when it is dropped.
    unsafe { AsyncFd::register(Watches(inotify)) }.map_err(Into::into)
}

async fn read(inotify: &AsyncFd<Watches>) -> io::Result<()> {
    loop {
        let mut ready = inotify.readable().await?;
        match ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) {
            Ok(events) => return events.map(drop),
            Err(_would_block) => {}
        }
    }
}
