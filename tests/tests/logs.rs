//! The event log on disk.

mod faults;

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::Duration,
};

use imds_guard::{
    policy::Caller,
    record::{
        Event, Kind, Latency, Recorder, Request, RuleExpired,
        output::{Fold, Format, Lines, LogFile, Outputs, Rotation, Sync, read, segments},
    },
};
use imds_guard_tests::{lab, run};

use crate::{GUARD, events::a_request};
use faults::Disk;

/// A folder that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("imds-guard-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn log(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

pub const ROTATION: Rotation = Rotation {
    size: 20_000,
    age: Duration::from_secs(3600),
    total: 1 << 30,
    sync: Sync::Never,
};

/// An event with a number.
fn numbered(number: u64) -> Kind {
    Kind::RuleExpired(RuleExpired {
        rule: number.to_string(),
        owner: None,
        expires: "2030-01-31".into(),
    })
}

fn record(outputs: Outputs, count: u64) {
    let (recorder, writer) = Recorder::start("h", outputs).unwrap();
    for number in 0..count {
        recorder.record(numbered(number));
        while recorder.waiting() > 1000 {
            std::thread::yield_now();
        }
    }
    drop(recorder);
    writer.finish();
}

fn to_file(path: &Path, format: Format, rotation: Rotation) -> Outputs {
    let file = LogFile::open(path, rotation).unwrap();
    Outputs::default().with("events", Lines::to_file(format, file))
}

/// All events of a log, with those that were put away.
fn all(log: &Path) -> Vec<Event> {
    let mut files = segments(log.parent().unwrap(), "events.jsonl");
    files.push(log.to_owned());
    let lines = files.iter().flat_map(|file| {
        let reader = read(file).unwrap();
        std::io::BufRead::lines(reader).map(Result::unwrap)
    });
    lines
        .map(|line| serde_json::from_str(&line).unwrap())
        .collect()
}

/// What was put away, which is compressed when the recorder has ended.
fn compressed(folder: &Path) -> Vec<PathBuf> {
    let files = segments(folder, "events.jsonl");
    assert!(
        files
            .iter()
            .all(|file| file.extension().is_some_and(|it| it == "zst")),
        "{files:?}"
    );
    files
}

