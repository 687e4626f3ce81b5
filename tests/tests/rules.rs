//! Rules, on real callers and by real attacks on what rules rely on.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use imds_guard::{
    lab::{Guard, Lab, Place},
    policy::{Imds, Reason},
    record::Request,
};
use imds_guard_tests::{Sandbox, lab, python, run};
use sha2::{Digest as _, Sha256};

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

/// A directory that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("imds-guard-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a program.
    pub fn copy(&self, program: &Path, name: &str) -> PathBuf {
        let copy = self.0.join(name);
        fs::copy(program, &copy).unwrap();
        copy
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Where a program really is.
pub fn real(program: &str) -> PathBuf {
    let found = run(Command::new("sh").args(["-c", "command -v \"$0\"", program]));
    let path = String::from_utf8(found.stdout).unwrap();
    fs::canonicalize(path.trim()).unwrap()
}

/// A v1 request by a command that is given curl's arguments.
pub fn v1(sandbox: &Sandbox, command: &mut Command) -> (String, Request) {
    let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
    let output = run(command
        .args([
            "-s",
            "--max-time",
            "20",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
        ])
        .arg(url));
    let status = String::from_utf8_lossy(&output.stdout).into_owned();
    (status, sandbox.request())
}

/// A guard that sees another file system than the rest: what this shell command, which is given a path, has
/// mounted.
fn with_mount(lab: Lab, mount: &str, path: &Path) -> Sandbox {
    let script = format!("{mount} && exec \"$@\"");
    let mut command = lab.command(Place::Guard, "unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(path);
    command.arg(GUARD).args(lab.guard_arguments());
    let guard = Guard::spawn(&mut command).unwrap();
    Sandbox { guard, lab }
}

pub fn only(selectors: &str) -> String {
    format!(
        "mode = 'enforce'\n[[rule]]\nname = 'exception'\n{selectors}\nimds = 'v1'\naction = 'allow'\n"
    )
}

/// C3: the file counts, and not what it is called, by whomever.
#[test]
fn c3_a_rule_on_a_program_is_about_the_file_that_runs() {
    let curl = real("curl");
    let sandbox = Sandbox::configured(GUARD, &only(&format!("exe = '{}'", curl.display())));
    let folder = Folder::new("c3");
    let host = |program: &Path| sandbox.lab.command(Place::Host, program);
    let granted = |command: &mut Command| {
        let (status, event) = v1(&sandbox, command);
        assert_eq!(status == "200", event.rule.is_some(), "{event:?}");
        status == "200"
    };

    assert!(granted(&mut host(&curl)));
    let link = folder.0.join("link");
    symlink(&curl, &link).unwrap();
    assert!(granted(&mut host(&link)), "a link runs the same file");

    // The same content is another file.
    let copy = folder.copy(&curl, "curl");
    assert!(!granted(&mut host(&copy)));
    // What a process says of itself: its first argument, and the name of its thread.
    use std::os::unix::process::CommandExt as _;
    assert!(!granted(host(&copy).arg0(curl.as_os_str())));
    // Over the one that is allowed, in a mount namespace of its own: the name is the right one.
    let script = format!(
        "mount --bind {} {1} && exec {1} \"$@\"",
        copy.display(),
        curl.display()
    );
    let mut over = host(Path::new("unshare"));
    over.args(["--mount", "sh", "-c", &script, "sh"]);
    let (status, event) = v1(&sandbox, &mut over);
    assert_eq!(event.caller.exe.as_deref(), curl.to_str());
    assert_eq!((status.as_str(), event.caller.exe_verified), ("401", false));
    // And the allowed one under another name is what it is, if that name is the host's, too.
    let script = format!(
        "mount --bind {1} {0} && exec {0} \"$@\"",
        copy.display(),
        curl.display()
    );
    let mut under = host(Path::new("unshare"));
    assert!(!granted(under.args(["--mount", "sh", "-c", &script, "sh"])));
}

/// C3: a file that was deleted or replaced is none that anybody can look at.
#[test]
fn c3_a_replaced_program_is_not_the_one_in_its_place() {
    let folder = Folder::new("c3-replaced");
    let program = folder.copy(&real("bash"), "program");
    let sandbox = Sandbox::configured(GUARD, &only(&format!("exe = '{}'", program.display())));
    let script = format!(
        "while read -r; do exec 3<>/dev/tcp/169.254.169.254/80
         printf 'GET {INSTANCE_ID_PATH} HTTP/1.0\\r\\n\\r\\n' >&3
         read -r _ status _ <&3; echo $status; done"
    );
    use std::io::{BufRead as _, Write as _};
    let mut child = sandbox
        .lab
        .command(Place::Host, &program)
        .args(["-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut ask = || {
        writeln!(child.stdin.as_ref().unwrap(), "go").unwrap();
        let status = answers.next().unwrap().unwrap();
        (status, sandbox.request().caller.exe_verified)
    };
    assert_eq!(ask(), ("200".into(), true));
    let other = folder.copy(&real("curl"), "other");
    fs::rename(other, &program).unwrap();
    assert_eq!(ask(), ("401".into(), false));
    fs::remove_file(&program).unwrap();
    assert_eq!(ask(), ("401".into(), false));
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// C3: a program in a place that is too deep for the kernel to name it is none that is excluded for sure.
#[test]
fn c3_a_program_whose_path_is_too_long_is_denied_with_the_unknown() {
    let sandbox = Sandbox::configured(
        GUARD,
        "[[rule]]\nname = 'wget alone'\nexe = '!/usr/bin/wget'\naction = 'deny'\n",
    );
    let folder = Folder::new("c3-deep");
    let program = folder.copy(&real("curl"), "curl");
    let script = format!(
        r"
import os, sys
os.chdir({:?})
for _ in range(20):
    os.mkdir('x' * 250)
    os.chdir('x' * 250)
os.rename({program:?}, 'curl')
os.execv('./curl', ['curl', *sys.argv[1:]])
",
        folder.0
    );
    let mut deep = sandbox.lab.command(Place::Host, python());
    let (status, event) = v1(&sandbox, deep.args(["-c", &script]));
    assert_eq!((&event.caller.exe, event.caller.resolved), (&None, true));
    assert_eq!(status, "403");
    assert_eq!(event.rule.as_deref(), Some("wget alone"));
}

/// C3: a digest follows the content, wherever it is.
#[test]
fn c3_a_rule_on_a_digest_is_about_the_content() {
    let curl = real("curl");
    let bytes = fs::read(&curl).unwrap();
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|it| format!("{it:02x}"))
        .collect();
    let sandbox = Sandbox::configured(GUARD, &only(&format!("sha256 = '{digest}'")));
    let folder = Folder::new("c3-digest");
    let copy = folder.copy(&curl, "copy");
    let (status, event) = v1(&sandbox, &mut sandbox.lab.command(Place::Host, &copy));
    assert_eq!(
        (status.as_str(), event.caller.exe_sha256.clone()),
        ("200", Some(digest))
    );
    // ELF files may be longer than they say.
    fs::write(&copy, [&bytes[..], b"x"].concat()).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let (status, event) = v1(&sandbox, &mut sandbox.lab.command(Place::Host, &copy));
    assert_eq!((status.as_str(), event.rule), ("401", None));
}

/// C1, C2, C4: a rule is about the process and the user at `connect(2)`, whoever has the socket later.
#[test]
fn c1_c2_c4_a_rule_is_about_who_connected() {
    let sandbox = Sandbox::configured(GUARD, &only("uid = 0"));
    let ask = |before: &str, after: &str| {
        let script = format!(
            r"
import array, os, socket
def connect():
    s = socket.socket()
    s.connect(('169.254.169.254', 80))
    return s
def ask(s):
    s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\r\n\r\n')
    return s.recv(4096).split()[1].decode()
{before}
{after}
"
        );
        (sandbox.python(Place::Host, &script), sandbox.caller().uid)
    };
    let become_nobody = "os.setresuid(65534, 65534, 65534)";
    // C1
    let got = ask(become_nobody, "print(ask(connect()))");
    assert_eq!(got, ("401".into(), 65534));
    // C2: privileges that are dropped later do not matter, either way.
    let got = ask("s = connect()", &format!("{become_nobody}\nprint(ask(s))"));
    assert_eq!(got, ("200".into(), 0));
    // C4: an unprivileged process passes its connection to root.
    let pass = format!(
        "here, there = socket.socketpair()
pid = os.fork()
if pid == 0:
    {become_nobody}
    s = connect()
    socket.send_fds(there, [b'x'], [s.fileno()])
    there.recv(1)
    os._exit(0)
_, fds, _, _ = socket.recv_fds(here, 1, 1)"
    );
    let got = ask(
        &pass,
        "print(ask(socket.socket(fileno=fds[0]))); here.send(b'x'); os.wait()",
    );
    assert_eq!(got, ("401".into(), 65534));
    // C4: and inherited.
    let inherit =
        format!("r, w = os.pipe()\nif os.fork() == 0:\n    {become_nobody}\n    s = connect()");
    let got = ask(
        &inherit,
        "    print(ask(s), flush=True); os._exit(0)\nos.wait()",
    );
    assert_eq!(got, ("401".into(), 65534));
}

/// C8: whoever is gone when the guard looks is nobody, and no rule on a program is for them.
#[test]
fn c8_who_is_gone_gets_nothing_by_a_rule_on_a_program() {
    let python = real(&python());
    let sandbox = Sandbox::configured(GUARD, &only(&format!("exe = '{}'", python.display())));
    // The child connects and ends at once; the connection is its, and the parent asks.
    let script = format!(
        r"
import array, os, socket
here, there = socket.socketpair()
if os.fork() == 0:
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(('169.254.169.254', 80))
    socket.send_fds(there, [b'x'], [s.fileno()])
    os._exit(0)
_, fds, _, _ = socket.recv_fds(here, 1, 1)
os.wait()
s = socket.socket(fileno=fds[0])
s.setblocking(True)
s.sendall(b'GET {INSTANCE_ID_PATH} HTTP/1.0\r\n\r\n')
print(s.recv(4096).split()[1].decode())
"
    );
    // Which of the two is first is not certain, but what follows from it is.
    for _ in 0..20 {
        let status = sandbox.python(Place::Host, &script);
        let event = sandbox.request();
        let expected = if event.caller.exe_verified {
            "200"
        } else {
            "401"
        };
        assert_eq!(status, expected, "{event:?}");
        if !event.caller.resolved {
            assert_eq!(event.reason, Reason::UnknownCaller);
        }
    }
}

/// D1, D2: a path is denied in every form that the service would take for it, and no other path is.
#[test]
fn d1_d2_a_rule_on_a_path_holds_however_it_is_written() {
    let sandbox = Sandbox::configured(
        GUARD,
        "mode = 'enforce'\n[[rule]]\nname = 'no credentials'\npath = '/latest/meta-data/iam'\n\
         action = 'deny'\n",
    );
    let token = sandbox.token(Place::Host, ADDRESSES[0]);
    assert_eq!(sandbox.request().imds, Some(Imds::Token));
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let table = [
        ("/latest/meta-data/iam/security-credentials/", "403"),
        ("/latest/meta-data/iam", "403"),
        ("/latest/meta-data/iam/info", "403"),
        ("/latest//meta-data/iam/info", "403"),
        ("//latest/meta-data///iam/info", "403"),
        ("/latest/./meta-data/./iam/info", "403"),
        ("/latest/dynamic/../meta-data/iam/info", "403"),
        ("/latest/meta-data/%69am/info", "403"),
        ("/latest/meta-data/%69%61%6d/info", "403"),
        ("/latest/meta-data/iam/%2e%2e/iam/info", "403"),
        ("/1.0/meta-data/iam/info", "403"),
        ("/2021-07-15/meta-data/iam/info", "403"),
        (
            "/latest/meta-data/iam/info?x=/latest/meta-data/instance-id",
            "403",
        ),
        ("/latest/meta-data/%2569am/info", "400"),
        ("/latest/meta-data/iam//../iam/info", "400"),
        ("/latest/meta-data//../iam/info", "400"),
        ("/latest/meta-data/x//%2e%2e/iam/info", "400"),
        ("/latest/meta-data%2fiam/info", "400"),
        ("/latest/meta-data/iam;x=y/info", "400"),
        ("/latest/meta-data/iam%00/info", "400"),
        ("/latest/meta-data/iam%3finfo", "400"),
        ("/latest/meta-data/instance-id", "200"),
        ("/latest/meta-data/instance-id?/iam", "200"),
        ("/latest/meta-data/iamx", "404"),
        ("/latest/meta-data/iam.", "404"),
        ("/latest/meta-data/IAM/info", "404"),
        ("/latest/iam/info", "404"),
    ];
    for (path, expected) in table {
        let url = format!("http://169.254.169.254{path}");
        let answer = sandbox.curl(Place::Host, &["--path-as-is", "-H", &header, &url]);
        assert_eq!(answer.status.to_string(), expected, "{path}");
        let event = sandbox.request();
        assert_eq!(event.rule.is_some(), expected == "403", "{path}");
    }
}

/// D3: users whose names look alike are different users.
#[test]
fn d3_users_that_look_alike_are_told_apart() {
    let lab = lab();
    let folder = Folder::new("d3");
    let passwd = folder.0.join("passwd");
    // The last is Cyrillic; one is called by another's number; one uid has two names.
    let users = "root:x:0:0::/:/bin/sh\ndeploy:x:2001:2001::/:/bin/sh\nDeploy:x:2002:2002::/:/bin/sh\n\
                 deploy :x:2003:2003::/:/bin/sh\n2001:x:2004:2004::/:/bin/sh\n\
                 deploy2:x:2005:2005::/:/bin/sh\nd\u{435}ploy:x:2006:2006::/:/bin/sh\n\
                 other:x:2007:2007::/:/bin/sh\ndeploy:x:2007:2007::/:/bin/sh\n";
    fs::write(&passwd, users).unwrap();
    fs::write(lab.config(), only("user = 'deploy'")).unwrap();
    let sandbox = with_mount(lab, "mount --bind \"$0\" /etc/passwd", &passwd);
    for uid in 2001..=2007 {
        let mut curl = sandbox.lab.command(Place::Host, "setpriv");
        curl.args(["--reuid", &uid.to_string(), "--clear-groups", "curl"]);
        let (status, event) = v1(&sandbox, &mut curl);
        assert_eq!(status, if uid == 2001 { "200" } else { "401" }, "{event:?}");
    }
}
