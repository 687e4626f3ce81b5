//! The process behind a request is named, truly and completely.

use std::{os::unix::fs::MetadataExt as _, sync::Arc};

use imds_guard::{
    lab::{Guard, Place, fake_imds::SECRETS},
    policy::{
        Reason,
        caller::{Netns, Runtime, Unresolved},
    },
};
use imds_guard_tests::{Sandbox, lab, python, run};
use nix::sys::signal::Signal;

use crate::{GUARD, INSTANCE_ID_PATH};

const CONTAINER: &str = "3f4a0e6d1b2c5e7f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f";

#[test]
fn everything_about_a_caller_is_there() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = format!(
        "setpriv --reuid 65534 --regid 65533 --clear-groups curl -s 169.254.169.254{INSTANCE_ID_PATH}; true"
    );
    let mut shell = sandbox
        .lab
        .command(Place::Host, "sh")
        .args(["-c", &script])
        .spawn()
        .unwrap();
    let caller = sandbox.caller();
    let shell_pid = shell.id();
    shell.wait().unwrap();

    assert!(caller.resolved, "{caller:?}");
    assert_eq!(caller.unresolved, None);
    assert_eq!((caller.uid, caller.gid), (65534, 65533));
    assert_eq!(caller.user.as_deref(), Some("nobody"));
    assert_eq!(caller.comm, "curl");
    assert_eq!(caller.pid, caller.tid);
    let exe = caller.exe.unwrap();
    assert!(exe.ends_with("/curl"), "{exe}");
    let url = format!("169.254.169.254{INSTANCE_ID_PATH}");
    assert_eq!(caller.command_line.unwrap(), ["curl", "-s", &url]);
    assert_eq!(caller.netns, Netns::Host);

    let cgroup = sandbox.lab.cgroup().path().join("host");
    assert_eq!(caller.cgroup_id, std::fs::metadata(&cgroup).unwrap().ino());
    let path = caller.cgroup.unwrap();
    assert!(cgroup.ends_with(path.trim_start_matches('/')), "{path}");

    let parents: Vec<u32> = caller.parents.iter().map(|parent| parent.pid).collect();
    assert_eq!(parents[..2], [shell_pid, std::process::id()]);
    assert_eq!(parents.last(), Some(&1), "up to init: {parents:?}");
    let me = std::env::current_exe().unwrap();
    assert_eq!(caller.parents[1].exe.as_deref(), me.to_str());
    assert_eq!(caller.systemd_unit, None);
    assert_eq!(caller.container_id, None);
    assert_eq!(caller.pod_uid, None);
    assert!(caller.started.unwrap().ends_with('Z'));
}

#[test]
fn containers_units_and_threads_are_told_apart() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let docker = sandbox
        .lab
        .add_room(Place::Container, &format!("docker-{CONTAINER}.scope"))
        .unwrap();
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    run(docker.command("curl").args(["-s", &url]));
    let caller = sandbox.caller();
    assert_eq!(caller.container_id.as_deref(), Some(CONTAINER));
    assert_eq!(caller.container_runtime, Some(Runtime::Docker));
    assert_eq!(caller.user, None, "a container's users are not the host's");
    assert_eq!(caller.netns, Netns::Other);

    // A caller in a container can make cgroups of any name within its own.
    let within = docker.cgroup().child(&"0".repeat(64)).unwrap();
    let script = "echo 0 > \"$0/cgroup.procs\"; exec \"$@\"";
    let forged = [within.path().to_str().unwrap(), "curl", "-s", &url];
    run(docker.command("sh").args(["-c", script]).args(forged));
    assert_eq!(sandbox.caller().container_id.as_deref(), Some(CONTAINER));

    let pod = "kubepods-burstable-pod1a2b3c4d_1111_2222_3333_444455556666.slice";
    let pod = sandbox.lab.add_room(Place::Container, pod).unwrap();
    run(pod.command("curl").args(["-s", &url]));
    let uid = "1a2b3c4d-1111-2222-3333-444455556666";
    assert_eq!(sandbox.caller().pod_uid.as_deref(), Some(uid));

    let service = sandbox.lab.add_room(Place::Host, "backup.service").unwrap();
    run(service.command("curl").args(["-s", &url]));
    let caller = sandbox.caller();
    assert_eq!(caller.systemd_unit.as_deref(), Some("backup.service"));
    assert_eq!(caller.netns, Netns::Host);

    let script = format!(
        "import threading, urllib.request, urllib.error\n\
         def ask():\n    \
             try: urllib.request.urlopen('{url}')\n    \
             except urllib.error.HTTPError as e: print(e.code)\n\
         t = threading.Thread(target=ask); t.start(); t.join()"
    );
    assert_eq!(sandbox.python(Place::Host, &script), "401");
    let caller = sandbox.caller();
    assert_ne!(caller.pid, caller.tid);
    assert!(caller.resolved);
    assert!(caller.exe.unwrap().contains("python"));
}

