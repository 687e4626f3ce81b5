//! Debian's cloud kernels: fetched with apt, from lists of our own, and unpacked.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use xtask::process;

/// The kernel lines that are tested, and the Debian release that has each.
const LINES: [(&str, &str); 3] = [
    ("5.10", "bullseye"),
    ("6.1", "bookworm"),
    ("6.12", "bookworm"),
];

/// A kernel that can be booted.
pub struct Kernel {
    /// Its release, as uname(2) says.
    pub release: String,
    /// What qemu loads.
    pub image: PathBuf,
    /// `lib/modules/RELEASE` of its package.
    pub modules: PathBuf,
}

/// The newest kernels of these lines, or of all, fetched unless they are here already.
pub fn provide(folder: &Path, lines: &[String]) -> Result<Vec<Kernel>> {
    LINES
        .iter()
        .filter(|(line, _)| lines.is_empty() || lines.iter().any(|wanted| wanted == line))
        .map(|(line, suite)| {
            let here = folder.join(line);
            if let Some(kernel) = unpacked(&here) {
                return Ok(kernel);
            }
            fetch(line, suite, folder, &here)
                .with_context(|| format!("Debian's {line} kernel cannot be had"))?;
            unpacked(&here).with_context(|| format!("{} has no kernel", here.display()))
        })
        .collect()
}

fn unpacked(folder: &Path) -> Option<Kernel> {
    let boot = fs::read_dir(folder.join("boot")).ok()?;
    let image = boot
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains("/vmlinuz-"))?;
    let name = image.file_name()?.to_str()?;
    let release = name.strip_prefix("vmlinuz-")?.to_owned();
    let modules = folder.join("lib/modules").join(&release);
    Some(Kernel {
        release,
        image,
        modules,
    })
}

fn fetch(line: &str, suite: &str, folder: &Path, here: &Path) -> Result<()> {
    let apt = Apt::of(suite, &folder.join(format!("apt-{suite}")))?;
    let package = apt.newest(line)?;
    println!("fetching {package}");
    let downloads = folder.join("downloads");
    fs::create_dir_all(&downloads)?;
    process::run(
        apt.command("apt-get")
            .args(["--quiet", "download"])
            .arg(&package)
            .current_dir(&downloads),
    )?;
    let file = fs::read_dir(&downloads)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&format!("{package}_")))
        })
        .with_context(|| format!("apt-get left no package {package}"))?;
    // Complete or not there at all: an unpacked kernel is taken as it is.
    let unfinished = here.with_extension("new");
    let _absent = fs::remove_dir_all(&unfinished);
    process::run(Command::new("dpkg").arg("-x").arg(&file).arg(&unfinished))?;
    fs::rename(&unfinished, here)?;
    fs::remove_file(file)?;
    Ok(())
}

/// apt with sources and lists of our own: the host's own stay as they are.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn of(suite: &str, folder: &Path) -> Result<Self> {
        let parts = folder.join("sources");
        for needed in [
            &parts,
            &folder.join("lists/partial"),
            &folder.join("cache/archives/partial"),
        ] {
            fs::create_dir_all(needed)?;
        }
        let mut found = false;
        for source in host_sources() {
            let text = fs::read_to_string(&source)?;
            let name = source.file_name().context("a source without a name")?;
            if let Some(text) = for_suite(&text, suite) {
                fs::write(parts.join(name), text)?;
                found = true;
            }
        }
        if !found {
            bail!(
                "the kernels are Debian's, and this host has no apt source of Debian's; `cargo xtask test \
             --tests` leaves other kernels out"
            );
        }
        let option = |name: &str, value: &Path| format!("--option={name}={}", value.display());
        let apt = Self {
            options: vec![
                option("Dir::Etc::SourceList", Path::new("/dev/null")),
                option("Dir::Etc::SourceParts", &parts),
                option("Dir::State::Lists", &folder.join("lists")),
                option("Dir::Cache", &folder.join("cache")),
                // Downloads go where we are, which the user for downloads may not write to.
                "--option=APT::Sandbox::User=root".to_owned(),
            ],
        };
        process::run(
            apt.command("apt-get")
                .args(["--quiet", "--quiet", "update"]),
        )?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// The newest cloud kernel of a line.
    fn newest(&self, line: &str) -> Result<String> {
        let prefix = format!("linux-image-{line}.");
        let names = process::output(self.command("apt-cache").args(["pkgnames", &prefix]))
            .context("apt-cache lists no packages")?;
        names
            .lines()
            .filter(|name| name.ends_with("-cloud-amd64"))
            .max_by_key(|name| numbers(name))
            .map(str::to_owned)
            .with_context(|| format!("there is no package {prefix}*-cloud-amd64"))
    }
}

/// The numbers in a package's name, by which versions are compared.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn host_sources() -> Vec<PathBuf> {
    let parts = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten();
    let mut sources: Vec<PathBuf> = parts.flatten().map(|entry| entry.path()).collect();
    sources.push("/etc/apt/sources.list".into());
    sources.retain(|path| path.is_file());
    sources
}

/// A source with another release in place of its own; nothing if it is not Debian's.
fn for_suite(source: &str, suite: &str) -> Option<String> {
    const RELEASES: [&str; 6] = ["bullseye", "bookworm", "trixie", "forky", "stable", "sid"];
    // Others have releases of these names, too, but not all of them.
    if !source.contains("debian") {
        return None;
    }
    let release = RELEASES
        .into_iter()
        .find(|release| source.contains(release))?;
    Some(source.replace(release, suite))
}
