//! The composition root: takes what it needs from the system, gives up what it no longer needs,
//! serves until it is told to stop, and leaves nothing behind.

mod addresses;
mod privileges;

use std::{
    fs::OpenOptions,
    io::{self, Write},
    net::TcpListener,
    path::Path,
};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::Settings,
    failure::Failure,
    identify::{COMMAND_LINE_READERS, Resolver},
    kernel::{Counters, Kernel, Maps, probe},
    proxy::{Acceptor, Proxy, Upstream, listen},
    record::{Kind, Recorder, Started, Stopped},
};
use addresses::Addresses;

/// Threads that serve connections.
const WORKERS: usize = 2;
/// Runs the guard until SIGTERM or SIGINT.
///
/// # Errors
/// Why it could not start; see [`Failure`].
pub fn run(settings: &Settings) -> Result<(), Failure> {
    settings.validate()?;
    probe::capabilities()?;
    let release = probe::kernel()?;
    probe::pid_namespace()?;
    let cgroup = probe::cgroup(settings.cgroup.as_deref())?;
    log::debug!("kernel {release}, cgroup {}", cgroup.display());

    let events = event_output(settings.events.as_deref())?;
    let (_addresses, ipv6) = Addresses::claim(settings)?;
    let listeners = bind(settings, ipv6)?;
    let mut kernel = Kernel::load(settings, ipv6)?;
    let maps = kernel.take_maps()?;
    let netns_cookie = netns_cookie(&listeners);
    privileges::raise_file_limit(settings.limits.connections);
    privileges::reduce().context("privileges cannot be given up")?;

    let host = nix::unistd::gethostname().map_or_else(
        |_| "unknown".into(),
        |name| name.to_string_lossy().into_owned(),
    );
    // After the privileges, as threads inherit them.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(COMMAND_LINE_READERS)
        .enable_all()
        .build()
        .context("the threads cannot be started")?;
    let (recorder, writer) =
        Recorder::start(&host, events).context("the event writer cannot be started")?;
    let served = runtime.block_on(async {
        let Maps {
            flows,
            exempt,
            counters,
        } = maps;
        let acceptor = Acceptor::new(Proxy {
            flows: Box::new(flows),
            resolver: Resolver::new("/proc", "/etc/passwd", netns_cookie, settings.command_lines),
            policy: settings.policy,
            upstream: Upstream::new(settings.upstreams, exempt, settings.limits),
            recorder: recorder.clone(),
            limits: settings.limits,
        });
        let stopped = serve(
            settings, kernel, &cgroup, listeners, acceptor, &recorder, &counters,
        )
        .await?;
        recorder.record(Kind::Stopped(stopped));
        Ok(())
    });
    // Ends every task, and with them the last recorders. A thread that reads the command line of a
    // process that does not let it is left behind.
    runtime.shutdown_timeout(settings.limits.drain);
    drop(recorder);
    writer.finish();
    served
}

async fn serve(
    settings: &Settings,
    mut kernel: Kernel,
    cgroup: &Path,
    listeners: Vec<TcpListener>,
    mut acceptor: Acceptor,
    recorder: &Recorder,
    counters: &Counters,
) -> Result<Stopped, Failure> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let mut addresses = Vec::new();
    for listener in listeners {
        addresses.push(
            listener
                .local_addr()
                .context("a listener has no address")?
                .to_string(),
        );
        acceptor
            .serve(listener)
            .context("a listener cannot be watched")?;
    }
    kernel.forward_log()?;
    // Last: whoever is redirected is served.
    kernel.attach(cgroup)?;
    log::info!(
        "watching {} in {} mode",
        cgroup.display(),
        settings.policy.mode
    );
    recorder.record(Kind::Started(Started {
        version: env!("CARGO_PKG_VERSION").into(),
        mode: settings.policy.mode,
        cgroup: cgroup.display().to_string(),
        listeners: addresses,
    }));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    log::info!(
        "stopping: requests in flight may take up to {:?}",
        settings.limits.drain
    );
    // First: nobody is redirected to a listener that is about to close. Whoever was redirected
    // before still needs the other programs.
    kernel.stop_redirecting();
    let cut_off = acceptor.drain().await;
    drop(kernel);
    if cut_off > 0 {
        log::warn!("{cut_off} connections were cut off");
    }
    Ok(Stopped {
        events_lost: recorder.lost(),
        ..counters.read()
    })
}

fn bind(settings: &Settings, ipv6: bool) -> Result<Vec<TcpListener>, Failure> {
    let [v4, v6] = settings.listeners.both();
    let mut listeners = vec![listen(v4, &settings.limits)?];
    if ipv6 {
        listeners.push(listen(v6, &settings.limits)?);
    }
    Ok(listeners)
}

fn event_output(path: Option<&Path>) -> Result<Box<dyn Write + Send>, Failure> {
    let Some(path) = path else {
        return Ok(Box::new(io::stdout()));
    };
    use std::os::unix::fs::OpenOptionsExt as _;
    // Command lines and paths are nobody else's business; and a link that somebody left at this
    // place is not followed.
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| Failure::Events {
            path: path.to_owned(),
            error,
        })?;
    Ok(Box::new(file))
}

/// Cookie of the network namespace that the listeners are in, from Linux 5.14 on.
fn netns_cookie(listeners: &[TcpListener]) -> Option<u64> {
    listeners
        .first()
        .and_then(|listener| privileges::netns_cookie(listener).ok())
}
