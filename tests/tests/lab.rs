//! The lab itself: a test that relies on it must be able to rely on it. Needs root and curl.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use imds_guard::lab::fake_imds::{INSTANCE_ID, ROLE, SECRET_ACCESS_KEY, TOKEN_PREFIX};
use imds_guard::lab::{
    CONTAINER_V4, CONTAINER_V6, Cgroup, Counters, HOST_V4, HttpTokens, Lab, LabConfig, NetNs,
    Place, sweep,
};

const V4: &str = "http://169.254.169.254";
const V6: &str = "http://[fd00:ec2::254]";
const MAPPED: &str = "http://[::ffff:169.254.169.254]";
const ID: &str = "/latest/meta-data/instance-id";
const TOKEN: &str = "/latest/api/token";
const MINUTE: &str = "X-aws-ec2-metadata-token-ttl-seconds: 60";

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    mount.unwrap().split(' ').nth(4).unwrap().into()
}

fn lab() -> Lab {
    Lab::new(LabConfig::new(cgroup_root())).unwrap()
}

/// An answer as curl shows it.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

/// Runs curl; the error is its exit code (28: timed out, 7: refused).
fn curl(mut command: Command, arguments: &[&str]) -> Result<Answer, i32> {
    let options = ["-qsi", "--noproxy", "*", "--path-as-is", "--max-time", "1"];
    let Output { status, stdout, .. } = command.args(options).args(arguments).output().unwrap();
    if !status.success() {
        return Err(status.code().unwrap());
    }
    let text = String::from_utf8(stdout).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Ok(Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.into(),
        body: body.into(),
    })
}

fn get(lab: &Lab, place: Place, base: &str, path: &str, more: &[&str]) -> Result<Answer, i32> {
    let url = format!("{base}{path}");
    curl(
        lab.command(place, "curl"),
        &[&[url.as_str()], more].concat(),
    )
}

fn put_token(lab: &Lab, place: Place, base: &str, more: &[&str]) -> Result<Answer, i32> {
    get(lab, place, base, TOKEN, &[&["-X", "PUT"], more].concat())
}

fn with(token: &str) -> String {
    format!("X-aws-ec2-metadata-token: {token}")
}

#[test]
fn host_and_container_reach_the_service() {
    let lab = lab();
    for place in [Place::Host, Place::Container, Place::Guard] {
        for base in [V4, V6, MAPPED] {
            let answer = get(&lab, place, base, ID, &[]).unwrap();
            assert_eq!((answer.status, answer.body.as_str()), (200, INSTANCE_ID));
        }
    }
    let peers: Vec<_> = lab
        .imds()
        .requests()
        .iter()
        .map(|seen| seen.peer.ip())
        .collect();
    assert_eq!(peers[0], HOST_V4);
    assert_eq!(peers[3], CONTAINER_V4);
    assert_eq!(peers[4], CONTAINER_V6);
    assert_eq!(peers[5], CONTAINER_V4);
    let counters = lab.imds().counters();
    assert_eq!(
        counters,
        Counters {
            connections: 9,
            requests: 9,
            v1_requests: 9,
            ..Counters::default()
        }
    );
    lab.imds().forget();
    assert_eq!(lab.imds().counters(), Counters::default());
    assert!(lab.imds().requests().is_empty());
}

#[test]
fn answers_look_like_the_real_ones() {
    let lab = lab();
    let host = Place::Host;
    let token = put_token(&lab, host, V4, &["-H", MINUTE]).unwrap();
    assert_eq!(token.status, 200);
    assert!(token.body.starts_with(TOKEN_PREFIX) && token.body.len() == 56);
    for line in [
        "Content-Length: 56",
        "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 60",
        "Server: EC2ws",
    ] {
        assert!(token.head.contains(line), "{}", token.head);
    }

    let path = format!("/2021-07-15/meta-data/iam/security-credentials/{ROLE}");
    let credentials = get(&lab, host, V6, &path, &["-H", &with(&token.body)]).unwrap();
    assert_eq!(credentials.status, 200);
    assert!(credentials.body.contains(SECRET_ACCESS_KEY));
    for line in [
        "Content-Type: text/plain",
        "Accept-Ranges: none",
        "Last-Modified: ",
    ] {
        assert!(credentials.head.contains(line), "{}", credentials.head);
    }
    assert!(
        credentials
            .head
            .contains("X-Aws-Ec2-Metadata-Token-Ttl-Seconds: ")
    );
    assert!(credentials.head.contains(" GMT") && !credentials.head.contains("Connection: close"));

    let refused = get(&lab, host, V4, ID, &["-H", &with("nonsense")]).unwrap();
    assert!(refused.body.contains("<title>401 - Unauthorized</title>"));
    assert!(refused.head.contains("Content-Type: text/html"));

    let head = get(&lab, host, V4, ID, &["-I"]).unwrap();
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert!(
        head.head
            .contains(&format!("Content-Length: {}", INSTANCE_ID.len()))
    );

    lab.imds().set_keep_alive(false);
    let last = get(&lab, host, V4, ID, &[]).unwrap();
    assert!(last.head.contains("Connection: close"), "{}", last.head);
}

