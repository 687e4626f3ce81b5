//! Session tokens are good where they were issued, and nowhere else.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use imds_guard::{
    lab::{Guard, Place, Room, fake_imds::INSTANCE_ID},
    policy::{Imds, Reason, Verdict},
    record::AnsweredBy,
};
use imds_guard_tests::{Sandbox, docker::Docker, lab, run};

use crate::{ADDRESSES, GUARD, INSTANCE_ID_PATH};

const PUT: [&str; 4] = [
    "-X",
    "PUT",
    "-H",
    "X-aws-ec2-metadata-token-ttl-seconds: 60",
];

/// What curl gets in a room: the status, and the body.
fn ask(room: &Room, address: &str, arguments: &[&str], path: &str) -> (String, String) {
    let output = run(room
        .command("curl")
        .args(["-sg", "--max-time", "20", "-w", "\n%{http_code}"])
        .args(arguments)
        .arg(format!("http://{address}{path}")));
    let text = String::from_utf8_lossy(&output.stdout);
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

fn token(room: &Room, address: &str) -> String {
    let (status, token) = ask(room, address, &PUT, "/latest/api/token");
    assert_eq!(status, "200", "{token}");
    token
}

/// The status of a v2 request with this token.
fn used(room: &Room, address: &str, token: &str) -> String {
    let header = format!("X-aws-ec2-metadata-token: {token}");
    ask(room, address, &["-H", &header], INSTANCE_ID_PATH).0
}

/// A guard that lets containers have tokens, too.
fn sandbox(arguments: &[&str]) -> Sandbox {
    let arguments = [&["--mode", "enforce", "--hop-limit", "2"], arguments].concat();
    let sandbox = Sandbox::new(GUARD, &arguments);
    sandbox.lab.imds().set_hop_limit(2);
    sandbox
}

/// B1: in another container or network namespace, over either family.
#[test]
fn b1_a_token_of_another_namespace_is_refused() {
    for arguments in [&[][..], &["--token-binding", "netns"]] {
        let sandbox = sandbox(arguments);
        let other = sandbox.lab.add_container("other").unwrap();
        let [host, container] = [Place::Host, Place::Container].map(|it| sandbox.lab.room(it));
        for address in [ADDRESSES[0], ADDRESSES[1]] {
            for room in [host, container, &other] {
                let token = token(room, address);
                assert_eq!(sandbox.request().imds, Some(Imds::Token));
                for elsewhere in [host, container, &other] {
                    let at_home = std::ptr::eq(room, elsewhere);
                    let expected = if at_home { "200" } else { "401" };
                    assert_eq!(used(elsewhere, address, &token), expected);
                    let event = sandbox.request();
                    if !at_home {
                        assert_eq!(
                            (event.verdict, event.reason, event.answered_by),
                            (Verdict::Deny, Reason::ForeignToken, AnsweredBy::Guard)
                        );
                    }
                }
            }
        }
        assert_eq!(sandbox.lab.imds().counters().v2_requests, 6);
    }
}

/// B1: in another container that shares the host's network, so that only the container differs.
#[test]
fn b1_a_token_of_another_container_is_refused() {
    let sandbox = sandbox(&[]);
    let docker = Docker::start(&sandbox.lab);
    let host = ["--network", "host"];
    let send = |request: &str| format!(r"printf '{request}\r\n\r\n' | nc 169.254.169.254 80");
    let put = send(r"PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60");
    let get = |token: &str| {
        send(&format!(
            r"GET {INSTANCE_ID_PATH} HTTP/1.0\r\nX-aws-ec2-metadata-token: {token}"
        ))
    };
    let first = docker.run(
        &host,
        &format!(
            "token=$({put} | tail -n 1); echo $token; {}",
            get("'$token'")
        ),
    );
    let (token, answer) = first.output.split_once('\n').unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{first:?}");
    assert!(answer.ends_with(INSTANCE_ID), "{first:?}");
    let second = docker.run(&host, &get(token));
    assert!(second.output.starts_with("HTTP/1.0 401"), "{second:?}");
    let reasons = [0; 3].map(|_| sandbox.request().reason);
    assert_eq!(
        reasons,
        [
            Reason::TokenRequest,
            Reason::SessionToken,
            Reason::ForeignToken
        ]
    );
    // Nor is it good on the host, whose network it was fetched in.
    assert_eq!(
        used(sandbox.lab.room(Place::Host), ADDRESSES[0], token),
        "401"
    );
}

/// B1: bound to a cgroup, or to nothing.
#[test]
fn b1_a_binding_can_be_narrower_or_none() {
    for (binding, elsewhere) in [("cgroup", "401"), ("netns", "200"), ("off", "200")] {
        let sandbox = sandbox(&["--token-binding", binding]);
        let neighbour = sandbox.lab.add_room(Place::Host, "neighbour").unwrap();
        let host = sandbox.lab.room(Place::Host);
        let token = token(host, ADDRESSES[0]);
        assert_eq!(used(host, ADDRESSES[0], &token), "200", "{binding}");
        assert_eq!(
            used(&neighbour, ADDRESSES[0], &token),
            elsewhere,
            "{binding}"
        );
    }
}

/// The service's own token never leaves the guard: past it, what clients have is worth nothing.
#[test]
fn b1_a_token_is_worth_nothing_where_the_guard_is_not() {
    let sandbox = sandbox(&["--on-stop", "detach"]);
    let sealed = token(sandbox.lab.room(Place::Host), ADDRESSES[0]);
    let (_, lab) = sandbox.stop();
    lab.imds().forget();
    assert_eq!(used(lab.room(Place::Host), ADDRESSES[0], &sealed), "401");
    assert_eq!(lab.imds().counters().v2_requests, 1, "the service said so");
}

#[test]
fn tokens_from_before_the_guard_keep_working_and_new_ones_outlive_it() {
    let lab = lab();
    let host = lab.room(Place::Host);
    let before = token(host, ADDRESSES[0]);
    let start = || Guard::start(&lab, Path::new(GUARD), ["--mode", "enforce"]).unwrap();
    let guard = start();
    assert_eq!(used(host, ADDRESSES[0], &before), "200");
    let sealed = token(host, ADDRESSES[0]);
    assert_eq!(used(host, ADDRESSES[0], &sealed), "200");
    guard.kill().unwrap();
    let _guard = start();
    assert_eq!(used(host, ADDRESSES[0], &sealed), "200", "after a restart");
    assert_eq!(used(host, ADDRESSES[0], &before), "200");
    assert_eq!(
        used(lab.room(Place::Container), ADDRESSES[0], &sealed),
        "401"
    );
}

/// B2: the keys are the guard's alone; and B2, E2: a place that somebody else prepared is not used.
#[test]
fn b2_the_keys_are_the_guards_alone() {
    let sandbox = sandbox(&[]);
    let directory = sandbox.lab.run_dir();
    let file = directory.join("token.keys");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&directory), mode(&file)), (0o700, 0o600));
    assert_eq!(fs::metadata(&file).unwrap().len(), 80);
    let read = run(sandbox
        .lab
        .command(Place::Host, "setpriv")
        .args(["--reuid", "65534", "--clear-groups", "cat"])
        .arg(&file));
    assert!(read.stdout.is_empty() && !read.status.success(), "{read:?}");

    let lab = lab();
    let directory = lab.run_dir();
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("elsewhere"), [7; 80]).unwrap();
    std::os::unix::fs::symlink("elsewhere", directory.join("token.keys")).unwrap();
    let _guard = Guard::start(&lab, Path::new(GUARD), ["--mode", "enforce"]).unwrap();
    let host = lab.room(Place::Host);
    let sealed = token(host, ADDRESSES[0]);
    assert_eq!(
        used(host, ADDRESSES[0], &sealed),
        "200",
        "with keys in memory"
    );
    assert_eq!(fs::read(directory.join("elsewhere")).unwrap(), [7; 80]);
}

