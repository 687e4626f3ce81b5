//! `imds-guard demo`.

mod clients;
mod table;

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    failure::Failure,
    kernel::probe,
    lab::{Guard, Lab, LabConfig, Place, kill_all},
    policy::Mode,
    record::{Kind, Request, to_json},
};
use clients::CLIENTS;

/// For `--help`.
pub const ABOUT: &str = "\
Shows imds-guard at work on any Linux machine, without EC2.

In network namespaces and a cgroup of its own it starts a fake metadata service, the guard, and \
real clients (curl): IMDSv1 and v2, over IPv4, IPv6 and IPv4-mapped IPv6, on the host and in a \
container. It prints who called, with which version, and what became of it. Nothing outside is \
touched, and nothing is left behind.

With --keep, your own command runs there instead of the clients, on the \"host\":
  imds-guard demo --keep -- curl -s http://169.254.169.254/latest/meta-data/
  imds-guard demo --keep

Exit code 0 if everything became what it should; with --keep, the command's own.";

/// Conventional exit code of a command that was interrupted: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// Containers are one hop further away than the host.
const HOP_LIMIT: u8 = 2;

/// Arguments of `imds-guard demo`.
#[derive(Args)]
pub struct Arguments {
    /// What the guard does with requests without a session token
    #[arg(long, value_enum, default_value_t = Mode::Enforce)]
    mode: Mode,

    /// Print the events as they are, one line of JSON each
    #[arg(long)]
    json: bool,

    /// Run COMMAND, or a shell, instead of the demo's clients
    #[arg(long)]
    keep: bool,

    /// What to run with --keep [default: $SHELL]
    #[arg(last = true, requires = "keep", value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the demo.
pub fn main(arguments: &Arguments) -> Result<ExitCode, Failure> {
    probe::capabilities()?;
    probe::kernel()?;
    probe::pid_namespace()?;
    let cgroup_root = probe::cgroup2_mount()?;
    let signals = Signals::catch()?;
    let lab = Lab::new(LabConfig::new(cgroup_root)).context("the demo's host cannot be made")?;
    lab.imds().set_hop_limit(HOP_LIMIT);
    let interrupted = Arc::new(AtomicBool::new(false));
    let everything = lab.cgroup().path().to_owned();
    signals.watch(arguments.keep, everything, Arc::clone(&interrupted));
    let done = show(arguments, &lab);
    if interrupted.load(Relaxed) {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(done?)
}

/// The signals that end the demo. Caught rather than blocked, as programs that are started inherit
/// what is blocked.
struct Signals {
    runtime: Runtime,
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn catch() -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let entered = runtime.enter();
        let caught = |kind| signal(kind).context("signals cannot be caught");
        let interrupt = caught(SignalKind::interrupt())?;
        let terminate = caught(SignalKind::terminate())?;
        let hang_up = caught(SignalKind::hangup())?;
        drop(entered);
        Ok(Self {
            runtime,
            interrupt,
            terminate,
            hang_up,
        })
    }

    /// Ends whatever the demo waits for when a signal comes; the demo then cleans up itself. While
    /// the user's own command runs, Ctrl-C is meant for that.
    fn watch(mut self, attended: bool, everything: PathBuf, interrupted: Arc<AtomicBool>) {
        thread::spawn(move || {
            self.runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = self.interrupt.recv() => if attended { continue },
                        _ = self.terminate.recv() => {}
                        _ = self.hang_up.recv() => {}
                    }
                    interrupted.store(true, Relaxed);
                    if let Err(error) = kill_all(&everything) {
                        log::debug!("nothing left to kill: {error}");
                    }
                }
            });
        });
    }
}

fn show(arguments: &Arguments, lab: &Lab) -> Result<ExitCode> {
    let program = env::current_exe().context("this program cannot be found")?;
    let guard = start_guard(lab, &program, arguments.mode)?;
    if arguments.keep {
        return attend(arguments, lab, guard);
    }
    let mut unexpected = 0;
    if !arguments.json {
        table::title(arguments.mode);
    }
    for client in CLIENTS {
        let output = client.run(lab).with_context(|| {
            "the demo's clients are curl scripts, and curl cannot be run: install it (apt-get install curl)"
        })?;
        for _ in 0..client.requests() {
            let (line, event) = guard.line()?;
            let Kind::Request(request) = event.kind else {
                bail!("expected a request, not {line}");
            };
            if arguments.json {
                println!("{line}");
            } else {
                table::row(&request);
            }
        }
        if !client.is_as_expected(arguments.mode, &output) {
            eprintln!(
                "imds-guard: {client} got {:?}",
                String::from_utf8_lossy(&output.stdout)
            );
            unexpected += 1;
        }
    }
    let reached = lab.imds().counters();
    let (status, _) = guard.stop()?;
    if !status.success() {
        bail!("the guard ended with {status}");
    }
    if !arguments.json {
        table::sum(arguments.mode, &reached);
    }
    if unexpected > 0 || (arguments.mode == Mode::Enforce && reached.v1_requests > 0) {
        return Err(anyhow!(
            "{unexpected} clients were not treated as they should"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn start_guard(lab: &Lab, program: &Path, mode: Mode) -> Result<Guard> {
    let mut command = lab.guard_command(program);
    command.args([
        "--hop-limit",
        &HOP_LIMIT.to_string(),
        "--mode",
        &mode.to_string(),
    ]);
    // Its messages would only come between the table's lines.
    command.env("RUST_LOG", "warn");
    Guard::spawn(&mut command)
}

/// Runs the user's command on the lab's host, then shows what it asked.
fn attend(arguments: &Arguments, lab: &Lab, guard: Guard) -> Result<ExitCode> {
    let mut words = arguments.command.iter().cloned();
    let shell = || env::var_os("SHELL").unwrap_or_else(|| "sh".into());
    let program = words.next().unwrap_or_else(shell);
    let mut command: Command = lab.command(Place::Host, &program);
    let status = command
        .args(words)
        .status()
        .with_context(|| format!("{} cannot be run", program.display()))?;
    let (_, events) = guard.stop()?;
    let requests: Vec<Box<Request>> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::Request(request) => Some(request.clone()),
            _ => None,
        })
        .collect();
    if arguments.json {
        for event in &events {
            println!("{}", to_json(event)?);
        }
    } else if !requests.is_empty() {
        table::title(arguments.mode);
        requests.iter().for_each(|request| table::row(request));
        table::sum(arguments.mode, &lab.imds().counters());
    }
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
