//! Links, addresses and routes inside a [`NetNs`], by rtnetlink.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, State};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::time::{sleep, timeout};

use super::NetNs;

/// How long a link may take until it carries packets.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// Sets a link up.
///
/// # Errors
/// When there is no such link.
pub fn up(ns: &NetNs, link: &str) -> Result<()> {
    netlink(ns, async |handle| {
        let message = LinkUnspec::new_with_index(if_nametoindex(link)?).up();
        Ok(handle.link().set(message.build()).execute().await?)
    })
    .with_context(|| format!("cannot set link {link} up"))
}

/// Makes a veth pair with an end in each namespace, sets both ends up and waits until they carry
/// packets.
///
/// # Errors
/// When a name is taken or the kernel refuses.
pub fn veth(near: (&NetNs, &str), far: (&NetNs, &str)) -> Result<()> {
    /// The next free index. Left to itself the kernel gives the first links of two new namespaces the
    /// same one, does not see that they are a pair, and brings them up a second later.
    static INDEX: AtomicU32 = AtomicU32::new(1000);

    let index = INDEX.fetch_add(2, Ordering::Relaxed);
    let peer = LinkUnspec::new_with_name(far.1)
        .index(index + 1)
        .setns_by_fd(far.0.as_fd().as_raw_fd());
    let pair = LinkVeth::new(near.1, far.1)
        .index(index)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
    netlink(near.0, async |handle| {
        Ok(handle.link().add(pair.build()).execute().await?)
    })
    .with_context(|| format!("cannot make the veth pair {} and {}", near.1, far.1))?;
    for (ns, link) in [near, far] {
        up(ns, link)?;
    }
    for (ns, link) in [near, far] {
        wait_for_carrier(ns, link)?;
    }
    Ok(())
}

/// Adds an address to a link. IPv6 addresses skip duplicate address detection, so that they can be
/// used at once.
///
/// # Errors
/// When there is no such link, or it has the address already.
pub fn add_address(ns: &NetNs, link: &str, address: IpAddr, prefix: u8) -> Result<()> {
    netlink(ns, async |handle| {
        let index = if_nametoindex(link)?;
        let mut request = handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        Ok(request.execute().await?)
    })
    .with_context(|| format!("cannot add the address {address}/{prefix} to link {link}"))
}

/// Adds a route through a gateway. The prefix 0 makes it the default route.
///
/// # Errors
/// When the gateway is not on a network of the namespace.
pub fn add_route(ns: &NetNs, destination: IpAddr, prefix: u8, gateway: IpAddr) -> Result<()> {
    netlink(ns, async |handle| {
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, prefix)
            .and_then(|route| route.gateway(gateway))
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(handle.route().add(route.build()).execute().await?)
    })
    .with_context(|| format!("cannot route {destination}/{prefix} through {gateway}"))
}

/// Talks to the kernel's routing tables from inside the namespace.
fn netlink(ns: &NetNs, talk: impl AsyncFnOnce(&Handle) -> Result<()> + Send) -> Result<()> {
    ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            talk(&handle).await
        })
    })?
}

/// Waits until the link carries packets: one that was just set up drops them for a moment, and a lost
/// SYN costs a second.
fn wait_for_carrier(ns: &NetNs, link: &str) -> Result<()> {
    netlink(ns, async |handle| {
        let carrier = async {
            while !has_carrier(handle, link).await? {
                sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        };
        timeout(CARRIER_TIMEOUT, carrier).await?
    })
    .with_context(|| format!("link {link} carries no packets"))
}

/// Whether the link's state is *up*. The flag `IFF_RUNNING` would not do: it also stands for a state
/// that is not known yet.
async fn has_carrier(handle: &Handle, link: &str) -> Result<bool> {
    let index = if_nametoindex(link)?;
    let mut links = pin!(handle.link().get().match_index(index).execute());
    let link = links.try_next().await?;
    Ok(link.is_some_and(|link| {
        link.attributes
            .contains(&LinkAttribute::OperState(State::Up))
    }))
}
