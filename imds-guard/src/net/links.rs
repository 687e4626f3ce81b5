//! Interfaces, and which of them are uplinks.

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_route::link::{LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
};

use super::with_netlink;
use crate::config::Uplinks;

/// An interface of the guard's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a network card of the machine: not the loopback, and of no kind that is made by
    /// software. Everything those send leaves through one of these.
    pub is_physical: bool,
}

impl Link {
    /// Whether packets leave the host here.
    #[must_use]
    pub fn is_uplink(&self, uplinks: &Uplinks) -> bool {
        match uplinks {
            Uplinks::None => false,
            Uplinks::Physical => self.is_physical,
            Uplinks::Named(names) => names.contains(&self.name),
        }
    }

    fn of(message: LinkMessage) -> Option<Self> {
        let mut name = None;
        let mut has_kind = false;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(is) => name = Some(is),
                // One that belongs to a bridge or bond says so here, too, and is still a card.
                LinkAttribute::LinkInfo(info) => {
                    has_kind |= info.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
                }
                _ => {}
            }
        }
        Some(Self {
            index: message.header.index,
            name: name?,
            is_physical: message.header.link_layer_type == LinkLayerType::Ether && !has_kind,
        })
    }
}

/// All interfaces.
///
/// # Errors
/// The kernel does not list them.
pub async fn list(netlink: &Handle) -> anyhow::Result<Vec<Link>> {
    let messages: Vec<LinkMessage> = netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("the interfaces cannot be listed")?;
    Ok(messages.into_iter().filter_map(Link::of).collect())
}

/// As [`list`]. Not within a tokio runtime.
///
/// # Errors
/// The kernel does not list them.
pub fn list_now() -> anyhow::Result<Vec<Link>> {
    with_netlink(async |netlink| list(&netlink).await)
}

/// Tells when interfaces come and go.
pub struct LinkWatch {
    netlink: Handle,
    changes: Box<dyn futures_util::Stream<Item = ()> + Send + Unpin>,
}

impl LinkWatch {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel cannot be listened to.
    pub fn start() -> anyhow::Result<Self> {
        let (connection, netlink, messages) = new_multicast_connection(&[MulticastGroup::Link])
            .context("the interfaces cannot be watched")?;
        tokio::spawn(connection);
        Ok(Self {
            netlink,
            // Several changes that come at once are one.
            changes: Box::new(messages.ready_chunks(64).map(|_| ())),
        })
    }

    /// All interfaces as they are now.
    ///
    /// # Errors
    /// The kernel does not list them.
    pub async fn links(&self) -> anyhow::Result<Vec<Link>> {
        list(&self.netlink).await
    }

    /// Waits for the next change.
    ///
    /// # Errors
    /// The kernel has stopped telling; watch anew.
    pub async fn changed(&mut self) -> anyhow::Result<()> {
        self.changes
            .next()
            .await
            .context("the interfaces are not watched any more")
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::{InfoKind, InfoPortKind};

    use super::*;

    fn is_physical(info: &[LinkInfo]) -> bool {
        let mut message = LinkMessage::default();
        message.header.link_layer_type = LinkLayerType::Ether;
        message
            .attributes
            .extend([LinkAttribute::IfName("eth0".into())]);
        if !info.is_empty() {
            message
                .attributes
                .push(LinkAttribute::LinkInfo(info.to_vec()));
        }
        Link::of(message).unwrap().is_physical
    }

    #[test]
    fn a_card_stays_one_on_a_bridge() {
        assert!(is_physical(&[]));
        assert!(is_physical(&[LinkInfo::PortKind(InfoPortKind::Bridge)]));
        assert!(!is_physical(&[LinkInfo::Kind(InfoKind::Veth)]));
        assert!(!is_physical(&[
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::PortKind(InfoPortKind::Bridge),
        ]));
    }
}
