//! Callers are named by what people know them as, each with the real thing.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use imds_guard::{
    lab::{Guard, Place},
    policy::{Caller, caller::Via},
    record::Kind,
};
use imds_guard_tests::{Sandbox, lab, python, run};

use crate::{GUARD, INSTANCE_ID_PATH, logs::Folder};

/// Processes that are to be named, every one.
const SHORT_LIVED: usize = 10_000;

/// Killed in the end.
struct Helper(std::process::Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn url() -> String {
    format!("http://169.254.169.254{INSTANCE_ID_PATH}")
}

fn sandbox() -> Sandbox {
    Sandbox::new(GUARD, &["--mode", "audit"])
}

fn program(folder: &Folder, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs a program on the host, and tells who called.
fn called(sandbox: &Sandbox, program: &str, arguments: &[&str]) -> Caller {
    let output = run(sandbox.lab.command(Place::Host, program).args(arguments));
    assert!(output.status.success(), "{output:?}");
    let caller = sandbox.caller();
    assert!(caller.resolved, "{caller:?}");
    caller
}

#[test]
fn scripts_are_named_with_their_interpreters() {
    let (sandbox, folder) = (sandbox(), Folder::new("scripts"));
    let url = url();
    let sync = format!("import urllib.request\nurllib.request.urlopen('{url}').read()\n");
    let sync = program(&folder, "sync.py", &sync);
    let python = python();
    let caller = called(&sandbox, &python, &["-u", &sync, "--all"]);
    assert_eq!(caller.script.as_deref(), Some(sync.as_str()));
    assert!(caller.exe.unwrap().contains("python"));

    // By its first line, and by a relative path.
    let direct = fs::read_to_string(&sync).unwrap();
    let direct = format!("#!{}\n{direct}", python);
    let direct = program(&folder, "direct", &direct);
    assert_eq!(
        called(&sandbox, &direct, &[]).script.as_deref(),
        Some(direct.as_str())
    );
    let within = format!(
        "cd {} && exec {} ./sync.py",
        folder.path().display(),
        python
    );
    assert_eq!(
        called(&sandbox, "sh", &["-c", &within]).script.as_deref(),
        Some(sync.as_str())
    );

    let perl = "use IO::Socket::INET; my $s = IO::Socket::INET->new('169.254.169.254:80');
        print $s \"GET /latest/meta-data/instance-id HTTP/1.0\\r\\n\\r\\n\"; my @a = <$s>;";
    let perl = program(&folder, "job.pl", perl);
    assert_eq!(
        called(&sandbox, "perl", &["-w", &perl]).script.as_deref(),
        Some(perl.as_str())
    );
    let bash = format!(
        "exec 3<>/dev/tcp/169.254.169.254/80; printf 'GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\n\\r\\n' >&3; read line <&3"
    );
    let bash = program(&folder, "run.sh", &bash);
    assert_eq!(
        called(&sandbox, "bash", &[&bash]).script.as_deref(),
        Some(bash.as_str())
    );
    let node = format!("require('http').get('{url}', answer => answer.resume())");
    let node = program(&folder, "index.js", &node);
    assert_eq!(
        called(&sandbox, "node", &[&node]).script.as_deref(),
        Some(node.as_str())
    );
    assert_eq!(called(&sandbox, "curl", &["-s", &url]).script, None);
}

#[test]
fn java_is_named_by_its_main_class_or_jar() {
    let (sandbox, folder) = (sandbox(), Folder::new("java"));
    let source = format!(
        "package com.example;\npublic class Job {{\n  public static void main(String[] a) throws Exception {{\n    new java.net.URL(\"{}\").openStream().readAllBytes();\n  }}\n}}\n",
        url()
    );
    let source = program(&folder, "Job.java", &source);
    let classes = folder.path().join("classes");
    let compiled = run(Command::new("javac")
        .arg("-nowarn")
        .arg("-d")
        .arg(&classes)
        .arg(&source));
    assert!(compiled.status.success(), "{compiled:?}");
    let path = classes.to_str().unwrap();
    let caller = called(
        &sandbox,
        "java",
        &["-Xmx64m", "-cp", path, "com.example.Job"],
    );
    assert_eq!(caller.script.as_deref(), Some("com.example.Job"));
    let jar = folder.path().join("job.jar");
    let packed = run(Command::new("jar")
        .args(["--create", "--main-class", "com.example.Job", "--file"])
        .arg(&jar)
        .args(["-C", path, "."]));
    assert!(packed.status.success(), "{packed:?}");
    let jar = jar.to_str().unwrap();
    let caller = called(&sandbox, "java", &["-Xmx64m", "-jar", jar]);
    assert_eq!(caller.script.as_deref(), Some(jar));
}

#[test]
fn busybox_is_named_by_its_applet_and_a_deleted_program_as_deleted() {
    let (sandbox, folder) = (sandbox(), Folder::new("applets"));
    let url = url();
    let caller = called(
        &sandbox,
        "busybox",
        &["wget", "-q", "-O", "/dev/null", &url],
    );
    assert_eq!(caller.script.as_deref(), Some("wget"));

    let script = "import os, socket, sys\n\
         os.unlink(os.environ['ITSELF'])\n\
         s = socket.create_connection(('169.254.169.254', 80))\n\
         s.sendall(b'GET /latest/meta-data/instance-id HTTP/1.0\\r\\n\\r\\n')\n\
         s.recv(4096)";
    let python = fs::canonicalize(python()).unwrap();
    let own = folder.path().join("python-own");
    fs::copy(&python, &own).unwrap();
    let output = run(sandbox
        .lab
        .command(Place::Host, &own)
        .args(["-c", script])
        .env("ITSELF", &own)
        .env("PYTHONHOME", python.parent().unwrap().parent().unwrap()));
    assert!(output.status.success(), "{output:?}");
    let caller = sandbox.caller();
    assert_eq!(caller.exe, Some(format!("{} (deleted)", own.display())));
    assert!(!caller.exe_verified);
}

/// Whoever logged in stays known, whoever they become.
#[test]
fn sudo_shows_who_logged_in() {
    let sandbox = sandbox();
    let script = "echo 65534 > /proc/self/loginuid && exec sudo -n -u \"#33\" curl -s \"$0\"";
    let caller = called(&sandbox, "sh", &["-c", script, &url()]);
    assert_eq!((caller.uid, caller.login.as_deref()), (33, Some("nobody")));
    assert!(caller.login_session.is_some());
    assert_eq!(caller.via, [Via::Sudo]);
}

/// Cron itself, with a table of its own.
#[test]
fn cron_is_named_as_what_started_a_caller() {
    let (sandbox, folder) = (sandbox(), Folder::new("cron"));
    let job = program(
        &folder,
        "job",
        &format!("* * * * * root /usr/bin/curl -s {} -o /dev/null\n", url()),
    );
    fs::set_permissions(&job, fs::Permissions::from_mode(0o644)).unwrap();
    let script = "for it in /etc/cron.d /var/spool/cron /run; do mount -t tmpfs tmpfs $it; done
        mkdir -p /var/spool/cron/crontabs
        mount --bind /dev/null /etc/crontab
        cp \"$0\" /etc/cron.d/job; exec cron -f";
    let cron = sandbox
        .lab
        .command(Place::Host, "unshare")
        .args(["--mount", "sh", "-c", script, &job])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _cron = Helper(cron);
    // It comes with the next minute.
    let caller = loop {
        match sandbox.guard.event() {
            Ok(event) => match event.kind {
                Kind::Request(request) => break request.caller,
                other => panic!("{other:?}"),
            },
            Err(error) if error.to_string().contains("no event") => {}
            Err(error) => panic!("{error:#}"),
        }
    };
    assert_eq!(caller.via, [Via::Cron], "{caller:?}");
}

/// A session of ssh, with the real server and client.
#[test]
fn ssh_is_named_as_what_a_caller_came_through() {
    let (sandbox, folder) = (sandbox(), Folder::new("ssh"));
    let at = |name: &str| folder.path().join(name).display().to_string();
    for key in ["host", "client"] {
        let made =
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)]));
        assert!(made.status.success(), "{made:?}");
    }
    let config = format!(
        "ListenAddress 127.0.0.1\nPort 2222\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nPidFile none\n\
         PermitRootLogin yes\nUsePAM no\n",
        at("host"),
        at("client.pub"),
    );
    let config = program(&folder, "config", &config);
    // It wants a user of its own, and a folder, which this host need not have.
    let script = "mount -t tmpfs tmpfs /run && mkdir /run/sshd && cp /etc/passwd /run/passwd &&
        { grep -q ^sshd: /run/passwd || echo sshd:x:65532:65534::/run/sshd:/bin/false >> /run/passwd; } &&
        mount --bind /run/passwd /etc/passwd && exec \"$0\" -D -e -f \"$1\"";
    let sshd = xtask::bpf::tools().join("openssh/usr/sbin/sshd");
    let mut sshd = sandbox
        .lab
        .command(Place::Host, "unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(sshd)
        .arg(config)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(sshd.stderr.take().unwrap()).lines();
    let _sshd = Helper(sshd);
    let mut said = said.map(Result::unwrap);
    assert!(
        said.any(|line| line.contains("Server listening")),
        "sshd has ended"
    );
    let options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "IdentitiesOnly=yes",
    ];
    let mut ssh = sandbox.lab.command(Place::Host, "ssh");
    for option in options {
        ssh.args(["-o", option]);
    }
    ssh.args([
        "-F",
        "none",
        "-i",
        &at("client"),
        "-p",
        "2222",
        "root@127.0.0.1",
        "/usr/bin/curl -s",
    ]);
    let output = run(ssh.arg(url()));
    assert!(output.status.success(), "{output:?}");
    let caller = sandbox.caller();
    assert!(caller.via.contains(&Via::Ssh), "{caller:?}");
}