#[test]
fn a_caller_that_is_gone_is_not_guessed() {
    // What the kernel's numbers tell is known, and rules on that hold, in audit mode, too.
    let rule = "[[rule]]\nname = 'a'\ncgroup = '**/host'\naction = 'deny'";
    let sandbox = Sandbox::configured(GUARD, &format!("mode = 'audit'\n{rule}"));
    let script = format!(
        "import socket, os\n\
         s = socket.socket()\n\
         wait()\n\
         s.connect(('169.254.169.254', 80))\n\
         s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\n\\r\\n')\n\
         print(os.getpid())"
    );
    let client = sandbox.python_waiting(Place::Host, &script);
    // The kernel completes the connection and keeps the request; the guard sees it afterwards.
    sandbox.guard.signal(Signal::SIGSTOP).unwrap();
    let pid: u32 = client.go().parse().unwrap();
    sandbox.guard.signal(Signal::SIGCONT).unwrap();

    let event = sandbox.request();
    assert_eq!(event.rule.as_deref(), Some("a"));
    let caller = Arc::unwrap_or_clone(event.caller);
    assert_eq!(
        (caller.pid, caller.uid),
        (pid, 0),
        "what the kernel saw is there"
    );
    assert!(caller.comm.starts_with("python"), "{}", caller.comm);
    assert!(!caller.resolved);
    assert_eq!(caller.unresolved, Some(Unresolved::Gone));
    assert_eq!((caller.exe, caller.command_line), (None, None));
    let cgroup = caller.cgroup.unwrap();
    assert!(cgroup.ends_with("/host"), "{cgroup}");
    // With hierarchies of cgroup v1, it may be in a container by one of these.
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let named = own.lines().all(|line| line.starts_with("0::"));
    assert_eq!(caller.user.is_some(), named);
}

/// C8: a process whose main thread has ended looks as if it were gone, and can still ask: it is known by the
/// thread that does.
#[test]
fn c8_a_process_without_its_main_thread_is_known_all_the_same() {
    let rules = [
        ("unit", "systemd_unit = 'headless.service'"),
        ("container", &format!("container_id = '{CONTAINER}'")),
        ("cgroup", "cgroup = '**/headless'"),
        ("user", "user = 'nobody'"),
        ("program", "exe = '/**/python3*'"),
    ];
    let rules = rules.map(|(name, selector)| {
        format!("[[rule]]\nname = '{name}'\n{selector}\naction = 'deny'\n")
    });
    let script = format!(
        "import ctypes, os, socket, threading, time
if os.getuid() != int(os.environ['AS']): os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)
pid = os.getpid()
def ask():
    while open(f'/proc/{{pid}}/stat').read().split(') ')[1][0] != 'Z': time.sleep(.01)
    s = socket.socket(); s.connect(('169.254.169.254', 80))
    s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\n\\r\\n')
    print(s.recv(4096).split()[1].decode(), flush=True)
    os._exit(0)
threading.Thread(target=ask).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)"
    );
    let container = format!("docker-{CONTAINER}.scope");
    let table = [
        ("headless.service", "0", "unit"),
        (&container, "0", "container"),
        ("headless", "0", "cgroup"),
        ("other", "65534", "user"),
        ("another", "0", "program"),
    ];
    let config = format!("mode = 'audit'\n{}", rules.concat());
    let sandbox = Sandbox::configured(GUARD, &config);
    for (name, user, rule) in table {
        let room = sandbox.lab.add_room(Place::Host, name).unwrap();
        let mut command = room.command(python());
        let output = run(command.args(["-c", &script]).env("AS", user));
        assert!(!output.stdout.is_empty(), "{output:?}");
        let event = sandbox.request();
        let caller = &event.caller;
        assert!(caller.resolved && caller.pid != caller.tid, "{caller:?}");
        assert_eq!(event.rule.as_deref(), Some(rule), "{caller:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "403");
    }
}

