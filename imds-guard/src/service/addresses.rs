//! The listener's addresses, on an interface of the guard's own network namespace.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, anyhow};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::LinkAttribute,
    },
};

use crate::{config::Settings, failure::Failure};

/// Addresses that were added. Dropping it removes them; not within a tokio runtime.
pub struct Addresses {
    added: Vec<IpAddr>,
    link: String,
}

impl Addresses {
    /// Adds the listener's addresses to the configured interface. One that is there already stays
    /// when the guard ends. The second value says whether IPv6 is served: not on hosts that have
    /// it switched off.
    ///
    /// # Errors
    /// [`Failure::AddressInUse`] if another interface has an address; no such interface.
    pub fn claim(settings: &Settings) -> Result<(Self, bool), Failure> {
        with_netlink(async |netlink| {
            let mut addresses = Self {
                added: Vec::new(),
                link: settings.link.clone(),
            };
            let [v4, v6] = settings.listeners.both();
            addresses.add(&netlink, v4).await?;
            let ipv6 = match addresses.add(&netlink, v6).await {
                Ok(()) => true,
                Err(Failure::Other(error)) => {
                    log::warn!("IPv6 is not served: {error:#}");
                    false
                }
                Err(failure) => {
                    addresses.remove(&netlink).await;
                    return Err(failure);
                }
            };
            Ok((addresses, ipv6))
        })
    }

    async fn add(&mut self, netlink: &Handle, address: SocketAddr) -> Result<(), Failure> {
        let index = index_of(netlink, &self.link).await?;
        match holder(netlink, address.ip()).await? {
            Some(holder) if holder == index => return Ok(()),
            Some(holder) => {
                let interface = name_of(netlink, holder).await;
                return Err(Failure::AddressInUse {
                    address,
                    interface,
                    link: self.link.clone(),
                });
            }
            None => {}
        }
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let mut request = netlink.address().add(index, address.ip(), whole);
        // Nobody else is asked whether they have it: it is usable at once, and never leaves the host.
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.execute().await.with_context(|| {
            format!(
                "{} cannot be added to interface {}",
                address.ip(),
                self.link
            )
        })?;
        self.added.push(address.ip());
        Ok(())
    }

    async fn remove(&self, netlink: &Handle) {
        for address in &self.added {
            if let Err(error) = remove(netlink, *address).await {
                log::warn!("{address} stays on {}: {error:#}", self.link);
            }
        }
    }
}

impl Drop for Addresses {
    /// Removes what was added, also when the guard does not get as far as serving.
    fn drop(&mut self) {
        if self.added.is_empty() {
            return;
        }
        let removed = with_netlink(async |netlink| {
            self.remove(&netlink).await;
            Ok(())
        });
        if let Err(failure) = removed {
            log::warn!("the listener's addresses stay on {}: {failure}", self.link);
        }
    }
}

async fn index_of(netlink: &Handle, link: &str) -> Result<u32, Failure> {
    let found = netlink
        .link()
        .get()
        .match_name(link.to_owned())
        .execute()
        .try_next()
        .await;
    match found {
        Ok(Some(link)) => Ok(link.header.index),
        _ => Err(Failure::Settings(format!(
            "--link {link}: there is no such interface"
        ))),
    }
}

async fn name_of(netlink: &Handle, index: u32) -> String {
    let link = netlink
        .link()
        .get()
        .match_index(index)
        .execute()
        .try_next()
        .await;
    let name = link.ok().flatten().and_then(|link| {
        link.attributes
            .into_iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
    });
    name.unwrap_or_else(|| format!("number {index}"))
}

/// The interface that has an address.
async fn holder(netlink: &Handle, address: IpAddr) -> Result<Option<u32>, Failure> {
    let found = netlink
        .address()
        .get()
        .set_address_filter(address)
        .execute()
        .try_next()
        .await;
    Ok(found
        .context("the host's addresses cannot be listed")?
        .map(|found| found.header.index))
}

async fn remove(netlink: &Handle, address: IpAddr) -> anyhow::Result<()> {
    let found = netlink
        .address()
        .get()
        .set_address_filter(address)
        .execute()
        .try_next()
        .await?;
    let found = found.ok_or_else(|| anyhow!("it is gone already"))?;
    netlink.address().del(found).execute().await?;
    Ok(())
}

/// Runs a conversation with the kernel on this thread, so that it keeps its network namespace and
/// leaves no thread behind.
fn with_netlink<T>(talk: impl AsyncFnOnce(Handle) -> Result<T, Failure>) -> Result<T, Failure> {
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
