//! Loads the programs, fills in the addresses, attaches them to a cgroup.

use std::{fs::File, path::Path};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, SockOps},
};
use aya_log::EbpfLogger;
use imds_guard_common::{
    addr,
    event::{self, Counter},
};
use log::LevelFilter;
use tokio::io::unix::AsyncFd;

use super::{Exempt, KernelFlows, probe};
use crate::{config::Settings, failure::Failure, policy::Mode, record::Stopped};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/imds-guard.bpf.o"));

const REDIRECT_PROGRAMS: [&str; 2] = ["connect4", "connect6"];
const SOCK_ADDR_PROGRAMS: [&str; 4] = ["connect4", "connect6", "getpeername4", "getpeername6"];
const SOCK_OPS_PROGRAM: &str = "publish_caller";

/// Ring buffer of the kernel programs' log when it is switched off: the smallest there is.
const LOG_RING_OFF: u32 = 4096;

/// The attached programs. They are detached when this is dropped.
pub struct Kernel {
    ebpf: Ebpf,
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
}

/// What the kernel programs counted.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Kernel {
    /// Loads the programs; nothing is attached yet. Without a listener for IPv6, connections to the
    /// IPv6 endpoint are refused in enforce mode, and left alone in audit mode.
    ///
    /// # Errors
    /// [`Failure::KernelFeature`] if the kernel lacks something; otherwise what the verifier said.
    pub fn load(settings: &Settings, ipv6: bool) -> Result<Self, Failure> {
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
        let log_level = kernel_level(settings.kernel_log);

        let mut loader = EbpfLoader::new();
        loader
            .override_global("IMDS_V4", &imds_v4, true)
            .override_global("IMDS_V6", &imds_v6, true)
            .override_global("IMDS_PORT", &imds_port, true)
            .override_global("LISTENER_V4", &listener_v4, true)
            .override_global("LISTENER_V6", &listener_v6, true)
            .override_global("LISTENER_PORT", &listener_port, true)
            .override_global(aya_log::LEVEL, &log_level, true);
        let logs = settings.kernel_log != LevelFilter::Off;
        if !logs {
            loader.map_max_entries("AYA_LOGS", LOG_RING_OFF);
        }
        let ebpf = loader.load(OBJECT).map_err(diagnose)?;
        let mut kernel = Self { ebpf, logs };
        kernel.set_mode(settings.policy.mode)?;
        kernel
            .load_programs()
            .map_err(|error| diagnose(error.into()))?;
        Ok(kernel)
    }

    fn load_programs(&mut self) -> Result<(), ProgramError> {
        for name in SOCK_ADDR_PROGRAMS {
            self.sock_addr(name)?.load()?;
        }
        self.sock_ops()?.load()
    }

    /// Attaches the programs to a cgroup; from now on its processes are redirected.
    ///
    /// # Errors
    /// The cgroup cannot be opened, or another program there excludes ours.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), Failure> {
        let directory = File::open(cgroup)
            .map_err(|error| Failure::Cgroup(format!("{}: {error}", cgroup.display())))?;
        self.attach_all(&directory)
            .with_context(|| format!("the programs cannot be attached to {}", cgroup.display()))?;
        Ok(())
    }

    fn attach_all(&mut self, cgroup: &File) -> Result<(), ProgramError> {
        // The publisher first: a connection that is redirected must find its way.
        // A link takes no flags; it stands beside the programs of others all the same.
        self.sock_ops()?.attach(cgroup, CgroupAttachMode::Single)?;
        for name in SOCK_ADDR_PROGRAMS.into_iter().rev() {
            self.sock_addr(name)?
                .attach(cgroup, CgroupAttachMode::Single)?;
        }
        Ok(())
    }

    /// From now on nobody is redirected any more; connections on their way still find theirs.
    pub fn stop_redirecting(&mut self) {
        for name in REDIRECT_PROGRAMS {
            if let Err(error) = self.sock_addr(name).and_then(CgroupSockAddr::unload) {
                log::warn!("{name} cannot be detached: {error}");
            }
        }
    }

    /// Tells the kernel programs what to do in doubt.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_mode(&mut self, mode: Mode) -> Result<(), Failure> {
        let map = self.ebpf.map_mut("MODE").ok_or_else(|| missing("MODE"))?;
        let mut map: Array<_, u32> = Array::try_from(map).context("map MODE")?;
        let mode = match mode {
            Mode::Audit => event::Mode::Audit,
            Mode::Enforce => event::Mode::Enforce,
        };
        map.set(0, mode as u32, 0)
            .context("the mode cannot be told to the kernel")?;
        Ok(())
    }

    /// Takes the maps out, for the rest of the guard.
    ///
    /// # Errors
    /// The object lacks one: it is not of this version.
    pub fn take_maps(&mut self) -> Result<Maps, Failure> {
        let mut take = |name| self.ebpf.take_map(name).ok_or_else(|| missing(name));
        let (flows, exempt, counters) = (take("FLOWS")?, take("EXEMPT")?, take("COUNTERS")?);
        Ok(Maps {
            flows: KernelFlows::new(HashMap::try_from(flows).context("map FLOWS")?),
            exempt: Exempt::new(HashMap::try_from(exempt).context("map EXEMPT")?),
            counters: Counters(PerCpuArray::try_from(counters).context("map COUNTERS")?),
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

    fn sock_addr(&mut self, name: &str) -> Result<&mut CgroupSockAddr, ProgramError> {
        self.ebpf
            .program_mut(name)
            .ok_or(ProgramError::UnexpectedProgramType)?
            .try_into()
    }

    fn sock_ops(&mut self) -> Result<&mut SockOps, ProgramError> {
        self.ebpf
            .program_mut(SOCK_OPS_PROGRAM)
            .ok_or(ProgramError::UnexpectedProgramType)?
            .try_into()
    }
}

impl Counters {
    /// The sums over all CPUs; a counter that cannot be read is 0.
    #[must_use]
    pub fn read(&self) -> Stopped {
        let sum = |counter: Counter| {
            self.0
                .get(&(counter as u32), 0)
                .map_or(0, |values| values.iter().sum())
        };
        Stopped {
            redirected: sum(Counter::Redirected),
            exempt: sum(Counter::Exempt),
            refused: sum(Counter::Refused),
            bypassed: sum(Counter::Bypassed),
            publish_failed: sum(Counter::PublishFailed),
            events_lost: 0,
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
