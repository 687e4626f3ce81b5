//! A guard at work in a lab.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStdout, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use super::Lab;
use crate::record::{Event, Kind, Request};

/// How long to wait for something that should happen at once, on a busy machine that may be emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// `imds-guard run` on a lab's host, watching all of the lab. It is killed with the lab at the
/// latest.
pub struct Guard {
    child: Child,
    events: Receiver<(String, Event)>,
}

impl Guard {
    /// Starts the program and waits until it watches. `arguments` follow `run --cgroup …`; events
    /// must go to standard output.
    ///
    /// # Errors
    /// It ended instead, with its exit status; what it had to say is on standard error.
    pub fn start<A: AsRef<OsStr>>(
        lab: &Lab,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        Self::spawn(lab.guard_command(program).args(arguments))
    }

    /// Starts a prepared command that runs a guard, and waits until it watches.
    ///
    /// # Errors
    /// As [`Guard::start`].
    pub fn spawn(command: &mut std::process::Command) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        // In a process group of its own, so that Ctrl-C does not end it before its lab.
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("the guard cannot be started")?;
        let output = child
            .stdout
            .take()
            .context("the guard has no standard output")?;
        let mut guard = Self {
            child,
            events: read_events(output),
        };
        // One that takes over from another serves requests before it has said that it watches.
        loop {
            match guard.event() {
                Ok(event) if matches!(event.kind, Kind::Started(_)) => return Ok(guard),
                Ok(_) => {}
                Err(error) => {
                    let _ended_already = guard.child.kill();
                    let status = guard
                        .child
                        .wait()
                        .context("the guard cannot be waited for")?;
                    bail!("the guard did not start: {error}, {status}");
                }
            }
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next event, as line and as value.
    ///
    /// # Errors
    /// None came in time, or the guard has ended.
    pub fn line(&self) -> Result<(String, Event)> {
        self.events
            .recv_timeout(PATIENCE)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => anyhow!("no event within {PATIENCE:?}"),
                RecvTimeoutError::Disconnected => anyhow!("the guard has ended"),
            })
    }

    /// The next event.
    ///
    /// # Errors
    /// As [`Guard::line`].
    pub fn event(&self) -> Result<Event> {
        Ok(self.line()?.1)
    }

    /// The next event, which must be about a request.
    ///
    /// # Errors
    /// It is about something else; otherwise as [`Guard::line`].
    pub fn request(&self) -> Result<Request> {
        match self.event()?.kind {
            Kind::Request(request) => Ok(*request),
            other => bail!("expected a request, not {other:?}"),
        }
    }

    /// Events that are there already.
    pub fn waiting(&self) -> impl Iterator<Item = (String, Event)> + '_ {
        self.events.try_iter()
    }

    /// Sends it a signal. After SIGSTOP, returns when all of its threads stand still.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a pid beyond all bounds")?;
        let pid = Pid::from_raw(pid);
        kill(pid, signal).context("the guard cannot be signalled")?;
        if signal == Signal::SIGSTOP {
            waitpid(pid, Some(WaitPidFlag::WUNTRACED)).context("the guard does not stop")?;
        }
        Ok(())
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child
            .wait()
            .context("the guard cannot be waited for")?;
        Ok(())
    }

    /// Waits until it ends by itself. Returns as [`Guard::stop`].
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(mut self) -> Result<(ExitStatus, Vec<Event>)> {
        let status = self
            .child
            .wait()
            .context("the guard cannot be waited for")?;
        Ok((status, self.events.iter().map(|(_, event)| event).collect()))
    }

    /// Asks it to end (SIGTERM) and waits for it. Returns its status and all events that were left,
    /// the last of which says that it stopped.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn stop(self) -> Result<(ExitStatus, Vec<Event>)> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _killed = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

fn read_events(output: ChildStdout) -> Receiver<(String, Event)> {
    let (sender, events) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(event) => {
                    if sender.send((line, event)).is_err() {
                        return;
                    }
                }
                Err(error) => log::error!("no event: {error}: {line}"),
            }
        }
    });
    events
}
