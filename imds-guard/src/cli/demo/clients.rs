//! The demo's clients.

use std::{
    fmt, io,
    os::unix::process::CommandExt as _,
    process::{Output, Stdio},
};

use nix::unistd::{Gid, Uid, setresgid, setresuid};

use crate::{
    lab::{Lab, Place, fake_imds::INSTANCE_ID},
    policy::Mode,
};

/// What the demo's clients run, in order.
pub const CLIENTS: [Client; 8] = [
    Client {
        place: Place::Host,
        address: V4,
        v2: false,
        user: NOBODY,
    },
    Client {
        place: Place::Host,
        address: V4,
        v2: true,
        user: ROOT,
    },
    Client {
        place: Place::Host,
        address: V6,
        v2: false,
        user: NOBODY,
    },
    Client {
        place: Place::Host,
        address: V6,
        v2: true,
        user: ROOT,
    },
    Client {
        place: Place::Host,
        address: MAPPED,
        v2: false,
        user: NOBODY,
    },
    Client {
        place: Place::Host,
        address: MAPPED,
        v2: true,
        user: ROOT,
    },
    Client {
        place: Place::Container,
        address: V4,
        v2: false,
        user: NOBODY,
    },
    Client {
        place: Place::Container,
        address: V4,
        v2: true,
        user: ROOT,
    },
];

const V4: &str = "169.254.169.254";
const V6: &str = "[fd00:ec2::254]";
const MAPPED: &str = "[::ffff:169.254.169.254]";
const ROOT: u32 = 0;
const NOBODY: u32 = 65534;

/// Longest that a client waits, in seconds: far longer than it takes.
const MAX_TIME: &str = "15";

/// One client: curl, as it stands in a thousand boot scripts.
pub struct Client {
    place: Place,
    address: &'static str,
    v2: bool,
    user: u32,
}

impl Client {
    /// How many requests it makes.
    pub fn requests(&self) -> usize {
        if self.v2 { 2 } else { 1 }
    }

    /// Runs it to its end.
    pub fn run(&self, lab: &Lab) -> io::Result<Output> {
        let document = format!("http://{}/latest/meta-data/instance-id", self.address);
        let mut command = if self.v2 {
            let script = format!(
                "TOKEN=$(curl -sgm {MAX_TIME} -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
                 'http://{}/latest/api/token'); \
                 curl -sgm {MAX_TIME} -H \"X-aws-ec2-metadata-token: $TOKEN\" '{document}'",
                self.address
            );
            let mut command = lab.command(self.place, "sh");
            command.args(["-c", &script]);
            command
        } else {
            let mut command = lab.command(self.place, "curl");
            command.args(["-sgm", MAX_TIME, &document]);
            command
        };
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
        // SAFETY: only system calls are made between fork and exec, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                setresgid(group, group, group)?;
                Ok(setresuid(user, user, user)?)
            });
        }
        command.stdin(Stdio::null()).output()
    }

    /// Whether it got what the mode promises.
    pub fn is_as_expected(&self, mode: Mode, output: &Output) -> bool {
        let served = output.stdout == INSTANCE_ID.as_bytes();
        served == (self.v2 || mode == Mode::Audit)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.v2 { "v2" } else { "v1" };
        write!(
            f,
            "the {version} client for {} ({:?})",
            self.address, self.place
        )
    }
}