fn verify(log: &Path, more: &[&str]) -> Output {
    run(Command::new(GUARD)
        .args(["events", "verify", "--file"])
        .arg(log)
        .args(more))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_log_is_rotated_compressed_and_nothing_of_it_is_lost() {
    let folder = Folder::new("rotated");
    record(to_file(&folder.log(), Format::Json, ROTATION), 3000);
    let away = compressed(folder.path());
    assert!(away.len() >= 3, "{away:?}");
    let numbers: Vec<u64> = all(&folder.log())
        .into_iter()
        .map(|event| match event.kind {
            Kind::RuleExpired(expired) => expired.rule.parse().unwrap(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(numbers, (0..3000).collect::<Vec<_>>());
    for file in away.iter().chain([&folder.log()]) {
        let mode = fs::metadata(file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
}

#[test]
fn a_log_is_rotated_by_age() {
    let folder = Folder::new("aged");
    let old = "{\"schema\":1,\"time\":\"2026-01-02T03:04:05.000000Z\",\"host\":\"h\",\"event\":\"events_lost\",\"count\":1}\n";
    fs::write(folder.log(), old).unwrap();
    record(to_file(&folder.log(), Format::Json, ROTATION), 10);
    let away = compressed(folder.path());
    assert_eq!((away.len(), all(&folder.log()).len()), (1, 11));
    assert_eq!(
        fs::read_to_string(folder.log()).unwrap().lines().count(),
        10
    );
}

#[test]
fn old_files_make_room_for_new_ones() {
    let folder = Folder::new("capped");
    let rotation = Rotation {
        total: 60_000,
        ..ROTATION
    };
    let outputs = to_file(&folder.log(), Format::Json, rotation);
    let losses = outputs.losses();
    record(outputs, 20_000);
    compressed(folder.path());
    let (files, _) = losses[0].removed.as_ref().unwrap().now();
    assert!(files > 0, "what was removed is counted");
    let sizes = fs::read_dir(folder.path()).unwrap();
    let sum: u64 = sizes.map(|it| it.unwrap().metadata().unwrap().len()).sum();
    // What is written at once can be more than a file of this test has.
    assert!(sum < 60_000 + 64 * 1024, "{sum}");
    let last = all(&folder.log()).pop().unwrap();
    assert_eq!(last.kind, numbered(19_999));
}

/// E3: what a crash has left of a line is cut off, and the log goes on.
#[test]
fn e3_half_a_line_is_cut_off() {
    let folder = Folder::new("half");
    record(to_file(&folder.log(), Format::Json, ROTATION), 3);
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(folder.log())
        .unwrap();
    file.write_all(b"{\"schema\":1,\"time\":\"20").unwrap();
    record(to_file(&folder.log(), Format::Json, ROTATION), 2);
    assert_eq!(all(&folder.log()).len(), 5);
}

/// E3: on a full disk the oldest events go; without any, new ones are lost, and counted.
#[test]
fn e3_a_full_disk_costs_the_oldest_events() {
    let folder = Folder::new("full");
    let disk = Disk::at(folder.path());
    // Larger than the disk, so that only the disk says when.
    let rotation = Rotation {
        size: 50_000,
        ..ROTATION
    };
    let outputs = to_file(&folder.log(), Format::Json, rotation);
    let losses = outputs.losses();
    record(outputs, 50_000);
    let (files, bytes) = losses[0].removed.as_ref().unwrap().now();
    assert!(files > 0 && bytes > files, "{files} files, {bytes} bytes");
    let kept = all(&folder.log());
    assert_eq!(kept.last().unwrap().kind, numbered(49_999));
    assert!(kept.len() < 50_000);

    // Nothing to remove: the log itself does not fit.
    for file in segments(folder.path(), "events.jsonl") {
        fs::remove_file(file).unwrap();
    }
    disk.fill();
    let outputs = to_file(
        &folder.log(),
        Format::Json,
        Rotation {
            size: 1 << 30,
            ..ROTATION
        },
    );
    let losses = outputs.losses();
    let written = || {
        let is_one = |event: &Event| matches!(event.kind, Kind::RuleExpired(_));
        all(&folder.log())
            .iter()
            .filter(|event| is_one(event))
            .count() as u64
    };
    let before = written();
    record(outputs, 1000);
    let lost = losses[0].events.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((lost > 0, lost + written() - before), (true, 1000));
    // Whole lines only, though the disk was full in the middle of one.
    assert!(fs::read(folder.log()).unwrap().ends_with(b"\n"));
}

/// F3: a link in the place of the log, or of a file it is about to make, is not followed; and a folder where
/// others could put one is not written to.
#[test]
fn f3_links_are_not_followed() {
    let folder = Folder::new("links");
    let target = folder.path().join("target");
    fs::write(&target, "precious").unwrap();
    symlink(&target, folder.log()).unwrap();
    assert!(LogFile::open(&folder.log(), ROTATION).is_err());
    fs::remove_file(folder.log()).unwrap();

    // Exchanged while the log is open.
    let lock = folder.path().join(".events.jsonl.lock");
    let _none = fs::remove_file(&lock);
    symlink(&target, &lock).unwrap();
    let outputs = to_file(&folder.log(), Format::Json, ROTATION);
    fs::remove_file(folder.log()).unwrap();
    symlink(&target, folder.log()).unwrap();
    record(outputs, 1000);
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");

    let open = folder.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let Err(error) = LogFile::open(&open.join("events.jsonl"), ROTATION) else {
        panic!("a folder open to all was taken");
    };
    assert!(
        error.to_string().contains("others can put files"),
        "{error}"
    );
    // As a user would meet it.
    let lab = lab();
    let refused = run(lab
        .guard_command(GUARD)
        .arg("--events")
        .arg(open.join("events.jsonl")));
    assert_eq!(refused.status.code(), Some(16));
}

#[test]
fn a_chain_shows_what_was_done_to_it_across_rotations() {
    let folder = Folder::new("chain");
    record(to_file(&folder.log(), Format::chained(), ROTATION), 1500);
    // Another start goes on with the same chain.
    record(to_file(&folder.log(), Format::chained(), ROTATION), 1500);
    let away = compressed(folder.path());
    assert!(away.len() >= 3);
    let whole = verify(&folder.log(), &[]);
    assert!(whole.status.success(), "{}", said(&whole));
    assert!(said(&whole).starts_with("3000 lines are as they were written"));
    let last = said(&whole).trim().rsplit(' ').next().unwrap().to_owned();
    assert!(verify(&folder.log(), &["--last", &last]).status.success());

    // Altered in a file that was put away.
    let original = fs::read(&away[1]).unwrap();
    let text = String::from_utf8(zstd::decode_all(&original[..]).unwrap()).unwrap();
    let altered = text.replacen("\"host\":\"h\"", "\"host\":\"x\"", 1);
    fs::write(&away[1], zstd::encode_all(altered.as_bytes(), 3).unwrap()).unwrap();
    let broken = verify(&folder.log(), &[]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(said(&broken).contains("was altered"), "{}", said(&broken));
    // One file is missing.
    fs::remove_file(&away[1]).unwrap();
    let broken = verify(&folder.log(), &[]);
    assert!(said(&broken).contains("taken out"), "{}", said(&broken));
    fs::write(&away[1], original).unwrap();
    // The end was cut off: only whoever kept the last hash can say so.
    let text = fs::read_to_string(folder.log()).unwrap();
    let cut: String = text
        .lines()
        .take(text.lines().count() - 1)
        .map(|it| format!("{it}\n"))
        .collect();
    fs::write(folder.log(), cut).unwrap();
    assert!(verify(&folder.log(), &[]).status.success());
    let broken = verify(&folder.log(), &["--last", &last]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(said(&broken).contains("cut"), "{}", said(&broken));
}

#[test]
fn calls_that_are_alike_are_folded_and_no_caller_is_lost() {
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let out = Shared::default();
    let fold = Fold::new(Duration::from_secs(3600));
    let outputs =
        Outputs::new(Some(fold)).with("events", Lines::to(Format::Json, Box::new(out.clone())));
    let (recorder, writer) = Recorder::start("h", outputs).unwrap();
    let call = |pid: u32, path: &str, comm: &str, guard: u64| {
        let request = a_request();
        let caller = Caller {
            pid,
            comm: comm.into(),
            ..(*request.caller).clone()
        };
        recorder.record(Kind::Request(Box::new(Request {
            path: path.into(),
            caller: Arc::new(caller),
            folded: None,
            latency_us: Latency { guard, upstream: 7 },
            ..request
        })));
    };
    for latency in 0..100 {
        call(1, "/a", "one", latency);
        call(2, "/a", "one", latency);
        call(1, "/b", "one", latency);
    }
    call(3, "/a", "one", 0);
    // Of the same process, but not alike.
    call(1, "/a", "two", 1000);
    drop(recorder);
    writer.finish();
    let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
    let mut lines = Vec::new();
    let mut calls = std::collections::BTreeMap::<(u32, String), u64>::new();
    for line in text.lines() {
        let event: Event = serde_json::from_str(line).unwrap();
        let Kind::Request(request) = event.kind else {
            panic!("{line}");
        };
        *calls
            .entry((request.caller.pid, request.path.clone()))
            .or_default() += request.calls();
        lines.push(request);
    }
    assert_eq!(lines.len(), 8, "{text}");
    assert!(
        lines
            .iter()
            .filter(|it| it.folded.is_some())
            .all(|it| (it.calls(), it.latency_us.guard) == (99, 99))
    );
    let expected = [(1, "/a", 101), (1, "/b", 100), (2, "/a", 100), (3, "/a", 1)];
    let expected = expected.map(|(pid, path, calls)| ((pid, path.to_owned()), calls));
    assert_eq!(calls, expected.into());
}
