//! Containers and pods by what their runtimes and Kubernetes know of them.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Stdio},
};

use imds_guard::{
    lab::{Guard, Lab, Place, Room},
    policy::{Reason, caller::Pod},
    record::Request,
};
use imds_guard_tests::{Sandbox, docker::Docker, lab, python, run};
use serde_json::{Value, json};

use crate::{GUARD, INSTANCE_ID_PATH, rules};

/// A rule on an image is about what docker says that a container was made of.
#[test]
fn a_rule_on_the_image_of_a_docker_container() {
    let sandbox = Sandbox::configured(
        GUARD,
        "mode = 'enforce'
         [[rule]]
         name = 'old image'
         container_image = 'busy*'
         imds = 'v1'
         action = 'allow'
         [[rule]]
         name = 'a program in it'
         container_image = 'other:*'
         exe = '/bin/busybox'
         imds = 'v1'
         action = 'allow'",
    );
    let docker = Docker::start(&sandbox.lab);
    let v1 = format!(
        r"printf 'GET {INSTANCE_ID_PATH} HTTP/1.0\r\n\r\n' | timeout 20 nc 169.254.169.254 80"
    );

    // Nobody can say what it is made of: it may be any image.
    let ran = docker.run(&["--network", "host"], &v1);
    assert!(ran.output.starts_with("HTTP/1.0 401"), "{ran:?}");
    let event = sandbox.request();
    assert_eq!(
        (event.reason, &event.caller.container),
        (Reason::UnknownCaller, &None)
    );

    docker.show(&sandbox.lab.docker_socket());
    for (options, image, rule) in [
        (&["--name", "one"][..], "busybox", "old image"),
        (&["--name", "two"][..], "other:1", "a program in it"),
    ] {
        if image != "busybox" {
            docker.done(["tag", "busybox", image]);
        }
        let options = [&["--network", "host"], options].concat();
        let ran = docker.run_image(image, &options, &v1);
        assert!(ran.output.starts_with("HTTP/1.0 200"), "{ran:?}");
        let event = sandbox.request();
        assert_eq!(event.rule.as_deref(), Some(rule));
        let container = event.caller.container.clone().unwrap();
        assert_eq!(container.image.as_deref(), Some(image));
        assert_eq!(container.name.as_deref(), Some(options[3]));
    }

    // Where no rule asks, nobody waits for docker; what it has said until a request is served is recorded.
    sandbox.configure("mode = 'audit'");
    assert_eq!(sandbox.change().rules, 0);
    let later = v1.replacen("printf", "(sleep 1; printf", 1);
    let later = later.replacen(" | timeout", ") | timeout", 1);
    let ran = docker.run(&["--network", "host", "--name", "three"], &later);
    assert!(ran.output.starts_with("HTTP/1.0 200"), "{ran:?}");
    let container = sandbox.caller().container.unwrap();
    assert_eq!(container.name.as_deref(), Some("three"));
}

/// An API server that lists pods and tells of changes, as a real one has been seen to.
struct ApiServer {
    child: Child,
    port: u16,
}

const API_SERVER: &str = r"
import http.server, json, queue, socketserver, sys, threading
pods, watchers = {}, []
version = 1
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def do_GET(self):
        assert self.path.startswith('/api/v1/pods?'), self.path
        assert 'fieldSelector=spec.nodeName%3Dnode-1' in self.path, self.path
        if 'watch=true' not in self.path:
            body = json.dumps({'kind': 'PodList', 'apiVersion': 'v1', 'metadata': {'resourceVersion': str(version)},
                'items': list(pods.values())}).encode()
            self.send_response(200)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        changes = queue.Queue()
        watchers.append(changes)
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        self.wfile.flush()
        while True:
            line = json.dumps(changes.get()).encode() + b'\n'
            self.wfile.write(b'%x\r\n%s\r\n' % (len(line), line))
            self.wfile.flush()
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
server = Server(('127.0.0.1', 0), Handler)
first = json.loads(sys.stdin.readline())
pods.update({pod['metadata']['uid']: pod for pod in first})
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
for line in sys.stdin:
    change = json.loads(line)
    version += 1
    if change['type'] != 'ERROR':
        pod = change['object']
        pod['metadata']['resourceVersion'] = str(version)
        pods.pop(pod['metadata']['uid'], None)
        if change['type'] != 'DELETED': pods[pod['metadata']['uid']] = pod
    for watcher in watchers: watcher.put(change)
    if change['type'] == 'ERROR': watchers.clear()
    print('told', flush=True)
