//! Loads the programs, fills in the addresses, attaches and pins them.

use std::{fs::File, net::TcpListener, path::Path};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, ProgramError,
        SchedClassifier, SocketFilter, links::FdLink,
    },
};
use aya_log::EbpfLogger;
use imds_guard_common::{addr, event::Counter};
use log::LevelFilter;
use tokio::io::unix::AsyncFd;

use super::{
    Exempt, KernelFlows, MapFill,
    control::{AliveUntil, Control},
    perimeter::{self, Perimeter},
    pins::{Pins, SHARED_MAPS},
    probe,
};
use crate::{config::Settings, failure::Failure, net::Link, record::Counts};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/imds-guard.bpf.o"));

const SOCK_ADDR_PROGRAMS: [&str; 4] = ["connect4", "connect6", "getpeername4", "getpeername6"];
const EGRESS_PROGRAM: &str = "backstop";
const LISTENER_PROGRAM: &str = "listener";
const SERVICE_PROGRAM: &str = "service";

/// Ring buffer of the kernel programs' log when it is switched off: the smallest there is.
const LOG_RING_OFF: u32 = 4096;

/// The programs. What is attached is pinned, and outlives this.
pub struct Kernel {
    ebpf: Ebpf,
    perimeter: Perimeter,
    logs: bool,
}

/// The maps that the rest of the guard uses.
pub struct Maps {
    /// Callers of redirected connections.
    pub flows: KernelFlows,
    /// The guard's own sockets.
    pub exempt: Exempt,
    /// What the programs counted.
    pub counters: Counters,
    /// What they are told to do.
    pub control: Control,
    /// Until when the daemon is taken for alive.
    pub alive_until: AliveUntil,
    /// What the layers report.
    pub packets: RingBuf<MapData>,
    /// How full those are that others can fill.
    pub fill: MapFill,
}

