//! `cargo xtask vm-test`: the kernel tests on the kernels that are still in use.
//!
//! Each boots in qemu, without hardware virtualisation and without any network device, into an image of
//! this host's programs and the very test binary that runs here.

mod image;
mod kernels;

use std::{
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    num::NonZero,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use image::Image;
use kernels::Kernel;
use xtask::{
    bpf,
    process::{self, cargo},
    workspace,
};

use crate::{apt, privilege::require_root, setup, test};

/// Programs, and the packages that bring them.
const NEEDS: [(&str, &str); 5] = [
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
];

/// qemu, and the packages of its program, its modules, and what it runs before a kernel. It looks for these
/// where it stands itself.
const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGES: [&str; 4] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
];

/// The tests that are about the kernel: redirect, attribution, layers, life of the programs, bypasses, hops.
const TESTS: [&str; 5] = [
    "redirect::",
    "caller::",
    "lifecycle::",
    "bypass::",
    "distance::",
];

/// What the last line of a machine begins with; the tests' exit code follows.
const MARK: &str = "IMDS-GUARD-VM-TEST";

/// How long a machine may take: several times what it does.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Runs the tests on each kernel. Arguments are names of tests, in place of all, and kernel lines such as
/// `5.10`, in place of all.
pub fn run(args: &[OsString]) -> Result<()> {
    require_root(
        "the tests need packages, and programs of the host",
        "sudo -E env PATH=$PATH cargo xtask vm-test",
    )?;
    if std::env::consts::ARCH != "x86_64" {
        bail!("vm-test knows Debian's kernels for x86-64 only, and this is another machine");
    }
    setup::run()?;
    let missing: Vec<_> = NEEDS
        .iter()
        .filter(|(program, _)| process::find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        apt::install(&missing)?;
    }
    let qemu = qemu()?;
    let folder = workspace().join("target/vm");
    fs::create_dir_all(&folder)?;
    let (lines, tests): (Vec<String>, Vec<String>) = args
        .iter()
        .map(|arg| arg.to_string_lossy().into_owned())
        .partition(|arg| arg.starts_with(|c: char| c.is_ascii_digit()));
    let kernels = kernels::provide(&folder, &lines)?;
    let python = test::python()?;
    let binaries = Binaries::build()?;

    let mut image = Image::new(folder.join("root"))?;
    image.add_programs(&python)?;
    image.add_program(&binaries.tests)?;
    image.add_program(&binaries.guard)?;
    image.add_as_it_is(&workspace().join("tests/tests/snapshots"))?;

    let tests = if tests.is_empty() {
        TESTS.map(str::to_owned).to_vec()
    } else {
        tests
    };
    let init = init(&binaries, &tests.join(" "));
    let mut machines = Vec::new();
    for kernel in kernels {
        let file = folder.join(format!("{}.cpio", kernel.release));
        image.write(&kernel, &init, &file)?;
        machines.push(Machine {
            log: folder.join(format!("{}.log", kernel.release)),
            image: file,
            kernel,
        });
    }
    let failed = run_all(&qemu, &machines)?;
    if failed.is_empty() {
        println!("vm-test: {} kernels passed, 0 failed", machines.len());
        Ok(())
    } else {
        bail!(
            "the tests failed on {}: {} has all that was said",
            failed.join(", "),
            folder.join("RELEASE.log").display()
        )
    }
}

/// A kernel, what it boots into, and where its words go.
struct Machine {
    kernel: Kernel,
    image: PathBuf,
    log: PathBuf,
}

/// Runs as many machines at a time as there are processors here. Returns the kernels that failed.
fn run_all<'a>(qemu: &Path, machines: &'a [Machine]) -> Result<Vec<&'a str>> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<&'a str>> {
        let mut failed = Vec::new();
        while let Some(machine) = machines.get(next.fetch_add(1, Ordering::Relaxed)) {
            let release = machine.kernel.release.as_str();
            let begun = Instant::now();
            let outcome = boot(qemu, machine)?;
            let took = begun.elapsed().as_secs();
            println!("vm-test: {release}: {} in {took} s", outcome.summary);
            if !outcome.passed {
                failed.push(release);
            }
        }
        Ok(failed)
    };
    let mut failed = Vec::new();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(result) => failed.extend(result?),
                Err(_) => bail!("a machine was not watched"),
            }
        }
        Ok(())
    })?;
    Ok(failed)
}

/// The host's own emulator, else one that is only unpacked: installed, its packages would have to be of
/// one version with others of qemu that the host has.
fn qemu() -> Result<PathBuf> {
    if let Some(program) = process::find(QEMU) {
        return Ok(program);
    }
    let folder = bpf::tools().join("qemu");
    apt::unpack_once(&QEMU_PACKAGES, &folder)?;
    Ok(folder.join("usr/bin").join(QEMU))
}

