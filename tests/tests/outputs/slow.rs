//! Outputs that are slow, stuck or broken.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixDatagram,
    process::Stdio,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use imds_guard::{
    lab::Place,
    record::{
        Kind, Recorder,
        output::{Format, Journald, Lines, LogFile, Outputs},
    },
};

use super::Helper;
use crate::{
    GUARD, INSTANCE_ID_PATH,
    events::a_request,
    logs::{Folder, ROTATION},
};

/// How long the event log may take, though another output is stuck.
const PROMPTLY: Duration = Duration::from_secs(10);

fn wait_for(what: &str, is_there: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_there() {
        assert!(begun.elapsed() < PROMPTLY, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// journald has stopped reading: the log gets everything at once, and what journald missed is counted.
#[test]
fn a_journald_that_does_not_read_holds_up_nobody_else() {
    let folder = Folder::new("stalled");
    let path = folder.path().join("socket");
    let socket = UnixDatagram::bind(&path).unwrap();
    let file = LogFile::open(&folder.log(), ROTATION).unwrap();
    let outputs = Outputs::default()
        .with("events", Lines::to_file(Format::Json, file))
        .with("journald", Journald::to(&path).unwrap());
    let (recorder, writer) = Recorder::start("h", outputs).unwrap();
    let count = 20_000;
    let begun = Instant::now();
    for number in 0..count {
        recorder.record(Kind::EventsLost { count: number });
        while recorder.waiting() > 1000 {
            assert!(begun.elapsed() < PROMPTLY, "the log waits for journald");
            std::thread::yield_now();
        }
    }
    let is_last = |line: &str| line.contains(&format!("\"count\":{}", count - 1));
    wait_for("the log waits for journald", || {
        fs::read_to_string(folder.log()).is_ok_and(|text| text.lines().any(is_last))
    });
    assert_eq!(recorder.lost(), 0);
    let losses = recorder.losses();
    assert!(losses[1].events.load(Relaxed) > 0, "{losses:?}");
    // So that the end need not be waited for.
    drop(socket);
    drop(recorder);
    writer.finish();
}

/// Somebody has metrics of CloudWatch piped to a program that does not read.
#[test]
fn a_pipe_that_nobody_drains_holds_up_nobody_else() {
    let folder = Folder::new("undrained");
    let lab = imds_guard_tests::lab();
    let config = format!(
        "mode = \"enforce\"\nevents = \"{}\"\nemf = \"-\"\n",
        folder.log().display()
    );
    fs::write(lab.config(), config).unwrap();
    let mut guard = Helper::watching(lab.guard_command(GUARD).stdout(Stdio::piped()));
    // Each makes a line of more than a KiB, and a pipe holds 64.
    let count = 100;
    let url = format!(
        "http://169.254.169.254{INSTANCE_ID_PATH}?{}",
        "x".repeat(1000)
    );
    let agent = format!("User-Agent: {}", "x".repeat(1000));
    let urls = vec![url; count];
    let mut arguments = vec!["-H".to_owned(), agent];
    arguments.extend(urls);
    let answer = imds_guard_tests::curl(&lab, Place::Host, &arguments);
    assert_eq!(answer.status, 401);
    wait_for("the log waits for whoever reads the metrics", || {
        let text = fs::read_to_string(folder.log()).unwrap();
        text.lines().filter(|it| it.contains("\"v1\"")).count() == count
    });
    let pid = nix::unistd::Pid::from_raw(guard.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    // Its end does not wait for it, either, at least not for long.
    assert!(guard.0.wait().unwrap().success());
}

/// A line that stands for many calls is lost for all of them.
#[test]
fn calls_that_were_folded_are_lost_one_by_one() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("broken"))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (recorder, writer) = Recorder::start("h", Outputs::to(Broken)).unwrap();
    let losses = recorder.losses().to_vec();
    let request = a_request();
    assert_eq!(request.calls(), 3);
    recorder.record(Kind::Request(Box::new(request)));
    drop(recorder);
    writer.finish();
    assert_eq!(losses[0].events.load(Relaxed), 3);
}
