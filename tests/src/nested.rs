//! A container within a container.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
};

use imds_guard::lab::{Lab, NetNs, Place, Room, links};

/// A namespace that a container made, in the container's cgroup and behind its network.
pub struct Nested {
    namespace: NetNs,
    /// The container around it.
    pub outer: Room,
}

impl Nested {
    /// Its networks, and the address of the container around it.
    pub const NETWORKS: [(&str, &str); 2] = [
        ("10.99.0.0/24", "10.88.1.2"),
        ("2001:db8:99::/64", "2001:db8:88:1::2"),
    ];

    /// One more container with a namespace in it, of which the host knows nothing.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        let outer = lab.add_container("outer").unwrap();
        let namespace = NetNs::new().unwrap();
        links::veth((outer.ns(), "nested0"), (&namespace, "eth0")).unwrap();
        for (near, far, prefix, all) in [
            ("10.99.0.1", "10.99.0.2", 24, "0.0.0.0"),
            ("2001:db8:99::1", "2001:db8:99::2", 64, "::"),
        ] {
            let near = near.parse().unwrap();
            links::add_address(outer.ns(), "nested0", near, prefix).unwrap();
            links::add_address(&namespace, "eth0", far.parse().unwrap(), prefix).unwrap();
            links::add_route(&namespace, all.parse().unwrap(), 0, near).unwrap();
        }
        for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            outer.ns().sysctl(name, "1").unwrap();
        }
        Self { namespace, outer }
    }

    /// Tells the host how to reach it.
    ///
    /// # Panics
    /// `ip` fails.
    pub fn show_the_way_back(&self, lab: &Lab) {
        for (network, gateway) in Self::NETWORKS {
            let mut ip = lab.command(Place::Host, "ip");
            let done = ip.args(["route", "add", network, "via", gateway]).status();
            assert!(done.is_ok_and(|status| status.success()), "{network}");
        }
    }

    /// A command that will run in it.
    pub fn command(&self, program: &str) -> Command {
        let (pid, fd) = (std::process::id(), self.namespace.as_fd().as_raw_fd());
        let mut command = self.outer.command("nsenter");
        command
            .arg(format!("--net=/proc/{pid}/fd/{fd}"))
            .arg(program);
        command
    }
}