/// What the kernel programs counted.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Kernel {
    /// Loads the programs; nothing is attached yet. Without a listener for IPv6, connections to the
    /// IPv6 endpoint are refused in enforce mode, and left alone in audit mode. `netns_cookie` is that of
    /// the listeners' network namespace, where the kernel tells it.
    ///
    /// # Errors
    /// [`Failure::KernelFeature`] if the kernel lacks something; otherwise what the verifier said.
    pub fn load(
        settings: &Settings,
        ipv6: bool,
        netns_cookie: Option<u64>,
        pins: &Pins,
    ) -> Result<Self, Failure> {
        // Before 5.11 maps count against RLIMIT_MEMLOCK. Where that cannot be raised, loading says
        // so itself.
        let unlimited = libc::RLIM_INFINITY;
        let _best_effort = nix::sys::resource::setrlimit(
            nix::sys::resource::Resource::RLIMIT_MEMLOCK,
            unlimited,
            unlimited,
        );

        let (imds, listeners) = (settings.endpoints, settings.listeners);
        let imds_v4 = addr::word(*imds.v4.ip());
        let imds_v6 = addr::words((*imds.v6.ip()).into());
        let imds_port = network_order(imds.v4.port());
        let listener_v4 = addr::word(*listeners.v4.ip());
        let listener_v6 = if ipv6 {
            addr::words((*listeners.v6.ip()).into())
        } else {
            addr::UNSPECIFIED
        };
        let listener_port = network_order(listeners.v4.port());
        let own_netns = netns_cookie.unwrap_or_default();
        let log_level = kernel_level(settings.kernel_log);

        let mut loader = EbpfLoader::new();
        loader
            .override_global("IMDS_V4", &imds_v4, true)
            .override_global("IMDS_V6", &imds_v6, true)
            .override_global("IMDS_PORT", &imds_port, true)
            .override_global("LISTENER_V4", &listener_v4, true)
            .override_global("LISTENER_V6", &listener_v6, true)
            .override_global("LISTENER_PORT", &listener_port, true)
            .override_global("OWN_NETNS", &own_netns, true)
            .override_global(aya_log::LEVEL, &log_level, true);
        let logs = settings.kernel_log != LevelFilter::Off;
        if !logs {
            loader.map_max_entries("AYA_LOGS", LOG_RING_OFF);
        }
        for name in SHARED_MAPS {
            loader.map_pin_path(name, pins.map(name));
        }
        let ebpf = loader.load(OBJECT).map_err(diagnose)?;
        let mut kernel = Self {
            ebpf,
            perimeter: Perimeter::default(),
            logs,
        };
        kernel
            .load_programs()
            .map_err(|error| diagnose(error.into()))?;
        Ok(kernel)
    }

    fn load_programs(&mut self) -> Result<(), ProgramError> {
        for name in SOCK_ADDR_PROGRAMS {
            program::<CgroupSockAddr>(&mut self.ebpf, name)?.load()?;
        }
        program::<CgroupSkb>(&mut self.ebpf, EGRESS_PROGRAM)?.load()?;
        program::<SocketFilter>(&mut self.ebpf, LISTENER_PROGRAM)?.load()?;
        program::<SocketFilter>(&mut self.ebpf, SERVICE_PROGRAM)?.load()?;
        program::<SchedClassifier>(&mut self.ebpf, perimeter::PROGRAM)?.load()
    }

    /// Attaches the programs to a cgroup, in place of those of an earlier daemon; from now on its
    /// processes are redirected.
    ///
    /// # Errors
    /// The cgroup cannot be opened, another program there excludes ours, or links cannot be pinned.
    pub fn attach(&mut self, cgroup: &Path, pins: &Pins) -> Result<(), Failure> {
        let directory = File::open(cgroup)
            .map_err(|error| Failure::Cgroup(format!("{}: {error}", cgroup.display())))?;
        self.attach_all(&directory, pins)
            .with_context(|| format!("the programs cannot be attached to {}", cgroup.display()))?;
        Ok(())
    }

    fn attach_all(&mut self, cgroup: &File, pins: &Pins) -> anyhow::Result<()> {
        // The publisher first: a connection that is redirected must find its way.
        // A link takes no flags; it stands beside the programs of others all the same.
        let egress: &mut CgroupSkb = program(&mut self.ebpf, EGRESS_PROGRAM)?;
        let mode = CgroupAttachMode::Single;
        let id = egress.attach(cgroup, CgroupSkbAttachType::Egress, mode)?;
        pins.keep(EGRESS_PROGRAM, FdLink::try_from(egress.take_link(id)?)?)?;
        for name in SOCK_ADDR_PROGRAMS.into_iter().rev() {
            let program: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
            let id = program.attach(cgroup, mode)?;
            pins.keep(name, FdLink::try_from(program.take_link(id)?)?)?;
        }
        Ok(())
    }

    /// Lets only redirected connections be begun with a listener. The filter lives as long as the
    /// socket, in whatever process; that of a later daemon takes its place.
    ///
    /// # Errors
    /// The socket takes no filter.
    pub fn shield(&mut self, listener: &TcpListener) -> Result<(), Failure> {
        let filter: &mut SocketFilter =
            program(&mut self.ebpf, LISTENER_PROGRAM).context("the listener's filter")?;
        filter
            .attach(listener)
            .context("a listener takes no filter")?;
        Ok(())
    }

    /// Attaches the perimeter to uplinks that it is not attached to yet.
    ///
    /// # Errors
    /// The object lacks the program: it is not of this version.
    pub fn follow_uplinks(&mut self, uplinks: &[Link], pins: &Pins) -> Result<usize, Failure> {
        let program = program(&mut self.ebpf, perimeter::PROGRAM).context("the perimeter")?;
        self.perimeter.follow(program, uplinks, pins);
        Ok(self.perimeter.len())
    }

    /// Takes the maps out, for the rest of the guard.
    ///
    /// # Errors
    /// The object lacks one: it is not of this version.
    pub fn take_maps(&mut self) -> Result<Maps, Failure> {
        let filter: &mut SocketFilter =
            program(&mut self.ebpf, SERVICE_PROGRAM).context("the filter of upstream sockets")?;
        let filter = filter.fd().context("the filter of upstream sockets")?;
        let filter = filter
            .try_clone()
            .context("the filter of upstream sockets")?;
        let fill = MapFill::of(&self.ebpf)?;
        let mut take = |name| self.ebpf.take_map(name).ok_or_else(|| missing(name));
        let mut shared = |name| Ok::<_, Failure>(take(name)?);
        let flows = HashMap::try_from(shared("FLOWS")?).context("map FLOWS")?;
        let exempt = HashMap::try_from(shared("EXEMPT")?).context("map EXEMPT")?;
        let counters = PerCpuArray::try_from(shared("COUNTERS")?).context("map COUNTERS")?;
        let control = Array::try_from(shared("CONTROL")?).context("map CONTROL")?;
        let alive_until = Array::try_from(shared("ALIVE_UNTIL")?).context("map ALIVE_UNTIL")?;
        let packets = RingBuf::try_from(shared("PACKETS")?).context("map PACKETS")?;
        Ok(Maps {
            flows: KernelFlows::new(flows),
            exempt: Exempt::new(exempt, filter),
            counters: Counters(counters),
            control: Control(control),
            alive_until: AliveUntil(alive_until),
            packets,
            fill,
        })
    }

    /// Passes the kernel programs' messages on to `log`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The ring buffer cannot be watched.
    pub fn forward_log(&mut self) -> Result<(), Failure> {
        if !self.logs {
            return Ok(());
        }
        let logger = EbpfLogger::init(&mut self.ebpf).context("the kernel programs' log")?;
        // SAFETY: the logger owns its descriptor and gives out the same one for as long as it lives.
        let mut logger =
            unsafe { AsyncFd::register(logger) }.context("the kernel programs' log")?;
        tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(())
    }
}

