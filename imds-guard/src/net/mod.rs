//! The host's interfaces, by rtnetlink: the listener's addresses, and the uplinks.

mod addresses;
mod links;

pub use addresses::Addresses;
pub use links::{Link, LinkWatch, list, list_now};

use anyhow::Context as _;
use rtnetlink::Handle;

/// Runs a conversation with the kernel on this thread, so that it keeps its network namespace and
/// leaves no thread behind. Not within a tokio runtime.
fn with_netlink<T, E: From<anyhow::Error>>(
    talk: impl AsyncFnOnce(Handle) -> Result<T, E>,
) -> Result<T, E> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("a runtime for netlink")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("netlink")?;
        tokio::spawn(connection);
        talk(handle).await
    })
}
