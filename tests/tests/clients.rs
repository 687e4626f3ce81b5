//! Real clients, unchanged, in every mode and over both families. What came of it is a table:
//! `docs/clients.md`.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use imds_guard::{
    lab::{
        HttpTokens, Lab, Place,
        fake_imds::{ACCESS_KEY_ID, INSTANCE_ID},
    },
    policy::{Imds, Reason, Verdict},
    record::{Kind, Request},
};
use imds_guard_tests::{Sandbox, python, run};

use crate::GUARD;

/// Set to write `docs/clients.md` anew.
const UPDATE: &str = "UPDATE_CLIENTS";

const INTRODUCTION: &str = "\
# Clients

Written by the tests (`tests/tests/clients.rs`; `UPDATE_CLIENTS=1` writes it anew): each client is the real \
one, unchanged, and asks a fake metadata service through the guard for the role's credentials, or the \
instance's identity.

- **audit** and **enforce**: on the host, in front of an instance that requires session tokens.
- **too far**: in a container, beyond the hop limit of enforce mode, in front of an instance that still \
answers IMDSv1. *token refused* is all that happens; *+ v1 refused* if the client then falls back to \
IMDSv1, which the event names a fall-back. Every request is answered at once: no client waits for its \
own time-out. How long it takes then is its own way of trying again.

The times are from one run, with start-up, and beside other tests.

| client | version | family | audit | enforce | too far |
|---|---|---|---|---|---|
";

