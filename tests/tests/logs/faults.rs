//! What goes wrong with files: disks, file systems, pipes.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::Ordering::Relaxed,
    thread,
    time::{Duration, Instant},
};

use imds_guard::{
    lab::{Lab, Place},
    record::{
        Recorder,
        output::{Format, Lines, LogFile, Outputs, Rotation, Sync, segments},
    },
};
use imds_guard_tests::{lab, run};
use nix::sys::stat::Mode;
use serde_json::Value;

use super::{Folder, ROTATION, all, numbered, record, said, to_file, verify};
use crate::{GUARD, INSTANCE_ID_PATH, outputs::Helper};

/// A small disk of the test's own.
pub struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    pub fn at(path: &'a Path) -> Self {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs"])
            .arg(path)
            .status()
            .unwrap();
        assert!(mounted.success());
        Self(path)
    }

    /// Leaves no room.
    pub fn fill(&self) {
        for number in 0.. {
            let file = self.0.join(format!("others{number}"));
            let full = fs::write(file, vec![0; 1 << 20]).unwrap_err();
            assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
            // The last file may have left less than a page.
            if number > 0 {
                return;
            }
        }
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Runs something in a thread, and threads that it starts, for which a system call fails.
fn without(call: i64, errno: i32, what: impl FnOnce() + Send) {
    let step = |code: u32, jf, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut steps = [
        // The call's number is the first field of what the filter sees.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    let filter = &raw const filter as usize;
    thread::scope(|scope| {
        scope.spawn(move || {
            // SAFETY: the filter outlives the scope, and the kernel copies it.
            let set =
                unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, filter) };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            what();
        });
    });
}

/// E3: the disk does not take what the kernel has taken: the lines are there, once, and none is lost.
#[test]
fn e3_lines_that_are_not_synced_are_written_all_the_same() {
    let folder = Folder::new("unsynced");
    let rotation = Rotation {
        sync: Sync::Batch,
        ..ROTATION
    };
    let outputs = to_file(&folder.log(), Format::chained(), rotation);
    let losses = outputs.losses();
    without(libc::SYS_fdatasync, libc::EIO, || record(outputs, 2000));
    assert_eq!(losses[0].events.load(Relaxed), 0);
    assert_eq!(all(&folder.log()).len(), 2000);
    let whole = verify(&folder.log(), &[]);
    assert!(whole.status.success(), "{}", said(&whole));
}

/// Some file systems cannot rename without replacing what is there.
#[test]
fn a_file_system_with_a_plain_rename_is_enough() {
    let folder = Folder::new("plain");
    let outputs = to_file(&folder.log(), Format::Json, ROTATION);
    without(libc::SYS_renameat2, libc::EINVAL, || record(outputs, 2000));
    assert_eq!(all(&folder.log()).len(), 2000);
    assert!(segments(folder.path(), "events.jsonl").len() > 2);
}

/// A log that is mounted into a container as a file cannot be renamed.
#[test]
fn a_log_that_cannot_be_put_away_stays_in_use() {
    let folder = Folder::new("stuck");
    fs::write(folder.log(), "").unwrap();
    let mounted = Command::new("mount")
        .arg("--bind")
        .args([folder.log(), folder.log()])
        .status();
    assert!(mounted.unwrap().success());
    let outputs = to_file(&folder.log(), Format::chained(), ROTATION);
    let losses = outputs.losses();
    record(outputs, 2000);
    let written = fs::read_to_string(folder.log()).unwrap().lines().count();
    let unmounted = Command::new("umount").arg(folder.log()).status().unwrap();
    assert!(unmounted.success());
    assert_eq!((losses[0].events.load(Relaxed), written), (0, 2000));
    assert!(segments(folder.path(), "events.jsonl").is_empty());
    assert!(verify(&folder.log(), &[]).status.success());
}

