//! What the guard costs, measured in one run beside the same client going straight to the service
//! and through nginx and haproxy as plain reverse proxies: `cargo xtask bench`.
//!
//! Everything happens in a lab's namespaces, is bounded, and stops by itself.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use imds_guard::{
    kernel::probe,
    lab::{CONTAINER_V4, Guard, Lab, LabConfig, Place, Room},
};
use imds_guard_tests::servers::Server;

const SERVICE: &str = "http://169.254.169.254";
const NGINX: &str = "http://127.0.0.1:8080";
const HAPROXY: &str = "http://127.0.0.1:8081";
const PATH: &str = "/latest/meta-data/instance-id";

/// How long each load lasts.
const DURATION: &str = "4s";
/// Over how many connections a load comes: one to see what is added, more to see where it ends.
const CONNECTIONS: [u32; 2] = [1, 16];
/// Connects of each kind in the measurement of the hooks.
const CONNECTS: u32 = 50_000;
/// Clients in the measurement of memory: as many as one caller may be.
const CLIENTS: usize = 256;
/// How long each stream lasts.
const STREAM: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => bench(),
        // What runs inside the lab, where the hooks are attached.
        ["connects"] => connects(),
        ["clients"] => clients(),
        ["sink"] => sink(),
        ["stream", to] => stream(to),
        _ => bail!("bench takes no arguments"),
    }
}

fn bench() -> Result<()> {
    let lab = Lab::new(LabConfig::new(probe::cgroup2_mount()?))?;
    let room = lab.room(Place::Host);
    let guard_program = env::current_exe()?.with_file_name("guard-under-test");
    ensure!(
        guard_program.exists(),
        "{} is not built",
        guard_program.display()
    );
    let token = token(room)?;
    let proxies = proxies(&lab)?;

    println!("connects that are not ours, {CONNECTS} each (nanoseconds)");
    println!("{:<22}{:>12}{:>22}", "", "UDP connect", "TCP connect+close");
    let none = measure_connects("without guard", room)?;
    let guard = start(&lab, &guard_program)?;
    let with = measure_connects("with guard", room)?;
    println!(
        "{:<22}{:>12}{:>22}",
        "difference",
        with.0 - none.0,
        with.1 - none.1
    );
    hooks(room)?;
    memory(room, &guard)?;
    guard.stop()?;
    streams(&lab, &guard_program)?;

    println!("\nv2 GET of the instance id, {DURATION} each");
    println!(
        "{:<50}{:>12}{:>12}{:>12}{:>12}",
        "", "requests/s", "p50", "p99", "packets"
    );
    for connections in CONNECTIONS {
        for header in [None, Some("Connection: close")] {
            let load = Load {
                room,
                token: &token,
                connections,
                header,
            };
            load.run("straight", SERVICE)?;
            load.run("nginx", NGINX)?;
            load.run("haproxy", HAPROXY)?;
            let guard = start(&lab, &guard_program)?;
            // As clients have it: sealed, and good for this guard's successors.
            let token = &self::token(room)?;
            let load = Load { token, ..load };
            load.run("imds-guard", SERVICE)?;
            guard.stop()?;
        }
    }
    drop(proxies);
    Ok(())
}

/// A guard that leaves nothing in the way of the next measurement. Towards the container, too, its
/// perimeter stands: there it can be measured with traffic that does not end at once.
fn start(lab: &Lab, program: &Path) -> Result<Guard> {
    let arguments = [
        "--mode",
        "enforce",
        "--on-stop",
        "detach",
        "--uplink",
        "ctr0",
    ];
    Guard::start(lab, program, arguments)
}

/// Bulk data and small packets, over the loopback (backstop) and to the container (perimeter, too).
fn streams(lab: &Lab, guard_program: &Path) -> Result<()> {
    println!("\none TCP stream, and UDP datagrams of 100 bytes, {STREAM:?} each");
    println!("{:<34}{:>12}{:>18}", "", "Gbit/s", "ns a datagram");
    let container = CONTAINER_V4.to_string();
    let ways = [
        ("loopback", Place::Host, "127.0.0.1"),
        ("to the container", Place::Container, container.as_str()),
    ];
    for (way, place, address) in ways {
        measure_stream(&format!("{way}, without guard"), lab, place, address)?;
        let guard = start(lab, guard_program)?;
        measure_stream(&format!("{way}, with guard"), lab, place, address)?;
        let counting = enable_stats(Stats::RunTime).context("bpf_stats cannot be switched on")?;
        let before = runs()?;
        run_stream(lab, place, address)?;
        let after = runs()?;
        drop(counting);
        print_runs(before, after);
        guard.stop()?;
    }
    Ok(())
}

fn measure_stream(name: &str, lab: &Lab, place: Place, address: &str) -> Result<()> {
    let (rate, each) = run_stream(lab, place, address)?;
    println!("{name:<34}{rate:>12.1}{each:>18}");
    Ok(())
}