/// A family, by the address that clients are given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn url(self) -> &'static str {
        match self {
            Self::V4 => "http://169.254.169.254",
            Self::V6 => "http://[fd00:ec2::254]",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A client.
struct Client {
    name: &'static str,
    /// Prints its version.
    version: Vec<String>,
    /// Fetches; a URL follows if it takes one.
    program: Vec<String>,
    takes_url: bool,
    /// What it prints of what it got.
    finds: &'static str,
    /// The executable's name in events.
    exe: &'static str,
    /// Whether it asks without a token when it gets none.
    falls_back: bool,
}

fn source(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    folder.join(name).display().to_string()
}

fn installed(name: &str) -> String {
    let path: PathBuf = xtask::bpf::tools().join("clients").join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo xtask setup`",
        path.display()
    );
    path.display().to_string()
}

fn clients() -> Vec<Client> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let python = python();
    let node = installed("node");
    let lock = source("rust/Cargo.lock");
    vec![
        Client {
            name: "curl, in a shell script",
            version: words(&["sh", "-c", "curl --version | head -n 1 | cut -d ' ' -f 2"]),
            program: words(&["sh", &source("curl.sh")]),
            takes_url: true,
            finds: ACCESS_KEY_ID,
            exe: "curl",
            falls_back: false,
        },
        Client {
            name: "wget, in a shell script",
            version: words(&["sh", "-c", "wget --version | head -n 1 | cut -d ' ' -f 3"]),
            program: words(&["sh", &source("wget.sh")]),
            takes_url: true,
            finds: ACCESS_KEY_ID,
            exe: "wget",
            falls_back: false,
        },
        Client {
            name: "a boot script like `ec2-metadata`",
            version: words(&["echo", "-"]),
            program: words(&["sh", &source("ec2-metadata.sh")]),
            takes_url: true,
            finds: INSTANCE_ID,
            exe: "curl",
            falls_back: true,
        },
        Client {
            name: "boto3",
            version: words(&[&python, "-c", "import boto3; print(boto3.__version__)"]),
            program: words(&[&python, &source("boto3_client.py")]),
            takes_url: false,
            finds: ACCESS_KEY_ID,
            exe: "python",
            falls_back: true,
        },
        Client {
            name: "SDK for Rust (`aws-config`)",
            version: words(&[
                "sh",
                "-c",
                &format!(
                    "grep -A1 '\"aws-config\"' {lock} | sed -n 's/version = \"\\(.*\\)\"/\\1/p'"
                ),
            ]),
            program: words(&[&installed("rust/debug/imds-guard-test-client")]),
            takes_url: false,
            finds: ACCESS_KEY_ID,
            exe: "imds-guard-test-client",
            falls_back: false,
        },
        Client {
            name: "SDK for JavaScript (`@smithy/credential-provider-imds`)",
            version: words(&[
                "node",
                "-p",
                &format!(
                    "require('{node}/node_modules/@smithy/credential-provider-imds/package.json').version"
                ),
            ]),
            program: words(&["node", &format!("{node}/index.js")]),
            takes_url: false,
            finds: ACCESS_KEY_ID,
            exe: "node",
            falls_back: true,
        },
        Client {
            name: "SDK for Go (`aws-sdk-go`)",
            version: words(&[&installed("go-client"), "version"]),
            program: words(&[&installed("go-client")]),
            takes_url: false,
            finds: ACCESS_KEY_ID,
            exe: "go-client",
            falls_back: true,
        },
        Client {
            name: "cloud-init, EC2 datasource",
            version: words(&[
                "/usr/bin/python3",
                "-c",
                "from cloudinit import version; print(version.version_string().split('-')[0])",
            ]),
            program: words(&["/usr/bin/python3", &source("cloud_init.py")]),
            takes_url: true,
            finds: INSTANCE_ID,
            exe: "python",
            falls_back: false,
        },
    ]
}

/// What came of it.
struct Outcome {
    text: String,
    took: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:.1} s)", self.text, self.took.as_secs_f32())
    }
}

impl Client {
    fn prepare<'a>(command: &'a mut Command, words: &[String]) -> &'a mut Command {
        let modules = installed("cloud-init/usr/lib/python3/dist-packages");
        command
            .args(&words[1..])
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", "/nonexistent")
            .env("AWS_REGION", "eu-west-1")
            .env("AWS_DEFAULT_REGION", "eu-west-1")
            // cloud-init looks for names that do not exist, and nobody answers here.
            .env("RES_OPTIONS", "timeout:1 attempts:1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONPATH", modules)
    }

    fn version(&self) -> String {
        let mut command = Command::new(&self.version[0]);
        let output = run(Self::prepare(&mut command, &self.version));
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(!version.is_empty(), "{}: {output:?}", self.name);
        version
    }

    /// Runs it. Returns what it printed, and how long that took.
    fn ask(&self, lab: &Lab, place: Place, family: Family) -> (String, Duration) {
        let mut command = lab.command(place, &self.program[0]);
        let command = Self::prepare(&mut command, &self.program)
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", family.to_string());
        if self.takes_url {
            command.arg(family.url());
        }
        let begun = Instant::now();
        let output = run(command);
        let took = begun.elapsed();
        (String::from_utf8_lossy(&output.stdout).into_owned(), took)
    }

    fn is_named(&self, request: &Request) -> bool {
        let exe = request.caller.exe.as_deref().unwrap_or_default();
        exe.rsplit('/')
            .next()
            .unwrap_or_default()
            .starts_with(self.exe)
    }

    /// On the host, where it must get what it asks for, by IMDSv2 alone.
    fn is_served(&self, sandbox: &Sandbox, family: Family) -> Outcome {
        let (printed, took) = self.ask(&sandbox.lab, Place::Host, family);
        let name = self.name;
        assert!(printed.contains(self.finds), "{name} {family}: {printed}");
        let requests = requests(sandbox);
        assert!(requests.len() > 1, "{name} {family}");
        for request in requests {
            assert!(self.is_named(&request), "{name}: {request:?}");
            assert_eq!(request.verdict, Verdict::Allow, "{name}: {request:?}");
            assert_ne!(request.imds, Some(Imds::V1), "{name}: {request:?}");
        }
        let text = "served".into();
        Outcome { text, took }
    }

    /// In a container too far away, where it must get nothing, and be told so at once.
    fn is_refused(&self, sandbox: &Sandbox, family: Family) -> Outcome {
        let (printed, took) = self.ask(&sandbox.lab, Place::Container, family);
        let name = self.name;
        assert!(!printed.contains(self.finds), "{name} {family}: {printed}");
        let requests = requests(sandbox);
        let (tokens, others): (Vec<_>, Vec<_>) = requests
            .into_iter()
            .partition(|request| request.imds == Some(Imds::Token));
        assert!(!tokens.is_empty(), "{name} {family}");
        for request in tokens {
            assert_eq!((request.reason, request.status), (Reason::HopLimit, 403));
            assert!(self.is_named(&request), "{name}: {request:?}");
        }
        assert_eq!(
            !others.is_empty(),
            self.falls_back,
            "{name} {family}: {others:?}"
        );
        for request in &others {
            assert_eq!((request.reason, request.status), (Reason::NoToken, 401));
            assert!(self.is_named(request), "{name}: {request:?}");
            // In a script, each program is a process of its own.
            assert_eq!(request.fallback, self.exe != "curl", "{name}: {request:?}");
        }
        let text = if others.is_empty() {
            "token refused".into()
        } else {
            "token refused, + v1 refused".into()
        };
        Outcome { text, took }
    }
}

/// The requests that there are events of: all of a client that has ended. Another request, of ours,
/// says where they end.
fn requests(sandbox: &Sandbox) -> Vec<Request> {
    const END: &str = "/the/end";
    let url = format!("http://169.254.169.254{END}");
    let _asked = sandbox.curl(Place::Host, &[url]);
    let events = std::iter::from_fn(|| sandbox.guard.event().ok());
    let requests = events.filter_map(|event| match event.kind {
        Kind::Request(request) => Some(*request),
        _ => None,
    });
    requests.take_while(|request| request.path != END).collect()
}

#[test]
fn every_client_in_every_mode_over_both_families() {
    let clients = clients();
    let runs: Vec<(&Client, Family)> = clients
        .iter()
        .flat_map(|client| [Family::V4, Family::V6].map(|family| (client, family)))
        .collect();
    let served = |mode: &str| {
        let sandbox = Sandbox::new(GUARD, &["--mode", mode]);
        sandbox.lab.imds().set_http_tokens(HttpTokens::Required);
        let outcomes = runs
            .iter()
            .map(|(client, family)| client.is_served(&sandbox, *family));
        outcomes.collect::<Vec<_>>()
    };
    let refused = || {
        let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
        let outcomes = runs
            .iter()
            .map(|(client, family)| client.is_refused(&sandbox, *family));
        let outcomes: Vec<_> = outcomes.collect();
        let reached = sandbox.lab.imds().counters();
        assert_eq!((reached.connections, reached.requests), (0, 0));
        outcomes
    };
    let (audit, enforce, far) = thread::scope(|scope| {
        let others = [
            scope.spawn(|| served("audit")),
            scope.spawn(|| served("enforce")),
        ];
        let far = refused();
        let [audit, enforce] = others.map(|other| other.join().unwrap());
        (audit, enforce, far)
    });

    let mut table = INTRODUCTION.to_owned();
    for (((client, family), far), (audit, enforce)) in
        runs.iter().zip(far).zip(audit.iter().zip(enforce))
    {
        let (name, version) = (client.name, client.version());
        table += &format!("| {name} | {version} | {family} | {audit} | {enforce} | {far} |\n");
    }
    keep(&table);
}

/// Compares the table with the one in `docs`, but for times and versions, which differ from one machine
/// to the next.
fn keep(table: &str) {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/clients.md");
    if env::var_os(UPDATE).is_some() {
        fs::write(docs, table).unwrap();
        return;
    }
    let kept = fs::read_to_string(docs).unwrap();
    let lasting = |table: &str| -> Vec<String> {
        let rows = table.lines().map(|line| {
            let cells = line.split('|').enumerate();
            let cells = cells.filter(|(number, _)| *number != 2);
            let cells = cells.map(|(_, cell)| cell.split(" (").next().unwrap_or_default().trim());
            cells.collect::<Vec<_>>().join("|")
        });
        rows.collect()
    };
    assert_eq!(
        lasting(table),
        lasting(&kept),
        "docs/clients.md is out of date: run this test with {UPDATE}=1"
    );
}

/// botocore falls back to IMDSv1 when its token request is refused, and finds out in audit mode, too, as
/// the instance's own limit holds there.
#[test]
fn a_client_beyond_the_instances_own_limit_does_not_wait() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "audit", "--hop-limit", "2"]);
    let clients = clients();
    let boto3 = clients
        .iter()
        .find(|client| client.name == "boto3")
        .unwrap();
    let (printed, _) = boto3.ask(&sandbox.lab, Place::Container, Family::V4);
    assert!(printed.contains(ACCESS_KEY_ID), "{printed}");
    let requests = requests(&sandbox);
    assert_eq!(requests[0].reason, Reason::InstanceHopLimit);
    let rest = &requests[1..];
    assert!(
        !rest.is_empty()
            && rest
                .iter()
                .all(|it| it.fallback && it.verdict == Verdict::Audit)
    );
}

#[test]
fn a_shell_script_with_curl_works_as_it_is() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let script = r#"
set -e
TOKEN=$(curl -sf -X PUT http://169.254.169.254/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600')
get() { curl -sf -H "X-aws-ec2-metadata-token: $TOKEN" "http://169.254.169.254/latest/$1"; }
ROLE=$(get meta-data/iam/security-credentials/)
get "meta-data/iam/security-credentials/$ROLE" | grep -o '"AccessKeyId" *: *"[A-Z]*"'
get user-data | wc -c
curl -sI -H "X-aws-ec2-metadata-token: $TOKEN" http://169.254.169.254/latest/meta-data/instance-id | tr -d '\r' | grep -i '^content-length'
"#;
    let output = run(sandbox.lab.command(Place::Host, "sh").args(["-c", script]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let mut lines = text.lines();
    assert!(lines.next().unwrap().contains(ACCESS_KEY_ID), "{text}");
    assert_eq!(lines.next().unwrap().trim(), "16384");
    assert_eq!(lines.next().unwrap(), "Content-Length: 19");
}
