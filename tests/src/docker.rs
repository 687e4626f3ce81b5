//! A Docker daemon on a lab's host.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use imds_guard::{
    kernel::probe,
    lab::{Lab, Place, Room},
};
use xtask::bpf;

use crate::run;

/// What is done in a mount namespace before dockerd starts there, so that all it keeps vanishes with
/// its last process. A `/run` in which it finds no systemd, and no firewall to configure; a `/sys` of
/// its own network namespace, without the machine's security modules, and with nothing but cgroup v2
/// (not mounted anew, which would change options of the whole hierarchy); settings of the machine
/// that it cannot change. The image is all of busybox.
const PREPARE: &str = "
mount -t tmpfs tmpfs /run
mkdir /run/cgroup
mount --bind \"$CGROUP_ROOT\" /run/cgroup
mount -t sysfs sysfs /sys
mount --move /run/cgroup /sys/fs/cgroup
for folder in /etc /opt; do
    over=/run/over$folder
    mkdir -p $over/upper $over/work
    mount -t overlay overlay -o lowerdir=$folder,upperdir=$over/upper,workdir=$over/work $folder
done
rm -f /etc/resolv.conf
echo nameserver 127.0.0.1 > /etc/resolv.conf
for folder in /proc/sys/kernel /proc/sys/fs /proc/sys/vm; do
    mount --bind $folder $folder
    mount -o remount,bind,ro $folder
done
mkdir -p /run/image/bin
cp \"$0\" /run/image/bin/busybox
chroot /run/image /bin/busybox --install -s /bin
tar -C /run/image -cf /run/image.tar .
exec \"$@\"
";

/// Name of the image.
const IMAGE: &str = "busybox";

/// dockerd in a lab's host network, its containers below the lab's cgroup. It is killed with the lab
/// at the latest, and its containers with it.
pub struct Docker {
    dockerd: Child,
    room: Room,
}

/// A container that ran to its end.
#[derive(Debug)]
pub struct Ran {
    /// Its id.
    pub id: String,
    /// Exit code of its command.
    pub exit: i32,
    /// What it wrote, to standard error, too.
    pub output: String,
}

impl Docker {
    /// Starts it with an image of busybox, and waits until it serves.
    ///
    /// # Panics
    /// It does not start; the message says why.
    #[must_use]
    pub fn start(lab: &Lab) -> Self {
        let room = lab
            .add_room(Place::Host, "dockerd")
            .unwrap_or_else(|error| panic!("{error:#}"));
        let root = probe::cgroup2_mount().unwrap_or_else(|failure| panic!("{failure}"));
        let parent = lab.cgroup().path().strip_prefix(&root);
        let parent = parent.expect("the lab is below the root").join("docker");
        let mut command = room.command("unshare");
        command
            .args(["--mount", "sh", "-euc", PREPARE])
            .arg(find("busybox"))
            .arg(find("dockerd"))
            .args(["--host", "unix:///run/docker.sock"])
            .args(["--data-root", "/run/docker-data"])
            .args(["--ipv6", "--fixed-cidr-v6", "2001:db8:d0c::/64"])
            .arg("--cgroup-parent")
            .arg(PathBuf::from("/").join(parent))
            .env("CGROUP_ROOT", &root)
            .env("PATH", path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut dockerd = command
            .spawn()
            .unwrap_or_else(|error| panic!("dockerd cannot be run: {error}"));
        let stderr = dockerd.stderr.take().expect("it was asked for");
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let mut said = Vec::new();
        loop {
            match lines.next() {
                Some(line) if line.contains("API listen on") => break,
                Some(line) => said.push(line),
                None => panic!("dockerd does not start:\n{}", said.join("\n")),
            }
        }
        // It must not wait for a reader.
        thread::spawn(move || lines.for_each(drop));
        let docker = Self { dockerd, room };
        let image = docker.inside("image.tar");
        docker.done([OsStr::new("import"), image.as_ref(), OsStr::new(IMAGE)]);
        docker
    }

    /// Runs a shell script in a container that was made with these options.
    ///
    /// # Panics
    /// The container cannot be made.
    #[must_use]
    pub fn run(&self, options: &[&str], script: &str) -> Ran {
        self.run_image(IMAGE, options, script)
    }

    /// The same, of another image.
    ///
    /// # Panics
    /// The container cannot be made.
    #[must_use]
    pub fn run_image(&self, image: &str, options: &[&str], script: &str) -> Ran {
        let id = self.done(
            [&["create"], options, &[image, "sh", "-c"]]
                .concat()
                .into_iter()
                .chain([format!("exec 2>&1; {script}").as_str()]),
        );
        let output = run(self.command().args(["start", "--attach", &id]));
        Ran {
            id,
            exit: output.status.code().unwrap_or(-1),
            output: String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr),
        }
    }

    /// Runs docker, which must go well, and returns what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn done<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        let output = run(self.command().args(arguments));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker: {complaint}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Lets others find its socket here, too.
    ///
    /// # Panics
    /// Something else is there.
    pub fn show(&self, socket: &Path) {
        let shown = std::os::unix::fs::symlink(self.inside("docker.sock"), socket);
        assert!(shown.is_ok(), "{shown:?}");
    }

    /// Docker's command line.
    fn command(&self) -> Command {
        let mut command = self.room.command(find("docker"));
        let socket = self.inside("docker.sock");
        command
            .env("DOCKER_HOST", format!("unix://{}", socket.display()))
            .env("DOCKER_CONFIG", self.inside("docker-cli"));
        command
    }

    /// Where others find a file of dockerd's own `/run`.
    fn inside(&self, name: &str) -> PathBuf {
        format!("/proc/{}/root/run/{name}", self.dockerd.id()).into()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ended_already = self.dockerd.kill();
        let _reaped = self.dockerd.wait();
    }
}

/// Where the programs are: those that `cargo xtask setup` has unpacked, else those of the host.
fn path() -> OsString {
    let unpacked = bpf::tools().join("docker/usr");
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [unpacked.join("bin"), unpacked.join("sbin")];
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::join_paths(
        folders
            .into_iter()
            .chain(env::split_paths(&path))
            .chain(system),
    )
    .expect("folders without colons")
}

fn find(program: &str) -> PathBuf {
    env::split_paths(&path())
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{program} is missing: run `cargo xtask setup`"))
}