";

impl ApiServer {
    fn start(lab: &Lab, pods: &[Value]) -> Self {
        let mut child = lab
            .command(Place::Guard, python())
            .args(["-c", API_SERVER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(child.stdin.as_ref().unwrap(), "{}", json!(pods)).unwrap();
        let mut line = String::new();
        let output = child.stdout.as_mut().unwrap();
        BufReader::with_capacity(1, output)
            .read_line(&mut line)
            .unwrap();
        let port = line.trim().parse().unwrap();
        Self { child, port }
    }

    fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://127.0.0.1:{}", self.port)}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string()
    }

    fn tell(&mut self, kind: &str, object: &Value) {
        let change = json!({"type": kind, "object": object});
        writeln!(self.child.stdin.as_ref().unwrap(), "{change}").unwrap();
        let mut line = String::new();
        let output = self.child.stdout.as_mut().unwrap();
        BufReader::with_capacity(1, output)
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line.trim(), "told");
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn pod(number: u32, namespace: &str, tier: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{number}"), "namespace": namespace, "uid": uid(number),
            "resourceVersion": "1", "labels": {"tier": tier},
        },
        "spec": {"nodeName": "node-1", "serviceAccountName": "web", "containers": []},
    })
}

fn uid(number: u32) -> String {
    format!("0a1b2c3d-0000-4000-8000-{number:012}")
}

/// Where the processes of a pod are.
fn room(lab: &Lab, number: u32) -> Room {
    let uid = uid(number).replace('-', "_");
    let name = format!("kubepods-besteffort-pod{uid}.slice");
    lab.add_room(Place::Host, &name).unwrap()
}

#[test]
fn rules_on_pods_follow_what_kubernetes_says() {
    let lab = lab();
    let pods = [pod(1, "shop", "front"), pod(2, "test", "front")];
    let mut api = ApiServer::start(&lab, &pods);
    let kubeconfig = lab.config().with_file_name("kubeconfig");
    fs::write(&kubeconfig, api.kubeconfig()).unwrap();
    fs::write(
        lab.config(),
        format!(
            "mode = 'enforce'
             kubernetes_node = 'node-1'
             kubeconfig = '{}'
             [[rule]]
             name = 'back end has no credentials'
             labels = {{ tier = 'back' }}
             path = 'meta-data/instance-id'
             action = 'deny'
             [[rule]]
             name = 'shop'
             namespace = 'shop'
             service_account = '!default'
             imds = 'v1'
             action = 'allow'",
            kubeconfig.display()
        ),
    )
    .unwrap();
    let guard = Guard::spawn(&mut lab.guard_command(GUARD)).unwrap();
    let sandbox = Sandbox { guard, lab };
    let v1 = |room: &Room| rules::v1(&sandbox, &mut room.command("curl"));
    let [shop, test, late, host] = [1, 2, 3, 0].map(|number| match number {
        0 => sandbox.lab.add_room(Place::Host, "no-pod").unwrap(),
        number => room(&sandbox.lab, number),
    });
    let (status, event) = v1(&shop);
    assert_eq!(
        (status.as_str(), event.rule.as_deref()),
        ("200", Some("shop"))
    );
    let expected = Pod {
        name: "pod-1".into(),
        namespace: "shop".into(),
        owner: None,
        service_account: Some("web".into()),
        labels: [("tier".to_owned(), "front".to_owned())].into(),
    };
    assert_eq!(event.caller.pod.as_deref(), Some(&expected));
    let (status, event) = v1(&test);
    assert_eq!((status.as_str(), event.reason), ("401", Reason::NoToken));
    // Whoever is in no pod is in none for certain, and waits for nothing.
    let (status, event) = v1(&host);
    assert_eq!((status.as_str(), event.reason), ("401", Reason::NoToken));

    // A pod that Kubernetes has not told of may be anything.
    let (status, event) = v1(&late);
    assert_eq!(
        (status.as_str(), event.reason),
        ("403", Reason::UnknownCaller),
        "{event:?}"
    );
    api.tell("ADDED", &pod(3, "shop", "front"));
    assert_eq!(v1(&late).0, "200");
    let until = |expected: Reason, room: &Room| {
        // A change is on its way when the server has sent it; for some requests at most.
        for _ in 0..200 {
            if v1(room).1.reason == expected {
                return;
            }
        }
        panic!("{expected} is never the reason");
    };
    api.tell("MODIFIED", &pod(1, "shop", "back"));
    until(Reason::Rule, &shop);
    api.tell("DELETED", &pod(1, "shop", "back"));
    until(Reason::UnknownCaller, &shop);
    // The server has forgotten where the watch began: everything is listed anew.
    let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410});
    api.tell("ERROR", &gone);
    api.tell("ADDED", &pod(1, "shop", "front"));
    until(Reason::Rule, &shop);
    assert_eq!(v1(&shop).0, "200");
    let mut as_default = pod(1, "shop", "front");
    as_default["spec"]["serviceAccountName"] = json!("default");
    api.tell("MODIFIED", &as_default);
    until(Reason::NoToken, &shop);
    api.tell("MODIFIED", &pod(1, "shop", "front"));
    until(Reason::Rule, &shop);
    // Without it, what is known stays known.
    drop(api);
    assert_eq!(v1(&shop).0, "200");
    assert_eq!(v1(&test).0, "401");
}