#[test]
fn mistakes_get_their_status() {
    let lab = lab();
    let ttl = |value: &str| format!("X-aws-ec2-metadata-token-ttl-seconds: {value}");
    let status = |path: &str, more: &[&str]| get(&lab, Place::Host, V4, path, more).unwrap().status;

    for bad in [
        "0",
        "21601",
        "-1",
        "+1",
        "abc",
        "",
        "99999999999999999999999",
    ] {
        assert_eq!(status(TOKEN, &["-X", "PUT", "-H", &ttl(bad)]), 400, "{bad}");
    }
    assert_eq!(status(TOKEN, &["-X", "PUT"]), 400);
    assert_eq!(status(TOKEN, &["-X", "PUT", "-H", &ttl("21600")]), 200);
    let forwarded = ["-X", "PUT", "-H", MINUTE, "-H", "X-Forwarded-For: 10.0.0.1"];
    assert_eq!(status(TOKEN, &forwarded), 403);

    assert_eq!(status(ID, &["-H", &with("nonsense")]), 401);
    assert_eq!(status(ID, &["-H", "X-aws-ec2-metadata-token;"]), 401);
    assert_eq!(status("/latest/meta-data/nothing", &[]), 404);
    assert_eq!(status("/newest/", &[]), 404);
    assert_eq!(status(ID, &["-X", "POST"]), 405);
    assert_eq!(status(ID, &["-X", "PUT"]), 405);
    assert_eq!(status(TOKEN, &[]), 405);
    for listing in [
        "/",
        "/latest",
        "/latest/meta-data/",
        "/latest/meta-data",
        "/1.0/user-data",
    ] {
        assert_eq!(status(listing, &[]), 200, "{listing}");
    }

    lab.imds().set_http_tokens(HttpTokens::Required);
    assert_eq!(status(ID, &[]), 401);
    lab.imds().set_enabled(false);
    assert_eq!(status(ID, &[]), 403);
    assert_eq!(status(TOKEN, &["-X", "PUT", "-H", MINUTE]), 403);

    let counters = lab.imds().counters();
    assert_eq!((counters.token_puts, counters.tokens_issued), (11, 1));
    assert_eq!((counters.v1_rejected, counters.v2_requests), (2, 2));
}

#[test]
fn the_hop_limit_stops_token_replies_and_nothing_else() {
    let lab = lab();
    for base in [V4, V6] {
        lab.imds().set_hop_limit(1);
        let token = put_token(&lab, Place::Host, base, &["-H", MINUTE]).unwrap();
        assert_eq!(token.status, 200);
        let lost = put_token(&lab, Place::Container, base, &["-H", MINUTE]);
        assert_eq!(lost.unwrap_err(), 28, "curl did not time out");
        // As with the real service, version 1 and tokens from elsewhere work there.
        assert_eq!(
            get(&lab, Place::Container, base, ID, &[]).unwrap().status,
            200
        );
        let v2 = get(
            &lab,
            Place::Container,
            base,
            ID,
            &["-H", &with(&token.body)],
        );
        assert_eq!(v2.unwrap().status, 200);

        lab.imds().set_hop_limit(2);
        let token = put_token(&lab, Place::Container, base, &["-H", MINUTE]).unwrap();
        assert_eq!(token.status, 200);
    }
}

#[test]
fn the_hop_limit_ends_with_the_reply_on_a_kept_connection() {
    let lab = lab();
    lab.imds().set_hop_limit(2);
    let answers = lab.container().run(|| {
        let mut stream = TcpStream::connect("169.254.169.254:80").unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let mut ask = |request: &str| {
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = [0; 2048];
            let size = stream.read(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..size]).into_owned()
        };
        let token = ask(&format!(
            "PUT {TOKEN} HTTP/1.1\r\nHost: imds\r\n{MINUTE}\r\n\r\n"
        ));
        lab.imds().set_hop_limit(1);
        [
            token,
            ask(&format!("GET {ID} HTTP/1.1\r\nHost: imds\r\n\r\n")),
        ]
    });
    assert!(
        answers
            .unwrap()
            .iter()
            .all(|answer| answer.starts_with("HTTP/1.1 200 OK"))
    );
    assert_eq!(lab.imds().counters().connections, 1);
}

