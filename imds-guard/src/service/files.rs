//! Notices that configuration files change.

use std::{
    future::pending,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    time::Duration,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, timeout_at},
};

use crate::config::drop_ins;

/// How long files are left alone after a change, as there may be more.
const SETTLE: Duration = Duration::from_millis(200);

/// Watches the directories that the configuration is in. A file is only noticed when whoever writes it
/// has closed it, or has moved it to its place.
pub struct FileWatch {
    inotify: Option<AsyncFd<Watches>>,
    /// Something has changed, and is left alone until then.
    settled: Option<Instant>,
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
        Self {
            inotify,
            settled: None,
        }
    }

    /// Waits until something has changed, and no longer does. Nothing is lost when it is not waited for to
    /// the end: what was seen until then is told the next time.
    pub async fn changed(&mut self) {
        loop {
            let Some(inotify) = &self.inotify else {
                return pending().await;
            };
            let seen = match self.settled {
                Some(settled) => timeout_at(settled, read(inotify)).await,
                None => Ok(read(inotify).await),
            };
            match seen {
                Ok(Ok(())) => self.settled = Some(Instant::now() + SETTLE),
                Ok(Err(error)) => {
                    log::warn!("configuration files are not watched any more: {error}");
                    self.inotify = None;
                }
                Err(_elapsed) => {
                    self.settled = None;
                    return;
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;

    /// Whoever waits for other things, too, gives up waiting whenever one of them happens.
    #[tokio::test]
    async fn a_change_is_not_lost_when_something_else_happens_meanwhile() {
        let folder = std::env::temp_dir().join(format!("imds-guard-{}-watch", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("config.toml");
        let mut watch = FileWatch::start(&file);
        fs::write(&file, "").unwrap();
        // Long enough to see it, and not to the end.
        let told = timeout(SETTLE / 4, watch.changed()).await.is_ok()
            || timeout(SETTLE * 20, watch.changed()).await.is_ok();
        assert!(told);
        let again = timeout(SETTLE * 2, watch.changed()).await;
        assert!(again.is_err(), "it is told once");
        fs::remove_dir_all(&folder).unwrap();
    }
}
