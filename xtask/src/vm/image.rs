//! What a virtual machine boots into: the tests, and everything they call, at the same places as here.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use xtask::process;

use super::kernels::Kernel;

/// Programs that the tests call; busybox has some of them, but not all of their options.
const PROGRAMS: [&str; 24] = [
    "busybox", "bash", "cat", "curl", "dash", "echo", "env", "grep", "id", "ip", "kill", "mkdir",
    "mount", "nsenter", "rm", "setarch", "setpriv", "sh", "sleep", "true", "uname", "umount",
    "unshare", "head",
];

/// Kinds of kernel modules that the tests may need.
const MODULES: [&str; 6] = [
    "kernel/net",
    "kernel/lib",
    "kernel/crypto",
    "kernel/arch",
    "kernel/drivers/net",
    "kernel/fs/fuse",
];

/// Folders of Python's library that no test needs, and that are large.
const NOT_OF_PYTHON: [&str; 9] = [
    "test",
    "site-packages",
    "dist-packages",
    "idlelib",
    "tkinter",
    "ensurepip",
    "lib2to3",
    "__pycache__",
    "pydoc_data",
];

/// A root file system in the making.
pub struct Image {
    root: PathBuf,
    seen: BTreeSet<PathBuf>,
}

impl Image {
    /// An empty one.
    pub fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        for folder in ["proc", "sys", "dev", "tmp", "run", "etc", "root", "usr/bin"] {
            fs::create_dir_all(root.join(folder))?;
        }
        // Links into /usr, or folders, as here.
        for folder in ["bin", "sbin", "lib", "lib64"] {
            match fs::read_link(Path::new("/").join(folder)) {
                Ok(target) => {
                    fs::create_dir_all(root.join(&target))?;
                    symlink(target, root.join(folder))?;
                }
                Err(_) => fs::create_dir_all(root.join(folder))?,
            }
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
        )?;
        fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
        Ok(Self {
            root,
            seen: BTreeSet::new(),
        })
    }

    /// Puts in the programs that tests call, and a Python.
    pub fn add_programs(&mut self, python: &Path) -> Result<()> {
        for program in PROGRAMS {
            let path = process::find(program)
                .with_context(|| format!("{program} is not here, and the tests need it"))?;
            self.add_program(&path)?;
        }
        self.add_python(python)
    }

    /// Puts in a program, without what is only for debuggers, and the libraries it needs.
    pub fn add_program(&mut self, path: &Path) -> Result<()> {
        self.add_file(path)?;
        let real = fs::canonicalize(path)?;
        // Scripts and static programs have none.
        let libraries = process::output(Command::new("ldd").arg(&real)).unwrap_or_default();
        for word in libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            self.add_file(Path::new(word))?;
        }
        Ok(())
    }

    /// Puts in a file, and what it links to, at the same place.
    fn add_file(&mut self, path: &Path) -> Result<()> {
        if !self.seen.insert(path.to_owned()) {
            return Ok(());
        }
        let there = self.there(path);
        let real = fs::canonicalize(path)
            .with_context(|| format!("{} cannot be found", path.display()))?;
        make_parent(&there)?;
        if real != path {
            // The place may be reached by several names, as /bin and /usr/bin are one.
            let _present = symlink(&real, &there);
            return self.add_file(&real);
        }
        let strip = Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&there)
            .arg(&real)
            .stderr(std::process::Stdio::null())
            .status();
        if !strip.is_ok_and(|status| status.success()) {
            fs::copy(&real, &there)
                .with_context(|| format!("{} cannot be copied", real.display()))?;
        }
        fs::set_permissions(&there, fs::metadata(&real)?.permissions())?;
        Ok(())
    }

    fn there(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn add_python(&mut self, python: &Path) -> Result<()> {
        let print = "import os, sys, sysconfig; \
                     print(os.path.realpath(sys.executable)); print(sysconfig.get_paths()['stdlib'])";
        let paths = process::output(Command::new(python).args(["-c", print]))
            .context("Python does not say where it is")?;
        let mut paths = paths.lines().map(PathBuf::from);
        let (Some(program), Some(library)) = (paths.next(), paths.next()) else {
            bail!("Python does not say where it is");
        };
        self.add_program(&program)?;
        symlink(&program, self.root.join("bin/python3"))?;
        self.add_folder(&library)
    }

    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)?.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                let is_built = name.starts_with("config-");
                if !is_built && !NOT_OF_PYTHON.contains(&&*name) {
                    self.add_folder(&path)?;
                }
            } else if name.ends_with(".so") {
                self.add_program(&path)?;
            } else if name.ends_with(".py") {
                let there = self.there(&path);
                make_parent(&there)?;
                fs::copy(&path, &there)?;
            }
        }
        Ok(())
    }

    /// Puts in a folder as it is.
    pub fn add_as_it_is(&mut self, folder: &Path) -> Result<()> {
        let there = self.there(folder);
        make_parent(&there)?;
        process::run(Command::new("cp").arg("-a").arg(folder).arg(&there))
    }

    /// Writes the image for a kernel: with its modules, and this script as its first process.
    pub fn write(&self, kernel: &Kernel, init: &str, file: &Path) -> Result<()> {
        let modules = self.root.join("lib/modules");
        if modules.exists() {
            fs::remove_dir_all(&modules)?;
        }
        let modules = modules.join(&kernel.release);
        fs::create_dir_all(&modules)?;
        for kind in MODULES {
            let from = kernel.modules.join(kind);
            if from.exists() {
                let to = modules.join(kind);
                make_parent(&to)?;
                process::run(Command::new("cp").arg("-r").arg(&from).arg(&to))?;
            }
        }
        for list in [
            "modules.order",
            "modules.builtin",
            "modules.builtin.modinfo",
        ] {
            let from = kernel.modules.join(list);
            if from.exists() {
                fs::copy(&from, modules.join(list))?;
            }
        }
        // busybox cannot unpack them.
        let unpack = "find \"$0\" -name '*.xz' -exec xz --decompress {} +";
        process::run(Command::new("sh").args(["-c", unpack]).arg(&modules))?;
        let depmod = process::find("depmod").context("depmod is not here")?;
        process::run(
            Command::new(depmod)
                .arg("--basedir")
                .arg(&self.root)
                .arg(&kernel.release),
        )?;
        let script = self.root.join("init");
        fs::write(&script, init)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let archive = "cd \"$0\" && find . | cpio --quiet --create --format=newc > \"$1\"";
        process::run(
            Command::new("sh")
                .args(["-c", archive])
                .arg(&self.root)
                .arg(file),
        )
    }
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path without a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))
}