/// A service is started by a timer of its name, or by that of its template, where systemd looks for units.
#[test]
fn a_timer_is_named_as_what_started_a_caller() {
    let lab = lab();
    // For the guard alone, as this host need not have systemd. The last one has the name that is written with
    // `\x2f`, and is in no folder of units.
    let units = "mount -t tmpfs tmpfs /run && cd /run && mkdir -p systemd/system systemd/transient etc &&
        touch systemd/system/backup.timer systemd/system/sync@.timer systemd/transient/once.timer etc/away.timer &&
        exec \"$@\"";
    let mut command = lab.command(Place::Guard, "unshare");
    command.args(["--mount", "sh", "-c", units, "sh", GUARD]);
    let guard = Guard::spawn(command.args(lab.guard_arguments())).unwrap();
    let sandbox = Sandbox { guard, lab };
    for (unit, has_timer) in [
        ("backup.service", true),
        ("sync@home.service", true),
        ("once.service", true),
        ("other.service", false),
        ("backup.scope", false),
        (r"..\x2f..\x2fetc\x2faway.service", false),
    ] {
        let room = sandbox.lab.add_room(Place::Host, unit).unwrap();
        run(room.command("curl").args(["-s", "-o", "/dev/null", &url()]));
        let caller = sandbox.caller();
        let is_named = caller.via.contains(&Via::Timer);
        assert_eq!(is_named, has_timer, "{caller:?}");
    }
}

/// A static program that connects, asks, is answered and ends within a millisecond or so: every one of ten
/// thousand is named.
#[test]
fn short_lived_processes_are_all_named() {
    let (sandbox, folder) = (sandbox(), Folder::new("short"));
    let source = program(&folder, "short.c", include_str!("short.c"));
    let short = folder.path().join("short");
    let compiled = run(Command::new("cc")
        .args(["-O2", "-static", "-o"])
        .arg(&short)
        .arg(&source));
    assert!(compiled.status.success(), "{compiled:?}");
    let mut many = sandbox
        .lab
        .command(Place::Host, &short)
        .arg(SHORT_LIVED.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut named = 0;
    for _ in 0..SHORT_LIVED {
        let caller = sandbox.caller();
        let is_named = caller.resolved && caller.exe.as_deref().map(Path::new) == Some(&short);
        named += usize::from(is_named);
    }
    assert!(many.wait().unwrap().success());
    assert_eq!(named, SHORT_LIVED);
}
