//! What the guard attends to beside requests: uplinks that come and go, and packets that were seen.

use imds_guard_common::packet::{self, Layer as SeenBy};
use nix::net::if_::if_indextoname;

use crate::{
    config::Uplinks,
    identify::Resolver,
    kernel::{Kernel, Pins, remove_filters},
    net::{Link, LinkWatch},
    policy::Verdict,
    record::{Endpoint, Layer, Packet},
};

/// Keeps the perimeter on the uplinks.
pub struct UplinkWatch {
    links: LinkWatch,
    uplinks: Uplinks,
}

impl UplinkWatch {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The interfaces cannot be watched.
    pub fn start(uplinks: &Uplinks) -> anyhow::Result<Self> {
        Ok(Self {
            links: LinkWatch::start()?,
            uplinks: uplinks.clone(),
        })
    }

    /// Waits until interfaces come or go.
    pub async fn changed(&mut self) {
        if let Err(error) = self.links.changed().await {
            log::warn!("{error:#}");
            match LinkWatch::start() {
                Ok(anew) => self.links = anew,
                Err(error) => {
                    log::error!("later uplinks are not guarded: {error:#}");
                    std::future::pending().await
                }
            }
        }
    }

    /// Removes the perimeter from all interfaces, where it does not go with its pins.
    pub async fn remove_filters(&self) {
        match self.links.links().await {
            Ok(links) => drop(remove_filters(&links)),
            Err(error) => log::warn!("the perimeter may stay behind: {error:#}"),
        }
    }

    /// Guards all uplinks that are there now. Returns their names.
    pub async fn follow(&self, kernel: &mut Kernel, pins: &Pins) -> Vec<String> {
        let all = match self.links.links().await {
            Ok(all) => all,
            Err(error) => {
                log::error!("{error:#}");
                return Vec::new();
            }
        };
        let uplinks: Vec<Link> = all
            .into_iter()
            .filter(|link| link.is_uplink(&self.uplinks))
            .collect();
        if let Err(error) = kernel.follow_uplinks(&uplinks, pins) {
            log::error!("{error}");
        }
        uplinks.into_iter().map(|link| link.name).collect()
    }
}

/// A packet as it is recorded.
pub fn describe(seen: &packet::Packet, resolver: &Resolver) -> Packet {
    let interface = |index| {
        if_indextoname(index).map_or_else(
            |_| format!("number {index}"),
            |name| name.to_string_lossy().into_owned(),
        )
    };
    let source = imds_guard_common::addr::address(seen.source);
    Packet {
        verdict: if seen.dropped == 1 {
            Verdict::Deny
        } else {
            Verdict::Audit
        },
        layer: if seen.layer == SeenBy::Perimeter as u32 {
            Layer::Perimeter
        } else {
            Layer::Backstop
        },
        protocol: protocol(seen.protocol),
        endpoint: if seen.ip_version == 4 {
            Endpoint::Ipv4
        } else {
            Endpoint::Ipv6
        },
        source: source.to_canonical(),
        source_port: (seen.source_port != 0).then_some(seen.source_port),
        ttl: seen.ttl,
        interface: interface(seen.interface),
        came_from: (seen.came_from != 0).then(|| interface(seen.came_from)),
        sender: (seen.cgroup_id != 0).then(|| resolver.sender(seen.cgroup_id, seen.uid)),
        unreported: seen.unreported,
    }
}

fn protocol(number: u8) -> String {
    match number {
        6 => "tcp".into(),
        17 => "udp".into(),
        33 => "dccp".into(),
        132 => "sctp".into(),
        136 => "udplite".into(),
        other => other.to_string(),
    }
}