fn run_stream(lab: &Lab, place: Place, address: &str) -> Result<(f64, u64)> {
    let mut sink = lab
        .command(place, env::current_exe()?)
        .arg("sink")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = String::new();
    BufReader::new(sink.stdout.take().context("no output")?).read_line(&mut ready)?;
    let mut source = lab.command(Place::Host, env::current_exe()?);
    let text = output(source.args(["stream", address]))?;
    sink.wait()?;
    let mut words = text.split_whitespace();
    let mut word = || words.next().context("no number");
    Ok((word()?.parse()?, word()?.parse()?))
}

fn token(room: &Room) -> Result<String> {
    let mut curl = room.command("curl");
    curl.args(["--silent", "--fail", "--request", "PUT"]);
    curl.args(["--header", "X-aws-ec2-metadata-token-ttl-seconds: 21600"]);
    output(curl.arg(format!("{SERVICE}/latest/api/token")))
}

fn measure_connects(name: &str, room: &Room) -> Result<(i64, i64)> {
    let text = output(room.command(env::current_exe()?).arg("connects"))?;
    let numbers: Vec<i64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [udp, tcp] = numbers[..] else {
        bail!("unexpected: {text}")
    };
    println!("{name:<22}{udp:>12}{tcp:>22}");
    Ok((udp, tcp))
}

/// Time of each program's runs, as the kernel itself counts it (`bpf_stats`, which adds some 65 ns
/// to each run). Programs of this run's guard are the youngest of their name.
fn hooks(room: &Room) -> Result<()> {
    let counting = enable_stats(Stats::RunTime).context("bpf_stats cannot be switched on")?;
    let before = runs()?;
    output(room.command(env::current_exe()?).arg("connects"))?;
    let after = runs()?;
    drop(counting);
    println!("\nbpf_stats of the same connects, all of which leave early");
    print_runs(before, after);
    Ok(())
}

fn print_runs(before: Vec<(String, u64, Duration)>, after: Vec<(String, u64, Duration)>) {
    println!("{:<22}{:>12}{:>22}", "program", "runs", "ns each");
    for ((name, count_before, time_before), (_, count, time)) in before.into_iter().zip(after) {
        let (count, time) = (count - count_before, time - time_before);
        if count > 0 {
            println!(
                "{name:<22}{count:>12}{:>22.1}",
                time.as_nanos() as f64 / count as f64
            );
        }
    }
}

fn runs() -> Result<Vec<(String, u64, Duration)>> {
    let mut runs: Vec<(u32, String, u64, Duration)> = Vec::new();
    for program in loaded_programs() {
        let program = program?;
        let name = program.name_as_str().unwrap_or_default().to_owned();
        if ["connect4", "backstop", "imds_perimeter"].contains(&name.as_str()) {
            runs.retain(|(_, other, ..)| *other != name);
            runs.push((program.id(), name, program.run_count(), program.run_time()));
        }
    }
    runs.sort();
    Ok(runs
        .into_iter()
        .map(|(_, name, count, time)| (name, count, time))
        .collect())
}

fn memory(room: &Room, guard: &Guard) -> Result<()> {
    println!("\nresident memory of the daemon (KiB)");
    println!("{:<34}{:>12}", "idle", resident(guard)?);
    let mut clients = room
        .command(env::current_exe()?)
        .arg("clients")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut served = String::new();
    BufReader::new(clients.stdout.take().context("no output")?).read_line(&mut served)?;
    println!(
        "{:<34}{:>12}",
        format!("with {} connections", served.trim()),
        resident(guard)?
    );
    drop(clients.stdin.take());
    clients.wait()?;
    Ok(())
}

fn resident(guard: &Guard) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", guard.pid()))?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .context("no VmRSS")?;
    line.split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse().ok())
        .context("no number")
}

/// Requests as fast as they are answered, by wrk.
struct Load<'a> {
    room: &'a Room,
    token: &'a str,
    connections: u32,
    header: Option<&'a str>,
}

impl Load<'_> {
    fn run(&self, name: &str, to: &str) -> Result<()> {
        let mut wrk = self.room.command("wrk");
        wrk.args([
            "--duration",
            DURATION,
            "--threads=1",
            "--latency",
            "--connections",
        ]);
        wrk.arg(self.connections.to_string());
        wrk.arg("--header")
            .arg(format!("X-aws-ec2-metadata-token: {}", self.token));
        if let Some(header) = self.header {
            wrk.args(["--header", header]);
        }
        let before = packets(self.room)?;
        let text = output(wrk.arg(format!("{to}{PATH}")))?;
        let sent = packets(self.room)? - before;
        ensure!(!text.contains("Non-2xx"), "{name}: {text}");
        let value = |label: &str| {
            let line = text
                .lines()
                .find(|line| line.trim_start().starts_with(label));
            line.and_then(|line| line.split_whitespace().last())
                .unwrap_or("?")
                .to_owned()
        };
        let how = if self.header.is_some() {
            "a new connection each"
        } else {
            "kept alive"
        };
        println!(
            "{:<50}{:>12}{:>12}{:>12}{:>12.2}",
            format!("{name}, {} at a time, {how}", self.connections),
            value("Requests/sec:"),
            value("50%"),
            value("99%"),
            sent as f64 / requests(&text)?
        );
        Ok(())
    }
}

