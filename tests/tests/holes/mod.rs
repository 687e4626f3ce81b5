//! The four holes that IMDSv2 was made for: open web application firewalls, open reverse proxies, server-side
//! request forgery, open layer 3 firewalls and address translation. Each is a really vulnerable server
//! on an instance that still allows IMDSv1, and a stranger who reaches that server alone.
//!
//! What the guard cannot tell apart is a server that lets strangers choose method *and* headers: on
//! the host it can ask for tokens as anybody can; the service itself sees no difference either. In a
//! container the hop limit stops it.

use std::{
    io::{BufRead as _, BufReader},
    net::IpAddr,
    path::Path,
    process::{Child, Stdio},
};

use imds_guard::{
    lab::{
        CONTAINER_V4, Counters, HOST_V4, Lab, Place, Room,
        fake_imds::{ACCESS_KEY_ID, ROLE},
        links,
    },
    policy::{Reason, Verdict},
    record::{Kind, Layer},
};
use imds_guard_tests::{Sandbox, python, run, servers::Server};

use crate::GUARD;

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";
const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds: 60";

/// Two sandboxes: one that shows that the hole is there, and one that closes it.
fn both(test: impl Fn(&Sandbox, bool)) {
    for (mode, open) in [("audit", true), ("enforce", false)] {
        let sandbox = Sandbox::new(GUARD, &["--mode", mode]);
        test(&sandbox, open);
        if !open {
            let reached = sandbox.lab.imds().counters();
            assert_eq!(
                reached,
                Counters::default(),
                "nothing has reached the service"
            );
        }
    }
}

