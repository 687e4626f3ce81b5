//! Events as fields of the journal (systemd: "Native Journal Protocol"), so that
//! `journalctl IMDS_VERSION=v1` finds requests.

use std::{
    io,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Lost, Output};
use crate::{
    policy::{Imds, Verdict},
    record::{Event, Kind, Request, words},
};

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// How long journald may take to make room.
const PATIENCE: Duration = Duration::from_secs(1);

/// Priorities of syslog(3).
const WARNING: u8 = 4;
const NOTICE: u8 = 5;
const INFO: u8 = 6;

/// Sends events to journald.
pub struct Journald {
    socket: UnixDatagram,
    path: PathBuf,
    message: Vec<u8>,
}

impl Journald {
    /// Sends to the journald that listens there. It may come later.
    ///
    /// # Errors
    /// No socket can be made.
    pub fn to(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            message: Vec::new(),
        })
    }

    /// A field. Its value may be anything: its length comes before it where it has more than one line.
    fn field(&mut self, name: &str, value: &str) {
        let message = &mut self.message;
        message.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            message.push(b'\n');
            message.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            message.push(b'=');
        }
        message.extend_from_slice(value.as_bytes());
        message.push(b'\n');
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.field(name, value);
        }
    }

    fn request(&mut self, request: &Request) {
        let caller = &request.caller;
        let verdict = request.verdict.to_string();
        self.field("IMDS_VERDICT", &verdict);
        self.field("IMDS_REASON", &request.reason.to_string());
        self.optional("IMDS_VERSION", request.imds.map(Imds::as_str));
        self.field("IMDS_METHOD", &request.method);
        self.field("IMDS_PATH", &request.path);
        self.field("IMDS_STATUS", &request.status.to_string());
        self.field("IMDS_CALLS", &request.calls().to_string());
        self.optional("IMDS_RULE", request.rule.as_deref());
        self.optional("IMDS_USER_AGENT", request.user_agent.as_deref());
        self.field("IMDS_CALLER_PID", &caller.pid.to_string());
        self.field("IMDS_CALLER_UID", &caller.uid.to_string());
        self.field("IMDS_CALLER_COMM", &caller.comm);
        self.optional("IMDS_CALLER_EXE", caller.exe.as_deref());
        self.optional("IMDS_CALLER_SCRIPT", caller.script.as_deref());
        self.optional("IMDS_CALLER_USER", caller.user.as_deref());
        self.optional("IMDS_CALLER_UNIT", caller.systemd_unit.as_deref());
        self.optional("IMDS_CALLER_CONTAINER_ID", caller.container_id.as_deref());
        let container = caller.container.as_deref();
        let image = container.and_then(|it| it.image.as_deref());
        self.optional("IMDS_CALLER_IMAGE", image);
        if let Some(pod) = caller.pod.as_deref() {
            self.field("IMDS_CALLER_POD", &pod.name);
            self.field("IMDS_CALLER_NAMESPACE", &pod.namespace);
        }
    }
}

impl Output for Journald {
    fn write(&mut self, event: &Event, _line: &[u8]) -> Result<(), Lost> {
        self.message.clear();
        let priority = match &event.kind {
            Kind::Request(request) => match request.verdict {
                Verdict::Deny => WARNING,
                Verdict::Audit => NOTICE,
                Verdict::Allow | Verdict::Upgrade => INFO,
            },
            Kind::EventsLost { .. } | Kind::Packet(_) | Kind::ConnectionRefused(_) => WARNING,
            _ => INFO,
        };
        self.field("MESSAGE", &words(event));
        self.field("PRIORITY", &priority.to_string());
        self.field("SYSLOG_IDENTIFIER", "imds-guard");
        self.field("IMDS_EVENT", event.kind.name());
        self.field("IMDS_TIME", &event.time);
        if let Kind::Request(request) = &event.kind {
            self.request(request);
        }
        let sent = self.socket.send_to(&self.message, &self.path);
        sent.map(drop).map_err(|error| Lost::event(event, error))
    }

    fn flush(&mut self) -> Result<(), Lost> {
        Ok(())
    }
}
