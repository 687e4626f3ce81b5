//! Files, environment and command line: which comes first, and what is said when one is wrong.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use imds_guard::{config, policy::Mode};
use imds_guard_tests::{Sandbox, run};

use crate::GUARD;

/// A directory with a configuration file, which goes with the test.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("imds-guard-{}-{name}", std::process::id()));
        fs::create_dir_all(path.join("conf.d")).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let file = self.0.join(name);
        fs::write(&file, text).unwrap();
        file
    }

    /// Runs `imds-guard config …` on it: exit code, output and complaint.
    fn config(
        &self,
        command: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> (i32, String, String) {
        let output = run(Command::new(GUARD)
            .args(["config", command, "--config"])
            .arg(self.0.join("config.toml"))
            .args(arguments)
            .envs(environment.iter().copied()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code().unwrap_or(-1),
            text(&output.stdout),
            text(&output.stderr),
        )
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn each_value_says_where_it_comes_from() {
    let files = Files::new("layers");
    files.write(
        "config.toml",
        "hop_limit = 2\nlink = 'a'\nmode = 'audit'\nuplink = ['x']",
    );
    files.write("conf.d/10-b.toml", "link = 'b'\nhop_limit = 3");
    files.write(
        "conf.d/20-c.toml",
        "link = 'c'\n[[rule]]\nname = 'r'\nuid = 7\naction = 'deny'",
    );
    let environment = [
        ("IMDS_GUARD_HOP_LIMIT", "4"),
        ("IMDS_GUARD_MODE", "enforce"),
    ];
    let (code, shown, said) = files.config("show", &["--hop-limit", "5"], &environment);
    assert_eq!(code, 0, "{said}");
    let line = |key: &str| {
        let line = shown
            .lines()
            .find(|line| line.starts_with(&format!("{key} = ")));
        let (value, origin) = line.unwrap().split_once('#').unwrap();
        (value.trim().to_owned(), origin.trim().to_owned())
    };
    let file = |name: &str| files.0.join(name).display().to_string();
    assert_eq!(
        line("hop_limit"),
        ("hop_limit = 5".into(), "command line".into())
    );
    assert_eq!(
        line("mode"),
        ("mode = \"enforce\"".into(), "IMDS_GUARD_MODE".into())
    );
    assert_eq!(
        line("link"),
        ("link = \"c\"".into(), file("conf.d/20-c.toml"))
    );
    assert_eq!(
        line("uplink"),
        ("uplink = [\"x\"]".into(), file("config.toml"))
    );
    assert_eq!(
        line("token_binding"),
        ("token_binding = \"container\"".into(), "default".into())
    );
    assert!(
        shown.contains("[[rule]]\nname = \"r\"\nuid = [\"7\"]"),
        "{shown}"
    );

    // What is shown means what it was made of.
    let again = Files::new("shown");
    again.write("config.toml", &shown);
    let (code, shown_again, said) = again.config("show", &[], &[]);
    assert_eq!(code, 0, "{said}");
    let values = |text: &str| -> Vec<String> {
        text.lines()
            .map(|line| line.split('#').next().unwrap().trim().to_owned())
            .collect()
    };
    assert_eq!(values(&shown_again), values(&shown));
}

/// D4, E1: every kind of bad file has its sentence, and exit code 2.
#[test]
fn d4_a_bad_file_is_named_with_its_place() {
    let files = Files::new("bad");
    let table: [(&str, &str); 6] = [
        (
            "mode = 'audit'\nhop_limt = 2",
            "config.toml:2:1: unknown key `hop_limt`: did you mean `hop_limit`?",
        ),
        (
            "mode = 'enforc'",
            "config.toml:1:8: unknown value `enforc`: did you mean `enforce`?",
        ),
        (
            "[[rule]]\nname = 'a'\npath = '/latest/../x'\naction = 'deny'",
            "config.toml:3:8: \"/latest/../x\"",
        ),
        ("listen = ['nowhere']", "config.toml:1:1"),
        (
            "endpoint = ['0.0.0.0:80']",
            "endpoint 0.0.0.0:80: give the address itself",
        ),
        ("mode = ", "config.toml:1:"),
    ];
    for (text, expected) in table {
        files.write("config.toml", text);
        let (code, _, said) = files.config("check", &[], &[]);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(expected), "{text}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    let config = files.write("config.toml", "");
    let mode = |mode| fs::set_permissions(&config, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o666);
    assert!(files.config("check", &[], &[]).2.contains("`chmod o-w` it"));
    mode(0o644);
    std::os::unix::fs::chown(&config, Some(65534), None).unwrap();
    assert!(
        files
            .config("check", &[], &[])
            .2
            .contains("belongs to user 65534")
    );
    fs::remove_file(&config).unwrap();
    assert!(files.config("check", &[], &[]).2.contains("No such file"));
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(
        files
            .config("check", &[], &[])
            .2
            .contains("that is no file")
    );
    fs::remove_file(&config).unwrap();
    fs::create_dir(&config).unwrap();
    assert!(
        files
            .config("check", &[], &[])
            .2
            .contains("that is no file")
    );
    let (code, _, said) = files.config("check", &[], &[("IMDS_GUARD_MODE", "off")]);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("IMDS_GUARD_MODE") || said.contains("--mode"),
        "{said}"
    );
}

/// The published files are those of the program.
#[test]
fn the_published_example_and_schema_are_those_of_the_types() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let schema = serde_json::to_string_pretty(&config::schema()).unwrap() + "\n";
    for (name, text) in [
        ("packaging/config.toml", config::example().unwrap()),
        ("docs/config.schema.json", schema),
    ] {
        let path = root.join(name);
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let published = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            published == text,
            "{name} is old: run this test with UPDATE_SCHEMA=1"
        );
    }
}

#[test]
fn the_example_runs() {
    let sandbox = Sandbox::configured(GUARD, &config::example().unwrap());
    assert_eq!(
        sandbox.tell(GUARD, &["mode", "configured"]).trim(),
        "audit mode, 0 rules"
    );
    assert_eq!(sandbox.change().mode, Mode::Audit);
    let bad = sandbox.try_to_tell(GUARD, &["mode", "audit", "--for", "soon"]);
    assert_eq!(bad.status.code(), Some(2));
}
