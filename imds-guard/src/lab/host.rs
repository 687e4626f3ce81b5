//! The lab: an EC2 host, its metadata service and its containers.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::fake_imds::{Config, FakeImds, Settings};
use super::{Cgroup, Mount, NetNs, cgroup, links};
use crate::config::{IMDS_V4, IMDS_V6};

/// The IPv4 address of the host's `eth0`.
pub const HOST_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 16, 10);
/// The IPv6 address of the host's `eth0`.
pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x16, 0, 0, 0, 0, 0x10);
/// The IPv4 address of the first container's `eth0`.
pub const CONTAINER_V4: Ipv4Addr = container_v4(0, 2);
/// The IPv6 address of the first container's `eth0`.
pub const CONTAINER_V6: Ipv6Addr = container_v6(0, 2);

/// The router of the host's subnet; behind it is the metadata service.
const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 16, 1);
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x16, 0, 0, 0, 0, 1);

/// An address in the network of container number `container`.
const fn container_v4(container: u8, address: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, container, address)
}

const fn container_v6(container: u8, address: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0x88, container as u16, 0, 0, 0, address)
}

/// How a lab is made.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// How the fake metadata service behaves at first.
    pub imds: Settings,
}

impl LabConfig {
    /// A lab with a metadata service in its default settings.
    pub fn new(cgroup_root: impl Into<PathBuf>) -> Self {
        Self {
            cgroup_root: cgroup_root.into(),
            imds: Settings::default(),
        }
    }
}

/// Where a process of the lab runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the host.
    Host,
    /// In the first container.
    Container,
    /// On the host, in a cgroup of its own.
    Guard,
}

/// A network namespace and a cgroup: where a process can be put. Dropping it kills what runs there.
#[derive(Debug)]
pub struct Room {
    // First, so that no process is left when the namespace is let go.
    cgroup: Cgroup,
    door: Arc<Door>,
}

/// What a child process needs to enter a room, made before the fork.
#[derive(Debug)]
struct Door {
    ns: Arc<NetNs>,
    /// `cgroup.procs`, open for writing.
    procs: File,
}

impl Room {
    fn new(ns: Arc<NetNs>, cgroup: Cgroup) -> Result<Self> {
        let procs = cgroup.path().join("cgroup.procs");
        let procs = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let door = Arc::new(Door { ns, procs });
        Ok(Self { cgroup, door })
    }

    /// The room's network namespace.
    #[must_use]
    pub fn ns(&self) -> &NetNs {
        &self.door.ns
    }

    /// The room's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A command that will run in this room.
    ///
    /// The process is killed when the room is dropped, whether or not it was waited for; and if this
    /// process is killed, when the next lab is made. (A parent-death signal would come too early: it
    /// is sent when the *thread* ends that spawned, and threads of tests and of tokio come and go.)
    ///
    /// The room is entered after [`Command::uid`] and the like have taken effect, and entering needs
    /// root: to run as somebody else, start through `setpriv`, or set the ids in a `pre_exec` of your
    /// own, which runs after this one.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let door = Arc::clone(&self.door);
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only `write` and `setns` are called, which are
        // async-signal-safe; nothing is allocated, and the descriptors were opened before.
        unsafe { command.pre_exec(move || door.enter()) };
        command
    }
}

impl Door {
    fn enter(&self) -> io::Result<()> {
        // 0 is the process that writes.
        nix::unistd::write(&self.procs, b"0")?;
        Ok(setns(&*self.ns, CloneFlags::CLONE_NEWNET)?)
    }
}

/// A throw-away EC2 host. See the [module](super) for a picture of it.
#[derive(Debug)]
pub struct Lab {
    // The order is that of the clean-up: processes and cgroups, the service, the namespaces.
    guard: Room,
    host: Room,
    container: Room,
    cgroup: Cgroup,
    imds: FakeImds,
    bpffs: Mount,
    files: Mount,
    containers: AtomicU8,
    imds_ns: NetNs,
    cgroup_root: PathBuf,
    outsiders: AtomicU8,
}

