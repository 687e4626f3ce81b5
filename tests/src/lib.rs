//! What the tests share: a sandbox with a guard at work in it.
//!
//! Tests need root, cgroup v2, curl, Python, and some of them Docker; one that misses something fails and says so, it is
//! never skipped. Each makes namespaces and a cgroup of its own, so that all run at the same time,
//! and leaves nothing behind, even if it is killed: see [`imds_guard::lab`].

pub mod docker;
pub mod load;
pub mod nested;
pub mod servers;

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio},
    sync::Arc,
};

use anyhow::Context as _;
use imds_guard::{
    kernel::probe,
    lab::{Guard, Lab, LabConfig, Place},
    policy::Caller,
    record::{Event, Kind, PolicyChange, Request},
};

/// The Python that has the packages of `tests/requirements.txt`.
pub const PYTHON: &str = "IMDS_GUARD_TEST_PYTHON";

/// An EC2 host with a guard. The guard goes before the host does.
pub struct Sandbox {
    /// The guard.
    pub guard: Guard,
    /// The host, its container and its metadata service.
    pub lab: Lab,
}

/// A host without a guard.
///
/// # Panics
/// It cannot be made; the message says what is missing.
#[must_use]
pub fn lab() -> Lab {
    assert!(
        nix::unistd::geteuid().is_root(),
        "the tests make network namespaces: run them as root"
    );
    let root = probe::cgroup2_mount().unwrap_or_else(|failure| panic!("{failure}"));
    Lab::new(LabConfig::new(root)).unwrap_or_else(|error| panic!("no lab: {error:#}"))
}

impl Sandbox {
    /// A host with a guard that got these arguments.
    ///
    /// # Panics
    /// One of them did not start.
    #[must_use]
    pub fn new(program: &str, arguments: &[&str]) -> Self {
        Self::with(program, arguments, |_| {})
    }

    /// The same, after something was changed about the command that runs the guard.
    ///
    /// # Panics
    /// As [`Sandbox::new`].
    #[must_use]
    pub fn with(program: &str, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let lab = lab();
        let mut command = lab.guard_command(program);
        command.args(arguments);
        change(&mut command);
        let guard = Guard::spawn(&mut command).unwrap_or_else(|error| panic!("{error:#}"));
        Self { guard, lab }
    }

    /// A host with a guard that has this configuration file.
    ///
    /// # Panics
    /// As [`Sandbox::new`].
    #[must_use]
    pub fn configured(program: &str, config: &str) -> Self {
        let lab = lab();
        let written = std::fs::write(lab.config(), config);
        assert!(written.is_ok(), "{written:?}");
        let guard = Guard::spawn(&mut lab.guard_command(program));
        let guard = guard.unwrap_or_else(|error| panic!("{error:#}"));
        Self { guard, lab }
    }