/// How many requests wrk has made.
fn requests(text: &str) -> Result<f64> {
    let line = text.lines().find(|line| line.contains(" requests in "));
    let count = line.and_then(|line| line.split_whitespace().next());
    count
        .context("no number of requests")?
        .parse()
        .context("no number")
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{program} cannot be run"))?;
    ensure!(
        output.status.success(),
        "{program} ended with {}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// nginx and haproxy as plain reverse proxies with kept-alive upstream connections, in cgroups of their
/// own, so that what they do to their upstream is not counted with the rest.
fn proxies(lab: &Lab) -> Result<[Server; 2]> {
    let nginx = "upstream imds { server 169.254.169.254:80; keepalive 32; }\n\
                 server {\n\
                   listen 127.0.0.1:8080;\n\
                   location / { proxy_pass http://imds; proxy_http_version 1.1;\n\
                                proxy_set_header Connection \"\"; }\n\
                 }";
    let haproxy = "global\n  nbthread 2\n\
                   defaults\n  mode http\n  timeout connect 5s\n  timeout client 30s\n\
                   \x20 timeout server 30s\n  http-reuse always\n\
                   frontend front\n  bind 127.0.0.1:8081\n  default_backend imds\n\
                   backend imds\n  server imds 169.254.169.254:80\n";
    Ok([
        Server::nginx(lab.add_room(Place::Host, "nginx")?, nginx)?,
        Server::haproxy(lab.add_room(Place::Host, "haproxy")?, haproxy)?,
    ])
}

/// Packets that the host has sent to the service.
fn packets(room: &Room) -> Result<u64> {
    let text = output(
        room.command("ip")
            .args(["-s", "-j", "link", "show", "eth0"]),
    )?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let sent = &links[0]["stats64"]["tx"]["packets"];
    sent.as_u64().context("no count of packets")
}

/// Connects to this namespace's own loopback, and prints the mean time of each kind.
fn connects() -> Result<()> {
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    let begun = Instant::now();
    for _ in 0..CONNECTS {
        udp.connect("127.0.0.1:9")?;
    }
    let udp_time = begun.elapsed() / CONNECTS;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let begun = Instant::now();
    for _ in 0..CONNECTS {
        // The side that connects is closed last, so that its port is not held back (TIME_WAIT is
        // with the accepted side).
        let client = TcpStream::connect(address)?;
        drop(listener.accept()?);
        drop(client);
    }
    let tcp_time = begun.elapsed() / CONNECTS;
    println!("{} {}", udp_time.as_nanos(), tcp_time.as_nanos());
    Ok(())
}

/// Takes one TCP stream to its end; datagrams are thrown away.
fn sink() -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:5201")?;
    let _datagrams = UdpSocket::bind("0.0.0.0:5201")?;
    println!("ready");
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0; 1 << 20];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Sends datagrams, then a TCP stream. Prints the stream's rate and the time of a datagram.
fn stream(to: &str) -> Result<()> {
    let to = format!("{to}:5201");
    let datagrams = UdpSocket::bind("0.0.0.0:0")?;
    datagrams.connect(&to)?;
    let mut count = 0;
    let begun = Instant::now();
    while begun.elapsed() < STREAM {
        for _ in 0..100 {
            let _dropped = datagrams.send(&[0; 100]);
        }
        count += 100;
    }
    let each = begun.elapsed().as_nanos() / count;
    let mut stream = TcpStream::connect(&to)?;
    let buffer = vec![0; 128 * 1024];
    let mut bytes = 0;
    let begun = Instant::now();
    while begun.elapsed() < STREAM {
        stream.write_all(&buffer)?;
        bytes += buffer.len();
    }
    let rate = bytes as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e9;
    println!("{rate} {each}");
    Ok(())
}

/// Holds connections to the guard open until standard input ends.
fn clients() -> Result<()> {
    let mut open = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = TcpStream::connect("169.254.169.254:80")?;
        client.write_all(
            b"GET /latest/ HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: x\r\n\r\n",
        )?;
        let mut answer = String::new();
        BufReader::new(client.try_clone()?).read_line(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 "), "unexpected: {answer}");
        open.push(client);
    }
    println!("{}", open.len());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(())
}