#[test]
fn tokens_expire() {
    let lab = lab();
    let status = |token: &str| {
        get(&lab, Place::Host, V4, ID, &["-H", &with(token)])
            .unwrap()
            .status
    };
    let second = "X-aws-ec2-metadata-token-ttl-seconds: 1";
    let short = put_token(&lab, Place::Host, V4, &["-H", second])
        .unwrap()
        .body;
    let long = put_token(&lab, Place::Host, V4, &["-H", MINUTE])
        .unwrap()
        .body;
    assert_eq!((status(&short), status(&long)), (200, 200));
    thread::sleep(Duration::from_millis(1100));
    assert_eq!((status(&short), status(&long)), (401, 200));
    lab.imds().expire_tokens();
    assert_eq!(status(&long), 401);
}

#[test]
fn faults_can_be_made() {
    let lab = lab();
    lab.imds().set_delay(Duration::from_millis(300));
    let start = Instant::now();
    assert_eq!(get(&lab, Place::Host, V4, ID, &[]).unwrap().status, 200);
    assert!(start.elapsed() >= Duration::from_millis(300));
    lab.imds().set_delay(Duration::from_secs(9));
    assert_eq!(get(&lab, Place::Host, V4, ID, &[]).unwrap_err(), 28);
    lab.imds().set_delay(Duration::ZERO);

    lab.imds().refuse().unwrap();
    lab.imds().refuse().unwrap();
    for base in [V4, V6] {
        assert_eq!(get(&lab, Place::Host, base, ID, &[]).unwrap_err(), 7);
    }
    lab.imds().listen().unwrap();
    lab.imds().listen().unwrap();
    assert_eq!(get(&lab, Place::Host, V6, ID, &[]).unwrap().status, 200);

    let before = lab.imds().counters().malformed;
    lab.host()
        .run(|| {
            let mut stream = TcpStream::connect("169.254.169.254:80").unwrap();
            stream
                .write_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
                .unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
        })
        .unwrap();
    // It counts when it is done with the connection, a moment after the client is.
    let deadline = Instant::now() + Duration::from_secs(5);
    while lab.imds().counters().malformed == before {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_are_remembered_up_to_a_bound() {
    let lab = lab();
    lab.host()
        .run(|| {
            let mut stream = TcpStream::connect("169.254.169.254:80").unwrap();
            let mut answer = [0; 4096];
            for number in 0..1100 {
                let request =
                    format!("GET {ID}?n={number} HTTP/1.1\r\nHost: imds\r\nX-Test: é\r\n\r\n");
                stream.write_all(request.as_bytes()).unwrap();
                assert!(stream.read(&mut answer).unwrap() > 0);
            }
        })
        .unwrap();
    let seen = lab.imds().requests();
    assert_eq!((seen.len(), lab.imds().counters().requests), (1000, 1100));
    assert_eq!(seen[999].target, format!("{ID}?n=1099"));
    assert_eq!(seen[999].headers[1], ("x-test".into(), "é".into()));
    assert_eq!((seen[999].method.as_str(), seen[999].status), ("GET", 200));
    assert!(!seen[999].has_token);
}

#[test]
fn processes_are_in_their_cgroup_and_namespace() {
    let lab = lab();
    let look = |mut command: Command| {
        let script = "grep ^0:: /proc/self/cgroup; readlink /proc/self/ns/net";
        let output = command.args(["-c", script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let outside = look(Command::new("sh"));
    let [host, guard, container] =
        [Place::Host, Place::Guard, Place::Container].map(|place| look(lab.command(place, "sh")));
    let name = lab.cgroup().path().file_name().unwrap().to_str().unwrap();
    for (text, cgroup) in [
        (&host, "host"),
        (&guard, "guard"),
        (&container, "container"),
    ] {
        assert!(
            text.starts_with(&format!("0::/{name}/{cgroup}\n")),
            "{text}"
        );
    }
    let ns = |text: &str| text.lines().last().unwrap().to_owned();
    assert_eq!(ns(&host), ns(&guard));
    assert_ne!(ns(&host), ns(&container));
    assert_ne!(ns(&host), ns(&outside));
}

#[test]
fn more_containers_and_rooms() {
    let lab = lab();
    let second = lab.add_container("second").unwrap();
    for base in [V4, V6] {
        let answer = curl(second.command("curl"), &[&format!("{base}{ID}")]);
        assert_eq!(answer.unwrap().status, 200);
    }
    let sibling = lab.add_room(Place::Container, "sibling").unwrap();
    let answer = curl(sibling.command("curl"), &[&format!("{V4}{ID}")]);
    assert_eq!(answer.unwrap().status, 200);
    let peers: Vec<_> = lab
        .imds()
        .requests()
        .iter()
        .map(|seen| seen.peer.ip())
        .collect();
    assert_ne!(peers[0], CONTAINER_V4);
    assert_eq!(peers[2], CONTAINER_V4);
    assert!(lab.add_room(Place::Host, "sibling").is_err());
    let path = second.cgroup().path().to_owned();
    drop(second);
    assert!(!path.exists());
}

#[test]
fn labs_in_parallel_do_not_meet() {
    thread::scope(|scope| {
        for requests in 1..=6 {
            scope.spawn(move || {
                let lab = lab();
                for _ in 0..requests {
                    assert_eq!(
                        get(&lab, Place::Container, V4, ID, &[]).unwrap().status,
                        200
                    );
                }
                assert_eq!(lab.imds().counters().requests, requests);
            });
        }
    });
}

#[test]
fn nothing_is_left_behind() {
    let lab = lab();
    let path = lab.cgroup().path().to_owned();
    // A process that ignores signals, with a child that nobody waits for.
    let mut orphan = lab.command(Place::Container, "sh");
    let script = "trap '' TERM HUP INT; sleep 60 & echo; wait; sleep 60";
    let mut child = orphan
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    // A cgroup that somebody made inside, with a process in it.
    let nested = path.join("host/nested/deep");
    fs::create_dir_all(&nested).unwrap();
    let mut other = lab.command(Place::Host, "sleep").arg("60").spawn().unwrap();
    fs::write(nested.join("cgroup.procs"), other.id().to_string()).unwrap();
    assert!(path.exists());

    let start = Instant::now();
    drop(lab);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(!path.exists());
    for child in [&mut child, &mut other] {
        assert!(
            child
                .try_wait()
                .unwrap()
                .is_some_and(|status| !status.success())
        );
    }
}

#[test]
fn dead_labs_are_swept_and_living_ones_stay() {
    // A root of its own: other processes sweep the common one.
    let name = format!("imds-guard-test-{}", process::id());
    let root = Cgroup::create(&cgroup_root(), &name).unwrap();
    let mut gone = Command::new("true").spawn().unwrap();
    let pid = gone.id();
    gone.wait().unwrap();
    let dead = root.path().join(format!("imds-guard-lab-{pid}-0"));
    fs::create_dir_all(dead.join("host")).unwrap();
    let foreign = root.child("imds-guard-other").unwrap();
    let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    fs::write(dead.join("host/cgroup.procs"), sleeper.id().to_string()).unwrap();

    let living = Lab::new(LabConfig::new(root.path())).unwrap();
    assert!(!dead.exists());
    assert!(!sleeper.wait().unwrap().success());
    sweep(root.path()).unwrap();
    assert!(living.cgroup().path().exists());
    assert!(foreign.path().exists());
}

#[test]
fn namespaces_are_left_as_they_were() {
    let own = || fs::read_link("/proc/thread-self/ns/net").unwrap();
    let before = own();
    let ns = NetNs::new().unwrap();
    let inside = ns.run(own).unwrap();
    assert_ne!(inside, before);
    assert_eq!(ns.run(own).unwrap(), inside);
    assert_eq!(own(), before);
    let up = ns.run(|| std::net::UdpSocket::bind("127.0.0.1:0").is_ok());
    assert!(up.unwrap());
    ns.sysctl("ipv4/ip_forward", "1").unwrap();
    let shown = ns.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap());
    assert_eq!(shown.unwrap(), "1\n");
    assert!(ns.sysctl("ipv4/no_such_parameter", "1").is_err());
    let panicked = thread::spawn(move || ns.run(|| panic!("expected by the test"))).join();
    assert!(panicked.is_err());
}

#[test]
fn a_lab_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Lab>();
}

#[test]
fn a_refused_place_is_an_error() {
    let error = Lab::new(LabConfig::new(Path::new("/nowhere"))).unwrap_err();
    assert!(format!("{error:#}").contains("/nowhere"));
}
