//! A throw-away EC2 host: three network namespaces, a fake metadata service and a few cgroups.
//!
//! ```text
//!   imds                            host                              container
//!  ┌─────────────────────────┐     ┌────────────────────────────┐    ┌──────────────────────┐
//!  │ lo  169.254.169.254     │     │ lo  (a guard's listener)   │    │                      │
//!  │     fd00:ec2::254       │     │                            │    │                      │
//!  │     FakeImds, port 80   │     │       forwards             │    │                      │
//!  │                   vpc0 ─┼─────┼─ eth0        ctr0 ─────────┼────┼─ eth0                │
//!  │          172.31.16.1/24 │     │  172.31.16.10/24           │    │  10.88.0.2/24        │
//!  │      2001:db8:16::1/64  │     │  2001:db8:16::10/64        │    │  2001:db8:88::2/64   │
//!  └─────────────────────────┘     │              10.88.0.1/24  │    │  default via host    │
//!                                  │        2001:db8:88::1/64   │    └──────────────────────┘
//!                                  └────────────────────────────┘
//!  cgroup imds-guard-lab-PID-N  ─┬─ guard  ─┬─ host  ─┬─ container  ─┬─ …
//! ```
//!
//! The host forwards for the container, and the fake service knows the way back, so that without a
//! guard a container really reaches the metadata service, one hop farther away than the host does.
//! A test that finds a way shut has therefore found the guard and not a gap in the topology.
//!
//! Nothing here has a name outside this process except the cgroup. The namespaces are anonymous: they
//! vanish with the last file descriptor and process in them. [`sweep`] removes the cgroups of labs
//! that were killed; every new lab does that first.

mod cgroup;
pub mod fake_imds;
mod guard;
mod host;
pub mod links;
mod mount;
mod netns;

pub use cgroup::{Cgroup, kill_all, sweep};
pub use fake_imds::{Config, Counters, FakeImds, HttpTokens, Seen, Settings};
pub use guard::Guard;
pub use host::{CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Lab, LabConfig, Place, Room};
pub use mount::Mount;
pub use netns::NetNs;