/// Kubernetes that never answers holds up nobody for long, and nothing at all where no rule asks.
#[test]
fn a_silent_api_server_is_not_waited_for() {
    let lab = lab();
    // A port that takes connections and says nothing.
    let mut silent = lab
        .command(Place::Guard, python())
        .args(["-c", "import socket, sys\ns = socket.create_server(('127.0.0.1', 0))\nprint(s.getsockname()[1], flush=True)\nsys.stdin.read()"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(silent.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let kubeconfig = lab.config().with_file_name("kubeconfig");
    let server = format!("http://127.0.0.1:{}", line.trim());
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    fs::write(&kubeconfig, text.to_string()).unwrap();
    let config = format!(
        "kubernetes_node = 'node-1'\nkubeconfig = '{}'\n",
        kubeconfig.display()
    );
    fs::write(lab.config(), &config).unwrap();
    let guard = Guard::spawn(&mut lab.guard_command(GUARD)).unwrap();
    let sandbox = Sandbox { guard, lab };
    let pod = room(&sandbox.lab, 1);
    let v1 = || {
        let url = format!("http://169.254.169.254{INSTANCE_ID_PATH}");
        run(pod.command("curl").args(["-s", "--max-time", "20", &url]));
        sandbox.request()
    };
    let event = v1();
    assert_eq!(
        (event.reason, event.caller.pod.as_deref()),
        (Reason::NoToken, None)
    );
    let rule = "[[rule]]\nname = 'a'\nnamespace = 'a'\nimds = 'v1'\naction = 'allow'\n";
    sandbox.configure(&format!("mode = 'enforce'\n{config}{rule}"));
    assert_eq!(sandbox.change().rules, 1);
    let waited = |event: &Request| event.latency_us.guard >= 900_000;
    let event = v1();
    assert_eq!(
        (event.reason, waited(&event)),
        (Reason::UnknownCaller, true)
    );
    // Of one connection, only the first request waits.
    let script = "import http.client
s = http.client.HTTPConnection('169.254.169.254')
for _ in range(3):
    s.request('GET', '/latest/meta-data/instance-id')
    s.getresponse().read()";
    run(pod.command(python()).args(["-c", script]));
    for is_first in [true, false, false] {
        let event = sandbox.request();
        assert_eq!(
            (event.reason, waited(&event)),
            (Reason::UnknownCaller, is_first)
        );
    }
    // And nobody waits to whom the rule cannot apply, whatever the answer.
    let rule = rule.replace("namespace", "uid = 65533\nnamespace");
    sandbox.configure(&format!("mode = 'enforce'\n{config}{rule}"));
    assert_eq!(sandbox.change().rules, 1);
    let event = v1();
    assert_eq!((event.reason, waited(&event)), (Reason::NoToken, false));
    drop(silent.stdin.take());
    silent.wait().unwrap();
}