impl Lab {
    /// Makes the namespaces, starts the fake metadata service and makes the cgroups, after the
    /// leftovers of dead labs have been removed. Labs do not disturb each other.
    ///
    /// # Errors
    /// When anything of this is refused; it needs root.
    pub fn new(config: LabConfig) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);

        let root = config.cgroup_root.as_path();
        cgroup::sweep(root)
            .with_context(|| format!("cannot remove dead labs from {}", root.display()))?;
        let name = cgroup::lab_name(COUNTER.fetch_add(1, Ordering::Relaxed));
        let cgroup = make_cgroup(root, &name)?;

        let imds_ns = new_ns()?;
        let host_ns = Arc::new(new_ns()?);
        connect_imds(&imds_ns, &host_ns)?;
        let imds = FakeImds::start(
            &imds_ns,
            Config {
                settings: config.imds,
                ..Config::default()
            },
        )?;
        let containers = AtomicU8::new(0);
        let files = Mount::files().context("cannot make a file system")?;
        let etc = files.path().join("etc");
        fs::create_dir(&etc)
            .and_then(|()| fs::write(etc.join("config.toml"), ""))
            .context("cannot make a configuration")?;
        Ok(Self {
            guard: Room::new(Arc::clone(&host_ns), make_cgroup(cgroup.path(), "guard")?)?,
            host: Room::new(Arc::clone(&host_ns), make_cgroup(cgroup.path(), "host")?)?,
            container: make_container(
                &host_ns,
                &containers,
                make_cgroup(cgroup.path(), "container")?,
            )?,
            cgroup,
            imds,
            bpffs: Mount::bpf().context("cannot make a BPF file system")?,
            files,
            containers,
            imds_ns,
            cgroup_root: config.cgroup_root,
            outsiders: AtomicU8::new(0),
        })
    }

    /// The host's network namespace.
    #[must_use]
    pub fn host(&self) -> &NetNs {
        self.host.ns()
    }

    /// The first container's network namespace.
    #[must_use]
    pub fn container(&self) -> &NetNs {
        self.container.ns()
    }

    /// The network namespace of the metadata service, which is also the host's neighbour and router.
    #[must_use]
    pub fn imds_ns(&self) -> &NetNs {
        &self.imds_ns
    }

    /// The fake metadata service.
    #[must_use]
    pub fn imds(&self) -> &FakeImds {
        &self.imds
    }

    /// The cgroup that holds all others of the lab.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Where a guard in this lab pins its programs.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.bpffs.path().join("imds-guard")
    }

    /// Where a guard in this lab keeps its keys and its control socket.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.files.path().join("run")
    }

    /// A command that runs a guard on the lab's host, watching all of the lab.
    #[must_use]
    pub fn guard_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.command(Place::Guard, program);
        command.args(self.guard_arguments());
        command
    }

    /// What every guard in a lab is started with.
    #[must_use]
    pub fn guard_arguments(&self) -> Vec<OsString> {
        vec![
            "run".into(),
            "--cgroup".into(),
            self.cgroup.path().into(),
            "--pins".into(),
            self.pins().into(),
            "--run-dir".into(),
            self.run_dir().into(),
            "--uplink".into(),
            "eth0".into(),
            "--config".into(),
            self.config().into(),
            "--docker-socket".into(),
            self.docker_socket().into(),
            "--containerd-state".into(),
            self.files.path().join("containerd").into(),
            "--containers-storage".into(),
            self.files.path().join("containers").into(),
        ]
    }

    /// The configuration file of a guard in this lab, empty at first.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.files.path().join("etc/config.toml")
    }

    /// Where a guard in this lab looks for docker; nothing is there at first.
    #[must_use]
    pub fn docker_socket(&self) -> PathBuf {
        self.files.path().join("docker.sock")
    }

    /// The room behind a place.
    #[must_use]
    pub fn room(&self, place: Place) -> &Room {
        match place {
            Place::Host => &self.host,
            Place::Container => &self.container,
            Place::Guard => &self.guard,
        }
    }

    /// A command that will run at a place; see [`Room::command`].
    pub fn command(&self, place: Place, program: impl AsRef<OsStr>) -> Command {
        self.room(place).command(program)
    }

    /// One more container, with a network of its own; its cgroup lies beside the others.
    ///
    /// # Errors
    /// When the name is taken or the network cannot be made.
    pub fn add_container(&self, name: &str) -> Result<Room> {
        let cgroup = make_cgroup(self.cgroup.path(), name)?;
        make_container(&self.host.door.ns, &self.containers, cgroup)
    }

    /// One more cgroup at a place, beside the others, with the place's network.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_room(&self, place: Place, name: &str) -> Result<Room> {
        let cgroup = make_cgroup(self.cgroup.path(), name)?;
        Room::new(Arc::clone(&self.room(place).door.ns), cgroup)
    }

    /// A place's network for processes that a guard in this lab does not watch: their cgroup lies
    /// outside the lab's. Like a virtual machine, they are known by their packets alone.
    ///
    /// # Errors
    /// When the cgroup cannot be made.
    pub fn add_outsider(&self, place: Place) -> Result<Room> {
        self.outside(Arc::clone(&self.room(place).door.ns))
    }

    /// As [`Lab::add_outsider`], with an empty network of its own.
    ///
    /// # Errors
    /// When the cgroup or the network cannot be made.
    pub fn add_machine(&self) -> Result<Room> {
        self.outside(Arc::new(new_ns()?))
    }

    fn outside(&self, ns: Arc<NetNs>) -> Result<Room> {
        let number = self.outsiders.fetch_add(1, Ordering::Relaxed);
        let lab = self.cgroup.path().file_name().unwrap_or_default();
        let name = format!("{}-outside-{number}", lab.display());
        Room::new(ns, make_cgroup(&self.cgroup_root, &name)?)
    }
}

