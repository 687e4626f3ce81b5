//! What a user without privileges finds in their way, and files that were prepared for the guard.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
};

use imds_guard::{
    lab::{Guard, Place},
    policy::caller::Unresolved,
};
use imds_guard_tests::{Sandbox, lab};
use nix::sys::signal::Signal;

use super::{
    Begun, ENFORCE, assert_untouched, attack, enforced, room, sockets_can_be_unbound, talk,
};
use crate::{GUARD, INSTANCE_ID_PATH};

/// C7: the forms of an IPv4 address that the C library takes for the same one.
#[test]
fn c7_numbers_for_an_address() {
    let sandbox = enforced();
    let hosts = [
        "2852039166",
        "0xA9FEA9FE",
        "0251.0376.0251.0376",
        "169.254.43518",
        "169.16689662",
        "[::ffff:a9fe:a9fe]",
        "[fd00:0ec2:0:0:0:0:0:0254]",
        "[fd00:ec2::254%25eth0]",
    ];
    for place in [Place::Host, Place::Container] {
        for host in hosts {
            let answer = sandbox.curl(place, &[format!("http://{host}{INSTANCE_ID_PATH}")]);
            assert_eq!(answer.status, 401, "{host}: {answer:?}");
            assert_eq!(sandbox.caller().comm, "curl");
        }
    }
    assert_untouched(&sandbox);
}

/// C9: a request that leaves by a named interface reaches the guard, though that interface does not lead
/// there.
#[test]
fn c9_curl_with_an_interface() {
    let sandbox = enforced();
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    let by = ["--interface", "eth0", "--max-time", "10", &url];
    assert_eq!(sandbox.curl(Place::Container, &by).status, 401);
    let expected = if sockets_can_be_unbound() { 401 } else { 0 };
    assert_eq!(sandbox.curl(Place::Host, &by).status, expected);
    assert_untouched(&sandbox);
}

/// C1: what the ways around need, and a user does not have.
#[test]
fn c1_an_unprivileged_user_has_none_of_the_means() {
    let sandbox = enforced();
    let script = r"
import ctypes, errno, os, socket, sys
pins, guard = sys.argv[1], int(sys.argv[2])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, means):
    try:
        means()
        print(name, 'done')
    except OSError as error:
        print(name, errno.errorcode[error.errno])
def link():
    # BPF_LINK_GET_FD_BY_ID of the first link there may be.
    if libc.syscall(321 if os.uname().machine == 'x86_64' else 280, 30, bytes(128), 128) < 0:
        raise OSError(ctypes.get_errno(), '')
tried('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255))
tried('packet', lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
tried('mark', lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1))
tried('link', link)
tried('pins', lambda: os.listdir(pins))
tried('signal', lambda: os.kill(guard, 9))
tried('memory', lambda: open(f'/proc/{guard}/mem', 'rb'))
tried('sockets', lambda: os.listdir(f'/proc/{guard}/fd'))
";
    let pins = sandbox.lab.pins();
    let guard = sandbox.guard.pid().to_string();
    let said = attack(
        room(&sandbox, Place::Host),
        script,
        &[pins.to_str().unwrap(), &guard],
    );
    let expected = [
        "raw EPERM",
        "packet EPERM",
        "mark EPERM",
        "link EPERM",
        "pins EACCES",
        "signal EPERM",
        "memory EACCES",
        "sockets EACCES",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), expected);
}

/// C8: the number of a process that is gone belongs to another one when the guard looks.
#[test]
fn c8_a_reused_process_id_is_not_taken_for_the_caller() {
    let sandbox = enforced();
    let host = room(&sandbox, Place::Host);
    let (mut client, mut said) = talk(host, include_str!("reuse.py"), &[]);
    assert_eq!(said(), "ready");
    // For a moment only: a guard that stands still for longer counts as dead.
    sandbox.guard.signal(Signal::SIGSTOP).unwrap();
    client.tell();
    let first: u32 = said().parse().unwrap();
    sandbox.guard.signal(Signal::SIGCONT).unwrap();
    let caller = sandbox.caller();
    assert_eq!((caller.pid, caller.resolved), (first, false));
    assert_eq!(caller.unresolved, Some(Unresolved::PidReused));
    assert_eq!(caller.exe, None);
    client.tell();
    assert_eq!(said(), "401");
    assert_untouched(&sandbox);
}

