//! Proxies as people run them, each in a room of its own in a lab, which ends them with it.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use imds_guard::lab::Room;

/// A server that listens.
pub struct Server {
    /// Where it runs.
    pub room: Room,
    directory: PathBuf,
}

impl Server {
    /// Debian's nginx; `http` is what its configuration has in that block.
    ///
    /// # Errors
    /// It is missing, or does not like its configuration.
    pub fn nginx(room: Room, http: &str) -> Result<Self> {
        Self::start(room, "nginx", |path, program| {
            let config = format!(
                "pid {path}/pid; error_log {path}/error; worker_processes 2; user root;\n\
                 events {{ }}\n\
                 http {{\n\
                   access_log off;\n\
                   client_body_temp_path {path}/1; proxy_temp_path {path}/2;\n\
                   fastcgi_temp_path {path}/3; uwsgi_temp_path {path}/4; scgi_temp_path {path}/5;\n\
                   {http}\n\
                 }}\n"
            );
            program.args(["-e", &format!("{path}/error"), "-c"]);
            config
        })
    }

    /// Debian's haproxy, with this configuration.
    ///
    /// # Errors
    /// As [`Server::nginx`].
    pub fn haproxy(room: Room, config: &str) -> Result<Self> {
        Self::start(room, "haproxy", |_, program| {
            program.args(["-D", "-f"]);
            config.to_owned()
        })
    }

    /// Starts a program that goes to the background when it listens.
    fn start(
        room: Room,
        name: &str,
        configure: impl FnOnce(&str, &mut Command) -> String,
    ) -> Result<Self> {
        let installed = xtask::bpf::tools().join(name).join("usr/sbin").join(name);
        ensure!(
            installed.exists(),
            "{} is missing: run `cargo xtask setup`",
            installed.display()
        );
        let inode = room.cgroup().path().display().to_string().replace('/', "-");
        let directory = env::temp_dir().join(format!("imds-guard-test{inode}"));
        fs::create_dir_all(&directory)?;
        let mut program = room.command(installed);
        let config = configure(&directory.display().to_string(), &mut program);
        let file = directory.join("config");
        fs::write(&file, config)?;
        let server = Self { room, directory };
        let status = program.arg(file).status();
        let status = status.with_context(|| format!("{name} cannot be run"))?;
        ensure!(status.success(), "{name} ended with {status}");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _removed = fs::remove_dir_all(&self.directory);
    }
}
