//! Ways around the guard, each really tried, and each shown to lead to the metadata service where
//! nobody stands in its way. `docs/threat-model.md` lists them by number.

mod handed;
mod listener;
mod namespaces;
mod packets;
mod protocols;
mod sockets;
mod users;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
};

use aya::util::KernelVersion;
use imds_guard::{
    lab::{Place, Room},
    record::{Kind, Packet},
};
use imds_guard_tests::{Sandbox, python, run};

use crate::GUARD;

const ENFORCE: [&str; 2] = ["--mode", "enforce"];
/// Lets everything pass, and reports it.
const AUDIT: [&str; 2] = ["--mode", "audit"];

/// Runs a script to its end. Returns what it printed.
fn attack(room: &Room, script: &str, arguments: &[&str]) -> String {
    let mut command = room.command(python());
    ran(command.args(["-c", script]).args(arguments))
}

/// A program that may never come to an end by itself. Dropping it ends it.
struct Begun(Child);

impl Drop for Begun {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _killed = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Begins a script, whatever it says.
fn begin(room: &Room, script: &str, arguments: &[&str]) -> Begun {
    let mut command = room.command(python());
    command.args(["-c", script]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    Begun(command.stderr(Stdio::null()).spawn().unwrap())
}

/// Begins a script that tells and waits to be told. Returns what it says, too, line by line.
fn talk(room: &Room, script: &str, arguments: &[&str]) -> (Begun, impl FnMut() -> String + use<>) {
    let mut command = room.command(python());
    command.args(["-c", script]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    (Begun(child), move || said.next().unwrap().unwrap())
}

impl Begun {
    fn tell(&mut self) {
        self.0
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"go on\n")
            .unwrap();
    }
}

/// Runs a program that must do what it is told.
fn ran(command: &mut Command) -> String {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The next packet that a layer has seen.
fn packet(sandbox: &Sandbox) -> Packet {
    loop {
        if let Kind::Packet(packet) = sandbox.guard.event().unwrap().kind {
            return packet;
        }
    }
}

/// The next packet that comes from this port.
fn packet_from(sandbox: &Sandbox, port: u16) -> Packet {
    loop {
        let packet = packet(sandbox);
        if packet.source_port == Some(port) {
            return packet;
        }
    }
}

fn enforced() -> Sandbox {
    Sandbox::new(GUARD, &ENFORCE)
}

fn audited() -> Sandbox {
    Sandbox::new(GUARD, &AUDIT)
}

/// Nothing has reached the metadata service.
fn assert_untouched(sandbox: &Sandbox) {
    let reached = sandbox.lab.imds().counters();
    assert_eq!(reached, imds_guard::lab::Counters::default());
}

fn room(sandbox: &Sandbox, place: Place) -> &Room {
    sandbox.lab.room(place)
}

/// Whether the guard knows its own network namespace in the kernel (`SO_NETNS_COOKIE`, Linux 5.14).
fn sockets_can_be_unbound() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(5, 14, 0)
}