/// A program of the object, as its type.
fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(ProgramError::UnexpectedProgramType)?
        .try_into()
}

impl Counters {
    /// Those of pinned programs.
    ///
    /// # Errors
    /// The map is not there.
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        let map = Map::PerCpuArray(MapData::from_pin(pins.map("COUNTERS"))?);
        Ok(Self(PerCpuArray::try_from(map)?))
    }

    /// The sums over all CPUs; a counter that cannot be read is 0.
    #[must_use]
    pub fn read(&self) -> Counts {
        let sum = |counter: Counter| {
            self.0
                .get(&(counter as u32), 0)
                .map_or(0, |values| values.iter().sum())
        };
        Counts {
            redirected: sum(Counter::Redirected),
            exempt: sum(Counter::Exempt),
            refused: sum(Counter::Refused),
            bypassed: sum(Counter::Bypassed),
            publish_failed: sum(Counter::PublishFailed),
            unattended_refused: sum(Counter::UnattendedRefused),
            unattended_bypassed: sum(Counter::UnattendedBypassed),
            packets_dropped: sum(Counter::PacketsDropped),
            packets_passed: sum(Counter::PacketsPassed),
        }
    }
}

/// A port as the context of a sock_addr program has it.
fn network_order(port: u16) -> u32 {
    port.to_be().into()
}

/// aya-log counts levels from 1 (error) to 5 (trace); 0 removes every message when the programs load.
fn kernel_level(level: LevelFilter) -> u8 {
    level as u8
}

fn missing(map: &str) -> anyhow::Error {
    anyhow!("the kernel object has no map {map}: it does not belong to this version")
}

/// Says what the kernel lacks, if anything, instead of what the loader stumbled over.
fn diagnose(error: EbpfError) -> Failure {
    let missing = probe::missing_features();
    if missing.is_empty() {
        Failure::Other(anyhow::Error::new(error).context("the kernel refused a program"))
    } else {
        Failure::KernelFeature {
            missing: missing.join(", "),
        }
    }
}
