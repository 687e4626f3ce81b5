//! The listener's addresses, on an interface of the guard's own network namespace.

use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::LinkAttribute,
    },
};

use super::with_netlink;
use crate::{
    config::{Pair, Settings},
    failure::Failure,
};

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
        let mut addresses = Self {
            added: Vec::new(),
            link: settings.link.clone(),
        };
        let ipv6 = with_netlink(async |netlink| {
            let [v4, v6] = settings.listeners.both();
            addresses.add(&netlink, v4).await?;
            match addresses.add(&netlink, v6).await {
                Ok(()) => Ok(true),
                Err(Failure::Other(error)) => {
                    log::warn!("IPv6 is not served: {error:#}");
                    Ok(false)
                }
                Err(failure) => Err(failure),
            }
        })?;
        Ok((addresses, ipv6))
    }

    /// Takes on addresses that an earlier daemon has added and left: bit 0 for IPv4, bit 1 for IPv6.
    pub fn take_on(&mut self, listeners: Pair, bits: u32) {
        for (bit, address) in listeners.both().iter().enumerate() {
            if bits & (1 << bit) != 0 && !self.added.contains(&address.ip()) {
                self.added.push(address.ip());
            }
        }
    }

    /// Which addresses were added, as for [`Addresses::take_on`].
    #[must_use]
    pub fn bits(&self) -> u32 {
        self.added.iter().fold(0, |bits, address| {
            bits | if address.is_ipv4() { 1 } else { 2 }
        })
    }

    /// Leaves the addresses where they are.
    pub fn leave(mut self) {
        self.added.clear();
    }

    /// Those that an earlier daemon has added and left, to be removed. Returns them for a report, too.
    #[must_use]
    pub fn left_behind(link: &str, listeners: Pair, bits: u32) -> (Self, Vec<IpAddr>) {
        let mut addresses = Self {
            added: Vec::new(),
            link: link.to_owned(),
        };
        addresses.take_on(listeners, bits);
        let added = addresses.added.clone();
        (addresses, added)
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
            Ok::<_, Failure>(())
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
    let found = find(netlink, address)
        .await
        .context("the host's addresses cannot be listed")?;
    Ok(found.map(|found| found.header.index))
}

async fn remove(netlink: &Handle, address: IpAddr) -> anyhow::Result<()> {
    let found = find(netlink, address).await?;
    let found = found.context("it is gone already")?;
    netlink.address().del(found).execute().await?;
    Ok(())
}

async fn find(
    netlink: &Handle,
    address: IpAddr,
) -> Result<Option<AddressMessage>, rtnetlink::Error> {
    let mut found = netlink
        .address()
        .get()
        .set_address_filter(address)
        .execute();
    found.try_next().await
}