/// B3, B4: a client cannot pass for somebody with a token by other means.
#[test]
fn b3_b4_only_a_token_in_its_header_is_a_token() {
    let sandbox = sandbox(&[]);
    let host = sandbox.lab.room(Place::Host);
    let token = token(host, ADDRESSES[0]);
    let _put = sandbox.request();
    let in_query = format!("{INSTANCE_ID_PATH}?X-aws-ec2-metadata-token={token}");
    let in_body = format!("X-aws-ec2-metadata-token={token}");
    let altered = format!("X-aws-ec2-metadata-token: {}A", &token[..token.len() - 1]);
    #[rustfmt::skip]
    let table = [
        (vec![], in_query.as_str(), Reason::NoToken),
        (vec!["-X", "GET", "-d", &in_body], INSTANCE_ID_PATH, Reason::NoToken),
        (vec!["-H", "X-aws-ec2-metadata-token;"], INSTANCE_ID_PATH, Reason::NoToken),
        (vec!["-H", "X-Imds-Guard: session_token"], INSTANCE_ID_PATH, Reason::NoToken),
        (vec!["-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"], INSTANCE_ID_PATH, Reason::NoToken),
        (vec!["-H", "X-aws-ec2-metadata-token: IG1."], INSTANCE_ID_PATH, Reason::InvalidToken),
        (vec!["-H", &altered], INSTANCE_ID_PATH, Reason::InvalidToken),
    ];
    for (arguments, path, reason) in table {
        let (status, _) = ask(host, ADDRESSES[0], &arguments, path);
        assert_eq!(status, "401", "{arguments:?} {path}");
        assert_eq!(sandbox.request().reason, reason, "{arguments:?} {path}");
    }
    let reached = sandbox.lab.imds().counters();
    assert_eq!((reached.requests, reached.tokens_issued), (1, 1));
}