/// C3: a program in a file system that does not answer the guard holds up its caller alone, and is not taken for
/// another one.
#[test]
fn c3_a_file_system_that_does_not_answer_holds_up_nobody_else() {
    let folder = crate::logs::Folder::new("hangs");
    let curl = folder.path().join("curl");
    std::fs::copy("/usr/bin/curl", &curl).unwrap();
    let lab = lab();
    // A pattern, as the guard looks for names when it starts.
    let rule = format!(
        "mode = 'enforce'\n[[rule]]\nname = 'a'\nexe = '{}*'\nimds = 'v1'\naction = 'allow'\n",
        curl.display()
    );
    std::fs::write(lab.config(), rule).unwrap();
    // For the guard alone, there is a file system over it that nobody serves: each look waits.
    let mount = "import ctypes, os, sys
fuse = os.open('/dev/fuse', os.O_RDWR)
os.set_inheritable(fuse, True)
options = f'fd={fuse},rootmode=40000,user_id=0,group_id=0'.encode()
assert ctypes.CDLL(None).mount(b'none', sys.argv[1].encode(), b'fuse', 0, options) == 0
os.execv(sys.argv[2], sys.argv[2:])";
    let mut command = lab.command(Place::Guard, "unshare");
    command
        .args(["--mount", &python(), "-c", mount])
        .arg(folder.path());
    command.arg(GUARD).args(lab.guard_arguments());
    let guard = Guard::spawn(&mut command).unwrap();
    let sandbox = Sandbox { guard, lab };
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    let ask = ["-s", "-o", "/dev/null", "--max-time", "20", &url];
    let room = sandbox.lab.add_room(Place::Host, "hangs").unwrap();
    let mut waiting: Vec<_> = (0..6)
        .map(|_| room.command(&curl).args(ask).spawn().unwrap())
        .collect();
    assert_eq!(sandbox.curl(Place::Host, &[&url]).status, 401);
    for child in &mut waiting {
        assert!(child.wait().unwrap().success());
    }
    for _ in 0..=waiting.len() {
        let event = sandbox.request();
        let expected = match event.caller.exe.as_deref() == curl.to_str() {
            true => Reason::UnknownCaller,
            false => Reason::NoToken,
        };
        assert_eq!(event.reason, expected, "{event:?}");
        assert!(
            event.caller.resolved
                && event.caller.command_line.is_some() != (expected == Reason::UnknownCaller)
        );
    }
}

/// F1: no token, credential or body ever reaches an event or a message, however much is logged.
#[test]
fn f1_secrets_reach_no_output() {
    let log = std::env::temp_dir().join(format!("imds-guard-test-{}-secrets", std::process::id()));
    let file = std::fs::File::create(&log).unwrap();
    let others = crate::logs::Folder::new("secrets");
    let [ocsf, emf, metrics] = ["ocsf", "emf", "metrics"].map(|name| {
        let path = others.path().join(name);
        path.to_str().unwrap().to_owned()
    });
    let arguments = [
        "--mode",
        "audit",
        "--kernel-log",
        "trace",
        "--events",
        "-",
        "--ocsf",
        &ocsf,
        "--emf",
        &emf,
        "--metrics",
        &metrics,
    ];
    let sandbox = Sandbox::with(GUARD, &arguments, |command| {
        command.stderr(file).env("RUST_LOG", "trace");
    });
    let token = sandbox.token(Place::Host, "169.254.169.254");
    let header = format!("X-aws-ec2-metadata-token: {token}");
    for path in [
        "/latest/meta-data/iam/security-credentials/demo-role",
        "/latest/user-data",
        "/?t=hush-hush",
    ] {
        let url = format!("http://169.254.169.254{path}");
        assert_ne!(sandbox.curl(Place::Host, &["-H", &header, &url]).status, 0);
        assert_ne!(sandbox.curl(Place::Host, &[&url]).status, 0);
    }
    let mut lines = Vec::new();
    for _ in 0..7 {
        lines.push(sandbox.guard.line().unwrap().0);
    }
    let scraped = run(std::process::Command::new("curl").args([
        "-s",
        "--unix-socket",
        &metrics,
        "http://h/",
    ]));
    let (_, _lab) = sandbox.stop();
    for file in [&ocsf, &emf] {
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains("/latest/user-data"), "{text}");
        lines.push(text);
    }
    lines.push(String::from_utf8_lossy(&scraped.stdout).into_owned());
    assert!(
        lines
            .last()
            .unwrap()
            .contains("imds_guard_v1_requests_total")
    );
    lines.push(std::fs::read_to_string(&log).unwrap());
    std::fs::remove_file(&log).unwrap();
    let output = lines.join("\n");
    assert!(output.contains("/latest/user-data"));
    for secret in SECRETS.into_iter().chain([token.as_str()]) {
        assert!(!output.contains(secret), "{secret} in {output}");
    }
    let events = lines[..7].join("\n");
    // The query stands in curl's command line, but not in the path.
    assert!(!events.contains(r#""path":"/?t"#));
}
