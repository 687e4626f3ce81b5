//! Whether the guard can be reached from another network namespace, and what usually is the matter.

use std::{
    io::{self, ErrorKind, Read as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use nix::errno::Errno;

use super::{Check, Status, interface_with, way_to};
use crate::{config::Pair, failure::Failure, lab::NetNs};

/// How long to wait for the guard: a lost SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(3);

/// What became of a connection to the guard's listener.
enum Outcome {
    /// It was made and closed at once, as the guard does with what was not redirected to it.
    Guard(IpAddr),
    /// It was made, and nothing happened.
    Silence,
    /// It was made, and somebody spoke.
    Stranger,
    NoRoute(io::Error),
    Refused,
    Dropped,
    Failed(io::Error),
}

/// Connects to the guard's listeners from within a namespace, and closes again.
pub fn checks(from: &str, listeners: Pair) -> Result<Vec<Check>, Failure> {
    let namespace = open(from)?;
    let cannot_enter = |error| cannot_enter(from, &error);
    namespace.run(|| ()).map_err(cannot_enter)?;
    let mut checks = Vec::new();
    for (name, address) in ["guard over IPv4", "guard over IPv6"]
        .into_iter()
        .zip(listeners.both())
    {
        // Otherwise it would be looked for outside of this host.
        checks.push(if interface_with(address.ip()).is_none() {
            Check::note(
                name,
                format!("{} is no address of this host", address.ip()),
                "imds-guard is not running here, or without this address family, or with another --listen",
            )
        } else {
            let outcome = namespace.run(|| connect(address));
            judge(name, address, outcome.map_err(cannot_enter)?)
        });
    }
    // One address family is enough, if the other one is just not there.
    if checks.iter().all(|check| check.status != Status::Ok) {
        for check in &mut checks {
            check.status = Status::Missing;
        }
    }
    Ok(checks)
}

/// The namespace of a process, or one that is kept by a file.
fn open(from: &str) -> Result<NetNs, Failure> {
    let is_pid = from.bytes().all(|byte| byte.is_ascii_digit());
    let path = if is_pid {
        PathBuf::from("/proc").join(from).join("ns/net")
    } else {
        PathBuf::from(from)
    };
    NetNs::open(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound if is_pid => {
            Failure::Settings(format!("--from {from}: there is no such process"))
        }
        _ => Failure::Settings(format!("--from {from}: {error}")),
    })
}

fn cannot_enter(from: &str, error: &io::Error) -> Failure {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => Failure::Capabilities {
            missing: "CAP_SYS_ADMIN".into(),
        },
        Some(Errno::EINVAL) => Failure::Settings(format!(
            "--from {from}: this is no network namespace; give a process id, or a file such as \
             /run/netns/NAME or /proc/PID/ns/net"
        )),
        _ => Failure::Settings(format!("--from {from}: {error}")),
    }
}

fn connect(address: SocketAddr) -> Outcome {
    let from = match way_to(address) {
        Ok(from) => from,
        Err(error) => return Outcome::NoRoute(error),
    };
    let connected = TcpStream::connect_timeout(&address, PATIENCE).and_then(|stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    });
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                ErrorKind::ConnectionRefused => Outcome::Refused,
                ErrorKind::TimedOut => Outcome::Dropped,
                _ => Outcome::Failed(error),
            };
        }
    };
    match stream.read(&mut [0]) {
        Ok(0) => Outcome::Guard(from),
        Ok(_) => Outcome::Stranger,
        Err(error) => match error.kind() {
            ErrorKind::ConnectionReset => Outcome::Guard(from),
            ErrorKind::WouldBlock => Outcome::Silence,
            _ => Outcome::Failed(error),
        },
    }
}

fn judge(name: &'static str, address: SocketAddr, outcome: Outcome) -> Check {
    let port = address.port();
    let missing = |found: String, advice: &str| Check::missing(name, found, Some(advice));
    match outcome {
        Outcome::Guard(from) => Check::ok(name, format!("{address} is reached from {from}")),
        Outcome::NoRoute(error) => Check::note(
            name,
            format!("no route to {}: {error}", address.ip()),
            "give this namespace a default route through the host, unless it is to be cut off (Docker's \
             --network none and --internal, a pod without a network): its processes are told at once that \
             the network is unreachable",
        ),
        // From the host itself it takes the same listener, but not the same chains and policies.
        Outcome::Refused => match connect(address) {
            Outcome::Guard(_) => missing(
                format!("{address} is refused, though not to the host itself"),
                &format!(
                    "a firewall rejects it: find the rule (`nft list ruleset`, `iptables -S INPUT`, the \
                     network policies of the CNI) and allow TCP to {address}"
                ),
            ),
            _ => missing(
                format!("{address} is refused: nobody listens there"),
                "imds-guard is not running: start it",
            ),
        },
        Outcome::Dropped => missing(
            format!("{address} does not answer within {PATIENCE:?}"),
            &format!(
                "a firewall drops it: look at the host's INPUT chain (`nft list ruleset`, `iptables -S \
                 INPUT`) and the network policies of the CNI, and allow TCP to {address}; or the host does \
                 not know the way back (`ip route get` with this namespace's address)"
            ),
        ),
        Outcome::Failed(error) => missing(
            format!("{address}: {error}"),
            &format!(
                "a firewall rejects it, or this namespace's gateway is gone: look at both ends' rules \
                 (`nft list ruleset`) and at `ip neigh` there, and allow TCP to {address}"
            ),
        ),
        Outcome::Silence => missing(
            format!("{address} takes connections, and does not serve them"),
            &format!("imds-guard hangs or is stopped: see its log and `ss -ltnp sport = :{port}`"),
        ),
        Outcome::Stranger => missing(
            format!("{address} is another program's"),
            &format!("find it with `ss -ltnp sport = :{port}`"),
        ),
    }
}
