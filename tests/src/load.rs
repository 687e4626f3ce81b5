//! Clients that go on asking while something happens to the guard.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::{
    io::Write as _,
    process::{Child, Stdio},
};

use imds_guard::lab::{Lab, Place};

use crate::python;

/// Clients that fetch tokens and use them, each time on new connections, until they are told to stop.
pub struct Load(Child);

impl Load {
    /// Starts them; they ask for this path.
    ///
    /// # Panics
    /// Python is missing.
    #[must_use]
    pub fn start(lab: &Lab, path: &str) -> Self {
        let script = format!(
            r"
import http.client, sys, threading, time
done = threading.Event()
served, failed = [], []
def ask(method, path, headers):
    client = http.client.HTTPConnection('169.254.169.254', 80, timeout=25)
    client.request(method, path, headers=headers)
    answer = client.getresponse()
    body = answer.read().decode()
    client.close()
    if answer.status != 200:
        raise OSError(answer.status)
    return body
def work():
    while not done.is_set():
        try:
            token = ask('PUT', '/latest/api/token', {{'X-aws-ec2-metadata-token-ttl-seconds': '60'}})
            ask('GET', '{path}', {{'X-aws-ec2-metadata-token': token}})
            served.append(1)
        except Exception as error:
            failed.append(repr(error))
            time.sleep(0.01) # as long as nobody is there, everybody has the processors
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
sys.stdin.read()
done.set()
for thread in threads: thread.join()
print(len(served), len(failed), failed[:5])
"
        );
        let child = lab
            .command(Place::Host, python())
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Ends them. Returns how many rounds were served, how many failed, and how.
    ///
    /// # Panics
    /// They do not say.
    #[must_use]
    pub fn stop(mut self) -> (usize, usize, String) {
        self.0.stdin.take().unwrap().flush().unwrap();
        let output = self.0.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = text.lines().last().unwrap_or_default().to_owned();
        let mut words = last.splitn(3, ' ');
        let mut number = || words.next().unwrap().parse().unwrap();
        (number(), number(), last.clone())
    }
}

/// Requests without a token, on and on, until standard input ends.
///
/// # Panics
/// Python is missing.
#[must_use]
pub fn v1_load(lab: &Lab, path: &str) -> Child {
    let script = format!(
        r"
import http.client, sys, threading, time
def work():
    while True:
        try:
            client = http.client.HTTPConnection('169.254.169.254', 80, timeout=25)
            client.request('GET', '{path}')
            client.getresponse().read()
        except Exception:
            time.sleep(0.01)
for _ in range(2): threading.Thread(target=work, daemon=True).start()
sys.stdin.read()
"
    );
    let mut command = lab.command(Place::Host, python());
    command.args(["-c", &script]).stdin(Stdio::piped());
    command.spawn().unwrap()
}