/// What runs in a machine.
struct Binaries {
    tests: PathBuf,
    guard: PathBuf,
}

impl Binaries {
    fn build() -> Result<Self> {
        let mut build = Command::new(cargo());
        build
            .args([
                "test",
                "--no-run",
                "--locked",
                "--package",
                "imds-guard-tests",
            ])
            .args(["--test", "whole", "--message-format", "json"])
            .stderr(Stdio::inherit())
            .current_dir(workspace());
        let messages = process::output(&mut build).context("the tests cannot be built")?;
        let tests = messages
            .lines()
            .filter(|line| line.contains("\"name\":\"whole\""))
            .filter_map(|line| line.split("\"executable\":\"").nth(1)?.split('"').next())
            .next_back()
            .context("cargo does not say where the tests are")?;
        let tests = PathBuf::from(tests);
        let guard = tests
            .parent()
            .and_then(Path::parent)
            .context("the tests are in no folder")?
            .join("guard-under-test");
        Ok(Self { tests, guard })
    }
}

fn init(binaries: &Binaries, tests: &str) -> String {
    let path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";
    format!(
        "#!/bin/busybox sh\n\
         export PATH={path}\n\
         busybox mount -t proc none /proc\n\
         busybox mount -t sysfs none /sys\n\
         busybox mount -t devtmpfs none /dev\n\
         busybox ln -sf /proc/self/fd /dev/fd\n\
         busybox mount -t cgroup2 none /sys/fs/cgroup\n\
         busybox chmod 1777 /tmp\n\
         busybox ln -sf \"$(busybox which busybox)\" /sbin/modprobe\n\
         echo /sbin/modprobe > /proc/sys/kernel/modprobe\n\
         for module in veth dummy macvlan ipvlan sctp cls_bpf sch_ingress fuse; do /sbin/modprobe $module; done\n\
         ip link set lo up\n\
         export RUST_BACKTRACE=0 RUST_LOG=warn INSTA_WORKSPACE_ROOT={workspace} \
         IMDS_GUARD_TEST_PYTHON=/bin/python3 IMDS_GUARD_TEST_RESTARTS=3\n\
         cd /tmp\n\
         {tests_binary} --test-threads=2 {tests}\n\
         echo {MARK} $?\n\
         busybox poweroff -f\n",
        workspace = workspace().display(),
        tests_binary = binaries.tests.display(),
    )
}

struct Outcome {
    passed: bool,
    summary: String,
}

/// Boots a kernel and follows what it says, until it has said how the tests ended.
fn boot(qemu: &Path, machine: &Machine) -> Result<Outcome> {
    let release = &machine.kernel.release;
    let mut log = fs::File::create(&machine.log)?;
    let mut process = Command::new(qemu)
        // Emulated, as hardware virtualisation does not work everywhere where there is a /dev/kvm; with
        // one plain processor each, as several machines run at a time.
        .args([
            "-accel", "tcg", "-cpu", "Nehalem", "-smp", "1", "-m", "1536",
        ])
        .args(["-nographic", "-no-reboot", "-nic", "none", "-kernel"])
        .arg(&machine.kernel.image)
        .arg("-initrd")
        .arg(&machine.image)
        .arg("-append")
        // An emulated timer may seem not to run, where others are busy here.
        .arg("console=ttyS0 quiet panic=-1 no_timer_check mitigations=off")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("qemu cannot be started")?;
    let output = process.stdout.take().context("qemu says nothing")?;
    let ended = Arc::new(AtomicBool::new(false));
    let watchdog = watch(process, Arc::clone(&ended));
    let mut summary = "did not finish".to_owned();
    let mut passed = false;
    let mut explains = false;
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        writeln!(log, "{line}")?;
        explains |= line == "failures:";
        if let Some((_, result)) = line.split_once("test result: ") {
            explains = false;
            summary = counts(result);
        } else if explains || line.starts_with("test ") {
            println!("{release}: {line}");
        }
        if let Some((_, code)) = line.split_once(MARK) {
            // Names that match no test are a mistake.
            passed = code.trim() == "0" && !summary.starts_with("0 ");
        }
    }
    ended.store(true, Ordering::Relaxed);
    if watchdog.join().is_err() {
        bail!("qemu was not watched");
    }
    Ok(Outcome { passed, summary })
}

/// How many passed and failed, of all that the tests' last line says.
fn counts(result: &str) -> String {
    let counts: Vec<_> = result
        .split(['.', ';'])
        .map(str::trim)
        .filter(|count| count.ends_with(" passed") || count.ends_with(" failed"))
        .collect();
    counts.join(", ")
}

/// Ends a machine that does not end by itself.
fn watch(mut machine: Child, ended: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let begun = Instant::now();
        while begun.elapsed() < TIMEOUT && !ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(100));
        }
        let _ended_already = machine.kill();
        let _reaped = machine.wait();
    })
}
