//! `imds-guard doctor`.

mod reach;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;

use crate::{
    config::{IMDS_PORT, IMDS_V4, IMDS_V6, LISTENER_PORT, LISTENER_V4, LISTENER_V6, Pair},
    failure::Failure,
    kernel::{PINS, Pins, probe},
    record::to_json_pretty,
};

/// For `--help`.
pub const ABOUT: &str = "\
Checks whether this host has what imds-guard needs: kernel, BTF, BPF features, cgroup v2, \
capabilities, bpffs, and routes to the metadata addresses. Changes nothing and sends nothing.

With --from, checks instead whether the guard that is running here can be reached from another network \
namespace, such as a container's, by connecting to it. The guard records that as `connection_refused`.

Exit code 0 if imds-guard can run or be reached, 1 if not, 2 for a bad option or argument, 10 without \
the privileges for --from.";

/// Arguments of `imds-guard doctor`.
#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for machines
    #[arg(long)]
    json: bool,

    /// Where the kernel programs and maps are to be pinned
    #[arg(long, value_name = "PATH", default_value = PINS)]
    pins: PathBuf,

    /// Check whether the guard can be reached from the network namespace of a process, or from one that
    /// a file keeps, such as /run/netns/NAME. The process of a container is told by
    /// `docker inspect -f '{{.State.Pid}}' NAME` or `crictl inspect -o go-template --template
    /// '{{.info.pid}}' ID`
    #[arg(long, value_name = "PID|PATH")]
    from: Option<String>,

    /// The guard's own address, as for `imds-guard run`
    /// [default: 169.254.171.254:254 and [fd00:ec2::a9fe:abfe]:254]
    #[arg(long, value_name = "ADDRESS:PORT", requires = "from")]
    listen: Vec<SocketAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Works, but somebody should know.
    Note,
    Missing,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Serialize)]
struct Report {
    ready: bool,
    checks: Vec<Check>,
}

/// Checks what was asked for, and prints it.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (checks, verdicts) = match &arguments.from {
        Some(from) => {
            let listeners = Pair::new(LISTENER_V4, LISTENER_V6, LISTENER_PORT)
                .with(&arguments.listen, "--listen")?;
            let verdicts = [
                "imds-guard can be reached from there.",
                "imds-guard cannot be reached from there.",
            ];
            (reach::checks(from, listeners)?, verdicts)
        }
        None => {
            let verdicts = ["imds-guard can run here.", "imds-guard cannot run here."];
            (host(&arguments.pins), verdicts)
        }
    };
    let report = Report {
        ready: checks.iter().all(|check| check.status != Status::Missing),
        checks,
    };
    if arguments.json {
        let json = to_json_pretty(&report).map_err(anyhow::Error::from)?;
        println!("{json}");
    } else {
        print(&report);
        println!("\n{}", verdicts[usize::from(!report.ready)]);
    }
    Ok(ExitCode::from(u8::from(!report.ready)))
}

/// What this host has of what imds-guard needs.
fn host(pins: &Path) -> Vec<Check> {
    vec![
        capabilities(),
        kernel(),
        pid_namespace(),
        btf(),
        features(),
        cgroup(),
        bpffs(pins),
        route("route to 169.254.169.254", IMDS_V4.into()),
        route("route to fd00:ec2::254", IMDS_V6.into()),
    ]
}

fn print(report: &Report) {
    for check in &report.checks {
        let status = match check.status {
            Status::Ok => "OK",
            Status::Note => "note",
            Status::Missing => "MISSING",
        };
        println!("{status:<8}{:<26}{}", check.name, check.found);
        if let Some(advice) = &check.advice {
            println!("{:<8}{:<26}→ {advice}", "", "");
        }
    }
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn note(name: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self {
            name,
            status: Status::Note,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn missing(name: &'static str, found: impl Into<String>, advice: Option<&str>) -> Self {
        let advice = advice.map(Into::into);
        Self {
            name,
            status: Status::Missing,
            found: found.into(),
            advice,
        }
    }
}

fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    match probe::capabilities() {
        Ok(()) => Check::ok(
            NAME,
            probe::NEEDED_CAPABILITIES
                .map(|cap| cap.to_string())
                .join(", "),
        ),
        Err(failure) => Check::missing(NAME, failure.to_string(), None),
    }
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    match probe::kernel() {
        Ok(release) => Check::ok(NAME, release),
        Err(failure) => Check::missing(
            NAME,
            failure.to_string(),
            Some("boot a newer one: Amazon Linux 2 has 5.10, Amazon Linux 2023 has 6.1 and 6.12"),
        ),
    }
}

fn pid_namespace() -> Check {
    const NAME: &str = "pid namespace";
    match probe::pid_namespace() {
        Ok(()) => Check::ok(NAME, "the host's"),
        Err(failure) => Check::missing(NAME, failure.to_string(), None),
    }
}

fn btf() -> Check {
    const NAME: &str = "BTF";
    const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
    if Path::new(VMLINUX).exists() {
        Check::ok(NAME, VMLINUX)
    } else {
        Check::note(
            NAME,
            format!("{VMLINUX} is not there"),
            "imds-guard's programs do without the kernel's own types; other eBPF tools may not",
        )
    }
}

fn features() -> Check {
    const NAME: &str = "BPF features";
    if probe::capabilities().is_err() {
        return Check::note(
            NAME,
            "not checked",
            "run imds-guard doctor as root to check them",
        );
    }
    let missing = probe::missing_features();
    if missing.is_empty() {
        Check::ok(NAME, "programs, maps and helpers are all there")
    } else {
        Check::missing(
            NAME,
            missing.join(", "),
            Some("the kernel was built without them, or lockdown or seccomp forbids them"),
        )
    }
}

fn cgroup() -> Check {
    const NAME: &str = "cgroup v2";
    match probe::cgroup(None) {
        Ok(path) => Check::ok(NAME, path.display().to_string()),
        Err(failure) => Check::missing(NAME, failure.to_string(), None),
    }
}

fn bpffs(pins: &Path) -> Check {
    const NAME: &str = "bpffs";
    if Pins::can_be_at(pins) {
        Check::ok(NAME, format!("for {}", pins.display()))
    } else {
        Check::missing(
            NAME,
            format!(
                "none for {}, where the kernel programs are kept",
                pins.display()
            ),
            Some("mount it with `mount -t bpf bpf /sys/fs/bpf`, as systemd does, or use --pins"),
        )
    }
}

fn route(name: &'static str, to: IpAddr) -> Check {
    match way_to((to, IMDS_PORT).into()) {
        Ok(from) => Check::ok(
            name,
            match interface_with(from) {
                Some(interface) => format!("from {from} on {interface}"),
                None => format!("from {from}"),
            },
        ),
        Err(error) => Check::note(
            name,
            error.to_string(),
            "requests of that address family will be answered with 502; on EC2 check the route table, \
             and for IPv6 whether the instance's HttpProtocolIpv6 is enabled",
        ),
    }
}

/// Asks the kernel which way a packet would take, and returns the address it would come from.
/// Connecting a UDP socket sends nothing.
fn way_to(address: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip())
}

/// The interface that has an address.
fn interface_with(address: IpAddr) -> Option<String> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.into_iter().find_map(|interface| {
        let storage = interface.address?;
        let found = match address {
            IpAddr::V4(v4) => storage.as_sockaddr_in()?.ip() == v4,
            IpAddr::V6(v6) => storage.as_sockaddr_in6()?.ip() == v6,
        };
        found.then_some(interface.interface_name)
    })
}