fn make_cgroup(parent: &Path, name: &str) -> Result<Cgroup> {
    Cgroup::create(parent, name)
        .with_context(|| format!("cannot make the cgroup {name} in {}", parent.display()))
}

fn new_ns() -> Result<NetNs> {
    NetNs::new().context("cannot make a network namespace")
}

/// Puts the metadata service's addresses into its namespace and connects it to the host.
fn connect_imds(imds: &NetNs, host: &NetNs) -> Result<()> {
    links::add_address(imds, "lo", IMDS_V4.into(), 32)?;
    links::add_address(imds, "lo", IMDS_V6.into(), 128)?;

    links::veth((host, "eth0"), (imds, "vpc0"))?;
    add_addresses(host, "eth0", HOST_V4, HOST_V6)?;
    add_addresses(imds, "vpc0", ROUTER_V4, ROUTER_V6)?;
    links::add_route(host, IMDS_V4.into(), 32, ROUTER_V4.into())?;
    links::add_route(host, IMDS_V6.into(), 128, ROUTER_V6.into())?;
    // The way back to the networks of all containers.
    links::add_route(imds, container_v4(0, 0).into(), 16, HOST_V4.into())?;
    links::add_route(imds, container_v6(0, 0).into(), 48, HOST_V6.into())?;

    for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        host.sysctl(name, "1")
            .with_context(|| format!("cannot set net/{name}"))?;
    }
    Ok(())
}

/// Makes the next container: a namespace behind the host, which is its default route.
fn make_container(host: &Arc<NetNs>, containers: &AtomicU8, cgroup: Cgroup) -> Result<Room> {
    let number = containers.fetch_add(1, Ordering::Relaxed);
    let container = new_ns()?;
    let outer = format!("ctr{number}");
    let (gateway_v4, gateway_v6) = (container_v4(number, 1), container_v6(number, 1));
    let (v4, v6) = (container_v4(number, 2), container_v6(number, 2));

    links::veth((host, &outer), (&container, "eth0"))?;
    add_addresses(host, &outer, gateway_v4, gateway_v6)?;
    add_addresses(&container, "eth0", v4, v6)?;
    links::add_route(
        &container,
        Ipv4Addr::UNSPECIFIED.into(),
        0,
        gateway_v4.into(),
    )?;
    links::add_route(
        &container,
        Ipv6Addr::UNSPECIFIED.into(),
        0,
        gateway_v6.into(),
    )?;
    Room::new(Arc::new(container), cgroup)
}

fn add_addresses(ns: &NetNs, link: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    links::add_address(ns, link, IpAddr::V4(v4), 24)?;
    links::add_address(ns, link, IpAddr::V6(v6), 64)
}