    /// Puts another configuration file in the place of the guard's, as a whole.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn configure(&self, config: &str) {
        let (file, new) = (self.lab.config(), self.lab.config().with_extension("new"));
        let written = std::fs::write(&new, config).and_then(|()| std::fs::rename(&new, &file));
        assert!(written.is_ok(), "{written:?}");
    }

    /// The guard's next event, which must be about its policy.
    ///
    /// # Panics
    /// It does not come, or is about something else.
    #[must_use]
    pub fn change(&self) -> PolicyChange {
        match self.guard.event().map(|event| event.kind) {
            Ok(Kind::Policy(change)) => change,
            other => panic!("expected a change of policy, not {other:?}"),
        }
    }

    /// Runs a command of imds-guard that speaks to this guard, which must go well. Returns what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn tell(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_to_tell(program, arguments);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {complaint}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same, whatever becomes of it.
    ///
    /// # Panics
    /// It cannot be run.
    pub fn try_to_tell(&self, program: &str, arguments: &[&str]) -> Output {
        run(self
            .lab
            .command(Place::Guard, program)
            .args(arguments)
            .env("IMDS_GUARD_RUN_DIR", self.lab.run_dir())
            .env("IMDS_GUARD_PINS", self.lab.pins()))
    }

    /// Runs curl, silently, with a time-out that only a hang reaches.
    #[must_use]
    pub fn curl<A: AsRef<OsStr>>(&self, place: Place, arguments: &[A]) -> Curl {
        curl(&self.lab, place, arguments)
    }

    /// Fetches a session token, which must succeed.
    ///
    /// # Panics
    /// It does not.
    #[must_use]
    pub fn token(&self, place: Place, address: &str) -> String {
        let url = format!("http://{address}/latest/api/token");
        let answer = self.curl(
            place,
            &[
                "-X",
                "PUT",
                "-H",
                "X-aws-ec2-metadata-token-ttl-seconds: 60",
                &url,
            ],
        );
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    /// Runs a Python script to its end.
    ///
    /// # Panics
    /// Python is missing, or the script fails.
    #[must_use]
    pub fn python(&self, place: Place, script: &str) -> String {
        let output = run(self.lab.command(place, python()).args(["-c", script]));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Starts a Python script that waits where it calls `wait()`, so that what comes next can be timed.
    /// Returns when it is there.
    ///
    /// # Panics
    /// Python is missing, or the script ends before.
    #[must_use]
    pub fn python_waiting(&self, place: Place, script: &str) -> Waiting {
        let script = format!(
            "import sys\ndef wait():\n    print(flush=True)\n    sys.stdin.readline()\n{script}"
        );
        let mut child = self
            .lab
            .command(place, python())
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("Python cannot be run: {error}"));
        let output = child.stdout.take().map(BufReader::new);
        let mut output = output.unwrap_or_else(|| panic!("Python has no output"));
        let mut line = String::new();
        let read = output.read_line(&mut line);
        assert!(matches!(read, Ok(1..)), "the script has ended: {read:?}");
        Waiting { child, output }
    }

    /// The guard's next event, which must be about a request.
    ///
    /// # Panics
    /// It does not come, or is about something else.
    #[must_use]
    pub fn request(&self) -> Request {
        self.guard
            .request()
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// The caller of the guard's next event.
    ///
    /// # Panics
    /// As [`Sandbox::request`].
    #[must_use]
    pub fn caller(&self) -> Caller {
        Arc::unwrap_or_clone(self.request().caller)
    }

    /// Stops the guard, which must go well. Returns the events that were left and the host.
    ///
    /// # Panics
    /// It does not end, or with an error.
    #[must_use]
    pub fn stop(self) -> (Vec<Event>, Lab) {
        let (status, events) = self
            .guard
            .stop()
            .unwrap_or_else(|error| panic!("{error:#}"));
        assert!(status.success(), "the guard ended with {status}");
        (events, self.lab)
    }
}

/// A script that waits to go on.
pub struct Waiting {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Waiting {
    /// Lets it go on, to its end. Returns what it printed.
    ///
    /// # Panics
    /// It fails.
    #[must_use]
    pub fn go(mut self) -> String {
        let mut text = String::new();
        // Dropped at once: the script reads to the end.
        drop(self.child.stdin.take());
        let read = self.output.read_to_string(&mut text);
        assert!(read.is_ok(), "{read:?}");
        let status = self.child.wait();
        assert!(
            status.as_ref().is_ok_and(ExitStatus::success),
            "{status:?}: {text}"
        );
        text.trim().to_owned()
    }
}

/// What curl got.
#[derive(Debug)]
pub struct Curl {
    /// curl's own exit code; 0 also for HTTP errors.
    pub exit: i32,
    /// The HTTP status, 0 if there was none.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Runs curl in a lab.
///
/// # Panics
/// curl is missing.
#[must_use]
pub fn curl<A: AsRef<OsStr>>(lab: &Lab, place: Place, arguments: &[A]) -> Curl {
    let output = run(lab
        .command(place, "curl")
        .args([
            "--silent",
            "--globoff",
            "--max-time",
            "20",
            "--write-out",
            "\n%{http_code}",
        ])
        .args(arguments));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or((&text, "0"));
    Curl {
        exit: output.status.code().unwrap_or(-1),
        status: status.parse().unwrap_or(0),
        body: body.to_owned(),
    }
}

/// The Python interpreter to use.
///
/// # Panics
/// `cargo xtask test` did not name one.
#[must_use]
pub fn python() -> String {
    std::env::var(PYTHON).unwrap_or_else(|_| panic!("{PYTHON} is not set: run `cargo xtask test`"))
}

/// Runs a command without input to its end.
///
/// # Panics
/// It cannot be run.
pub fn run(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} cannot be run", command.get_program().display()))
        .unwrap_or_else(|error| panic!("{error:#}"))
}