/// What a stranger gets from a server, with curl.
fn stranger(lab: &Lab, arguments: &[&str]) -> String {
    let mut curl = lab.command(Place::Container, "curl");
    let output = run(curl.args(["-sg", "--max-time", "20"]).args(arguments));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A web application. Dropping it ends it.
struct Application(Child);

impl Drop for Application {
    fn drop(&mut self) {
        let _killed = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Starts the web application in a room, and waits until it listens.
#[must_use]
fn web_application(room: &Room) -> Application {
    let mut server = room.command(python());
    server.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/holes/ssrf.py"));
    let mut server = Application(server.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    let output = server.0.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    server
}

/// The next request's reason; it must name the program and its arguments, and be refused in enforce mode.
fn named(sandbox: &Sandbox, open: bool, exe: &str, argument: &str) -> Reason {
    let event = sandbox.request();
    let verdict = if open { Verdict::Audit } else { Verdict::Deny };
    assert_eq!(event.verdict, verdict, "{event:?}");
    assert!(
        event.caller.exe.as_ref().unwrap().contains(exe),
        "{event:?}"
    );
    let command_line = event.caller.command_line.clone().unwrap().join(" ");
    assert!(command_line.contains(argument), "{command_line}");
    event.reason
}

#[test]
fn server_side_request_forgery() {
    both(|sandbox, open| {
        let room = sandbox.lab.add_room(Place::Host, "web").unwrap();
        let _application = web_application(&room);
        for service in ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:a9fe:a9fe]"] {
            let url = format!("http://{HOST_V4}:8080/?url=http://{service}{CREDENTIALS}{ROLE}");
            let got = stranger(&sandbox.lab, &[&url]);
            assert_eq!(got.contains(ACCESS_KEY_ID), open, "{service}: {got}");
            assert_eq!(named(sandbox, open, "python", "ssrf.py"), Reason::NoToken);
        }
    });
}

/// The stranger chooses method and header, too; the application is in a container.
#[test]
fn server_side_request_forgery_in_full_in_a_container() {
    let sandbox = Sandbox::new(GUARD, &["--mode", "enforce"]);
    let _application = web_application(sandbox.lab.room(Place::Container));
    let service = "http://169.254.169.254";
    let header = TTL.replace(' ', "%20");
    let url = format!(
        "http://{CONTAINER_V4}:8080/?url={service}/latest/api/token&method=PUT&header={header}"
    );
    let output = run(sandbox.lab.command(Place::Host, "curl").args(["-sg", &url]));
    let got = String::from_utf8_lossy(&output.stdout);
    assert!(got.contains("403 - Forbidden"), "{got}");
    assert_eq!(
        named(&sandbox, false, "python", "ssrf.py"),
        Reason::HopLimit
    );
    assert_eq!(sandbox.lab.imds().counters(), Counters::default());
}

/// A proxy for everybody to everywhere; the stranger names the service as host.
#[test]
fn open_reverse_proxy() {
    both(|sandbox, open| {
        let room = sandbox.lab.add_room(Place::Host, "nginx").unwrap();
        let open_proxy =
            "server { listen 8080; location / { proxy_pass http://$http_host$request_uri; } }";
        let _nginx = Server::nginx(room, open_proxy).unwrap();
        let url = format!("http://{HOST_V4}:8080{CREDENTIALS}{ROLE}");
        let got = stranger(&sandbox.lab, &["-H", "Host: 169.254.169.254", &url]);
        assert_eq!(got.contains(ACCESS_KEY_ID), open, "{got}");
        assert_eq!(
            named(sandbox, open, "nginx", "worker process"),
            Reason::NoToken
        );
    });
}

/// A firewall in front of the service says whom it asks for, as they do: neither version is to be had,
/// not even by a stranger who speaks IMDSv2.
#[test]
fn open_web_application_firewall() {
    both(|sandbox, open| {
        let room = sandbox.lab.add_room(Place::Host, "waf").unwrap();
        let firewall = "server { listen 8080; location / {\n\
                          proxy_pass http://169.254.169.254;\n\
                          proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n\
                        } }";
        let _nginx = Server::nginx(room, firewall).unwrap();
        let server = format!("http://{HOST_V4}:8080");
        let url = format!("{server}{CREDENTIALS}{ROLE}");
        let got = stranger(&sandbox.lab, &[&url]);
        assert_eq!(got.contains(ACCESS_KEY_ID), open, "{got}");
        assert_eq!(
            named(sandbox, open, "nginx", "worker process"),
            Reason::NoToken
        );
        // This one the service itself refuses.
        let put = format!("{server}/latest/api/token");
        let got = stranger(&sandbox.lab, &["-X", "PUT", "-H", TTL, &put]);
        assert!(got.contains("403 - Forbidden"), "{got}");
        assert_eq!(
            named(sandbox, open, "nginx", "worker process"),
            Reason::Forwarded
        );
    });
}

/// A host that translates addresses for whoever sends through it: machines that it knows by their packets
/// alone.
#[test]
fn open_layer_3_firewall() {
    both(|sandbox, open| {
        let lab = &sandbox.lab;
        let machine = lab.add_machine().unwrap();
        links::veth((lab.host(), "vm0"), (machine.ns(), "eth0")).unwrap();
        let [near, far]: [IpAddr; 2] = [[10, 77, 0, 1], [10, 77, 0, 2]].map(IpAddr::from);
        links::add_address(lab.host(), "vm0", near, 24).unwrap();
        links::add_address(machine.ns(), "eth0", far, 24).unwrap();
        links::add_route(machine.ns(), [0, 0, 0, 0].into(), 0, near).unwrap();
        let masquerade = "-t nat -A POSTROUTING -o eth0 -j MASQUERADE";
        let mut iptables = lab.command(Place::Host, "iptables");
        assert!(run(iptables.args(masquerade.split(' '))).status.success());

        let url = format!("http://169.254.169.254{CREDENTIALS}{ROLE}");
        // What is dropped is never answered: curl's own time-out ends it.
        let seconds = if open { "20" } else { "1" };
        let output = run(machine.command("curl").args(["-s", "-m", seconds, &url]));
        let got = String::from_utf8_lossy(&output.stdout);
        assert_eq!(got.contains(ACCESS_KEY_ID), open, "{got}");
        let Kind::Packet(packet) = sandbox.guard.event().unwrap().kind else {
            panic!("no packet was seen");
        };
        assert_eq!(
            (packet.layer, packet.interface.as_str()),
            (Layer::Perimeter, "eth0")
        );
        assert_eq!(packet.came_from.as_deref(), Some("vm0"));
    });
}