/// E1: what the guard leaves in the file system is root's alone.
#[test]
fn e1_pins_and_events_are_roots_alone() {
    let lab = lab();
    let events = lab.config().with_file_name("events.jsonl");
    let mut command = lab.guard_command(GUARD);
    command.args(ENFORCE).arg("--events").arg(&events);
    // Whatever the one who starts it leaves to others.
    let mut guard = {
        use std::os::unix::process::CommandExt as _;
        // SAFETY: umask(2) is async-signal-safe and cannot fail.
        unsafe {
            command.pre_exec(|| {
                libc::umask(0);
                Ok(())
            })
        };
        Begun(command.spawn().unwrap())
    };
    let started = || fs::read_to_string(&events).is_ok_and(|text| text.ends_with('\n'));
    while !started() {
        assert_eq!(guard.0.try_wait().unwrap(), None, "the guard did not start");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let is_roots_alone = |path: &std::path::Path| {
        let file = fs::symlink_metadata(path).unwrap();
        assert_eq!((file.uid(), file.gid()), (0, 0), "{}", path.display());
        let mode = file.permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
    };
    is_roots_alone(&events);
    fs::remove_file(&events).unwrap();
    is_roots_alone(&lab.pins());
    let mut pins = 0;
    for layout in fs::read_dir(lab.pins()).unwrap() {
        let layout = layout.unwrap().path();
        is_roots_alone(&layout);
        for pin in fs::read_dir(layout).unwrap() {
            is_roots_alone(&pin.unwrap().path());
            pins += 1;
        }
    }
    assert!(pins > 10, "{pins} pins");
}

/// E1, E2: a BPF file system is open to everybody unless it was mounted otherwise. Somebody who was
/// there first owns what the guard would keep its pins in, or leads it elsewhere.
#[test]
fn e1_e2_a_place_for_pins_that_is_somebody_elses_is_refused() {
    let lab = lab();
    let start = || Guard::spawn(lab.guard_command(GUARD).args(ENFORCE));
    let pins = lab.pins();

    fs::create_dir(&pins).unwrap();
    chown(&pins, Some(65534), Some(65534)).unwrap();
    assert!(start().is_err());
    fs::remove_dir(&pins).unwrap();

    fs::create_dir(&pins).unwrap();
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(start().is_err());
    fs::remove_dir(&pins).unwrap();

    let elsewhere = pins.with_file_name("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, &pins).unwrap();
    assert!(start().is_err());
    fs::remove_file(&pins).unwrap();

    drop(start().unwrap());
}

/// A fake service on another port is nobody's business: nothing of it is taken for the service's.
#[test]
fn c7_another_port_is_another_service() {
    let sandbox = Sandbox::new(GUARD, &ENFORCE);
    let script = r"
import socket, threading
server = socket.create_server(('127.0.0.1', 8080))
def serve():
    connection, _ = server.accept()
    connection.sendall(b'fake')
    connection.close()
threading.Thread(target=serve).start()
print(socket.create_connection(('127.0.0.1', 8080)).recv(9).decode())
for port in (79, 81, 254, 8080):
    try:
        socket.create_connection(('169.254.169.254', port), timeout=20)
    except ConnectionRefusedError:
        print('refused')
";
    let said = sandbox.python(Place::Host, script);
    assert_eq!(said, "fake\nrefused\nrefused\nrefused\nrefused");
    assert_untouched(&sandbox);
}