/// F3: a pipe is no way to get hold of events, or to hold up the start.
#[test]
fn f3_pipes_are_taken_only_where_nobody_else_can_put_them() {
    let folder = Folder::new("pipes");
    let pipe = folder.log();
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let why = |path: &Path| match LogFile::open(path, ROTATION) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(error) => error.to_string(),
    };
    assert!(why(&pipe).contains("nobody reads this pipe"));

    let reader = {
        let pipe = pipe.clone();
        thread::spawn(move || {
            let pipe = File::open(pipe).unwrap();
            thread::sleep(Duration::from_millis(300));
            BufReader::new(pipe).lines().count()
        })
    };
    let begun = Instant::now();
    let file = loop {
        match LogFile::open(&pipe, ROTATION) {
            Ok(file) => break file,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
        }
        thread::yield_now();
    };
    // More than a pipe holds, so that the guard has to wait for the reader.
    let outputs = Outputs::default().with("events", Lines::to_file(Format::Json, file));
    record(outputs, 2000);
    assert_eq!(reader.join().unwrap(), 2000);

    let link = folder.path().join("link");
    symlink(&pipe, &link).unwrap();
    why(&link);
    let shared = folder.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    let planted = shared.join("events.jsonl");
    nix::unistd::mkfifo(&planted, Mode::S_IRWXU).unwrap();
    let _reader = {
        let planted = planted.clone();
        thread::spawn(move || File::open(planted))
    };
    assert!(why(&planted).contains("others can put files"));
    // Lets its reader end.
    drop(fs::OpenOptions::new().write(true).open(&planted).unwrap());
}

/// `/dev/stdout` is a link to what this process has open.
#[test]
fn devices_are_taken_by_their_names() {
    let file = LogFile::open(Path::new("/dev/null"), ROTATION).unwrap();
    let outputs = Outputs::default().with("events", Lines::to_file(Format::Json, file));
    let (recorder, writer) = Recorder::start("h", outputs).unwrap();
    recorder.record(numbered(1));
    let losses = recorder.losses().to_vec();
    drop(recorder);
    writer.finish();
    assert_eq!(losses[0].events.load(Relaxed), 0);

    let lab = lab();
    let mut command = lab.guard_command(GUARD);
    let command = command.args(["--events", "/dev/stdout"]);
    let mut guard = Helper(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(guard.0.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains("\"started\""), "{first}");
}

/// E3: what a full disk costs is what `status` says.
#[test]
fn e3_status_tells_what_a_full_disk_has_cost() {
    let folder = Folder::new("costs");
    let disk = Disk::at(folder.path());
    let lab = lab();
    let config = format!("events = \"{}\"\n", folder.log().display());
    fs::write(lab.config(), config).unwrap();
    let _guard = Helper::watching(&mut lab.guard_command(GUARD));
    let old = folder
        .path()
        .join("events.jsonl.20260101T000000.000000Z.zst");
    fs::write(old, vec![0; 20_000]).unwrap();
    assert_eq!(seen(&lab), (0, 0, 0));
    disk.fill();
    let begun = Instant::now();
    loop {
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        let answer = imds_guard_tests::curl(&lab, Place::Host, &vec![url; 20]);
        assert_eq!(answer.status, 200, "requests do not wait for the disk");
        let (lost, files, bytes) = seen(&lab);
        if lost > 0 {
            assert_eq!((files, bytes), (1, 20_000));
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    let words = ask(&lab, &["status"]);
    let told = "1 old files of events removed to make room (20 KiB)";
    assert!(words.contains(told), "{words}");
}

/// Events lost, and files and bytes removed.
fn seen(lab: &Lab) -> (u64, u64, u64) {
    let status: Value = serde_json::from_str(&ask(lab, &["status", "--json"])).unwrap();
    let guard = &status["guard"];
    let removed = &guard["removed_by_output"]["events"];
    let numbers = [&guard["events_lost"], &removed["files"], &removed["bytes"]];
    let [lost, files, bytes] = numbers.map(|it| it.as_u64().unwrap());
    assert_eq!(guard["lost_by_output"]["events"], lost);
    (lost, files, bytes)
}

fn ask(lab: &Lab, arguments: &[&str]) -> String {
    said(&run(lab
        .command(Place::Guard, GUARD)
        .args(arguments)
        .env("IMDS_GUARD_RUN_DIR", lab.run_dir())
        .env("IMDS_GUARD_PINS", lab.pins())))
}
