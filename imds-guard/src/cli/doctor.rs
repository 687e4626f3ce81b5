//! `imds-guard doctor`.

use std::{
    net::{IpAddr, UdpSocket},
    path::Path,
    process::ExitCode,
};

use clap::Args;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use serde::Serialize;

use crate::{
    config::{IMDS_V4, IMDS_V6},
    kernel::probe,
};

/// For `--help`.
pub const ABOUT: &str = "\
Checks whether this host has what imds-guard needs: kernel, BTF, BPF features, cgroup v2, \
capabilities, bpffs, and routes to the metadata addresses. Changes nothing and sends nothing.

Exit code 0 if imds-guard can run, 1 if something that it needs is missing.";

/// Arguments of `imds-guard doctor`.
#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for machines
    #[arg(long)]
    json: bool,
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

/// Checks everything, and prints it.
pub fn main(arguments: &Arguments) -> ExitCode {
    let checks = vec![
        capabilities(),
        kernel(),
        pid_namespace(),
        btf(),
        features(),
        cgroup(),
        bpffs(),
        route(
            "route to 169.254.169.254",
            "0.0.0.0:0",
            &format!("{IMDS_V4}:80"),
        ),
        route(
            "route to fd00:ec2::254",
            "[::]:0",
            &format!("[{IMDS_V6}]:80"),
        ),
    ];
    let report = Report {
        ready: checks.iter().all(|check| check.status != Status::Missing),
        checks,
    };
    if arguments.json {
        match serde_json::to_string_pretty(&report) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("imds-guard: the report cannot be written: {error}"),
        }
    } else {
        print(&report);
    }
    if report.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
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
    println!();
    println!(
        "{}",
        if report.ready {
            "imds-guard can run here."
        } else {
            "imds-guard cannot run here."
        }
    );
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

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    const PATH: &str = "/sys/fs/bpf";
    if statfs(PATH).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
        Check::ok(NAME, PATH)
    } else {
        Check::note(
            NAME,
            format!("no bpffs on {PATH}"),
            "not needed yet; mount it with `mount -t bpf bpf /sys/fs/bpf`",
        )
    }
}

/// Asks the kernel which way a packet would take; connecting a UDP socket sends nothing.
fn route(name: &'static str, from: &str, to: &str) -> Check {
    let local = UdpSocket::bind(from)
        .and_then(|socket| socket.connect(to).map(|()| socket))
        .and_then(|socket| socket.local_addr());
    match local {
        Ok(local) => Check::ok(
            name,
            format!("from {}{}", local.ip(), interface_of(local.ip())),
        ),
        Err(error) => Check::note(
            name,
            error.to_string(),
            "requests of that address family will be answered with 502; on EC2 check the route table, \
             and for IPv6 whether the instance's HttpProtocolIpv6 is enabled",
        ),
    }
}

/// ` on NAME`, for the interface that has an address.
fn interface_of(address: IpAddr) -> String {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let name = interfaces.into_iter().find_map(|interface| {
        let storage = interface.address?;
        let found = match address {
            IpAddr::V4(v4) => storage.as_sockaddr_in()?.ip() == v4,
            IpAddr::V6(v6) => storage.as_sockaddr_in6()?.ip() == v6,
        };
        found.then_some(interface.interface_name)
    });
    name.map(|name| format!(" on {name}")).unwrap_or_default()
}
