//! Files, environment and command line: which comes first, and what is said when one is wrong.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use imds_guard::{
    config,
    lab::{Guard, Place},
    policy::Mode,
    record::Change,
};
use imds_guard_tests::{Sandbox, lab, run};
use serde_json::Value;

use crate::{
    GUARD,
    live::{DENY, status, v1},
};

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
        ("link = \"c\"".into(), file("conf.d/20-c.toml:1:8"))
    );
    assert_eq!(
        line("uplink"),
        ("uplink = [\"x\"]".into(), file("config.toml:4:10"))
    );
    assert_eq!(
        line("token_binding"),
        ("token_binding = \"container\"".into(), "default".into())
    );
    assert!(
        shown.contains(&format!(
            "# {}\n[[rule]]\nname = \"r\"\nuid = [\"7\"]",
            file("conf.d/20-c.toml:3:8")
        )),
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
    let rule = "[[rule]]\nname = 'a'\nuid = 7\naction = 'deny'\n";
    let namesakes = format!("{rule}{rule}");
    let table: [(&str, &str); 14] = [
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
            "[[rule]]\nname = 'a'\nexpires = 20300131\naction = 'deny'",
            "config.toml:3:11: that is no date: write one as 2030-01-31",
        ),
        // What no key says by itself.
        (
            "\nendpoint = ['0.0.0.0:80']",
            "config.toml:2:12: endpoint 0.0.0.0:80: give the address itself",
        ),
        (
            "mode = 'audit'\nlisten = ['169.254.169.254:254']",
            "config.toml:2:10: listen 169.254.169.254:254: that is the metadata service's",
        ),
        (
            "mode = 'audit'\nupstream = ['169.254.171.254:254']",
            "config.toml:2:12: upstream 169.254.171.254:254: that is the guard itself",
        ),
        ("otlp = 'ftp://x'", "config.toml:1:8: otlp: "),
        (
            "events_chain = true",
            "config.toml:1:16: events-chain needs",
        ),
        (
            "mode = 'audit'\nevents_file_mib = 2000",
            "config.toml:2:19: events-total-mib is less",
        ),
        ("ocsf = '-'\nemf = '-'", "config.toml:2:7: ocsf and emf go"),
        (&namesakes, "config.toml:6:8: rule \"a\" has a namesake in "),
        ("mode = ", "config.toml:1:"),
    ];
    for (text, expected) in table {
        files.write("config.toml", text);
        let (code, _, said) = files.config("check", &[], &[]);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(expected), "{text}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    fs::write(files.0.join("config.toml"), b"mode = 'audit' # \xe4\xff").unwrap();
    let (_, _, said) = files.config("check", &[], &[]);
    assert!(
        said.contains("config.toml:1:18: that is not UTF-8"),
        "{said}"
    );
    // What somebody else said is not looked for in files.
    files.write("config.toml", "endpoint = ['127.0.0.1:80']");
    let (_, _, said) = files.config("check", &["--endpoint", "0.0.0.0:80"], &[]);
    assert!(said.contains("command line: endpoint 0.0.0.0:80"), "{said}");
    let (_, _, said) = files.config("check", &[], &[("IMDS_GUARD_ENDPOINT", "0.0.0.0:80")]);
    assert!(said.contains("IMDS_GUARD_ENDPOINT: endpoint"), "{said}");
    let pods = "[[rule]]\nname = 'pods'\nnamespace = 'a'\naction = 'deny'";
    for (node, warns) in [("", true), ("kubernetes_node = 'n'\n", false)] {
        files.write("config.toml", &format!("{node}{pods}"));
        let (code, said, _) = files.config("check", &[], &[]);
        assert_eq!(
            (code, said.contains("kubernetes_node is not given")),
            (0, warns),
            "{said}"
        );
    }
    let config = files.write("config.toml", "");
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

/// E1: whoever can write a file can change rules, and who can write a directory can remove them.
#[test]
fn e1_a_configuration_that_others_can_write_is_refused() {
    let files = Files::new("modes");
    files.write("config.toml", "");
    let drop_in = files.write("conf.d/10-a.toml", "");
    let set = |path: &PathBuf, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let (config, conf_d) = (files.0.join("config.toml"), files.0.join("conf.d"));
    let places = [
        (config, 0o644),
        (drop_in, 0o644),
        (conf_d, 0o755),
        (files.0.clone(), 0o755),
    ];
    let accepted = || files.config("check", &[], &[]);
    for (path, good) in &places {
        for bit in [0o002, 0o020] {
            set(path, good | bit);
            let (code, _, said) = accepted();
            let expected = format!(
                "{}: others may write to it: `chmod go-w` it",
                path.display()
            );
            assert!(code == 2 && said.contains(&expected), "{expected}: {said}");
        }
        set(path, *good);
        assert_eq!(accepted().0, 0);
        std::os::unix::fs::chown(path, Some(65534), None).unwrap();
        let (code, _, said) = accepted();
        let expected = format!("{}: it belongs to user 65534", path.display());
        assert!(code == 2 && said.contains(&expected), "{expected}: {said}");
        std::os::unix::fs::chown(path, Some(0), None).unwrap();
    }
    // Nobody can remove what is another's, as in /tmp.
    set(&files.0, 0o1777);
    assert_eq!(accepted().0, 0);
    // A ConfigMap is mounted so that nobody can write to it.
    set(&files.0, 0o777);
    let script = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && \
                  exec \"$0\" config check --config \"$1/config.toml\"";
    let mounted = run(Command::new("unshare")
        .args(["--mount", "sh", "-c", script, GUARD])
        .arg(&files.0));
    let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
    assert!(mounted.status.success(), "{said}");
}

/// D4: whatever is wrong with the new configuration, the old one stays.
#[test]
fn d4_a_broken_configuration_changes_nothing() {
    let sandbox = Sandbox::configured(GUARD, &format!("mode = 'enforce'\n{DENY}"));
    let half = &DENY[..DENY.len() - 4];
    let broken = [
        ("half written", half.as_bytes().to_vec(), ":4:"),
        (
            "no text",
            vec![0xff, 0xfe, b'\n', 0],
            ":1:1: that is not UTF-8",
        ),
        (
            "a key of that name",
            b"mod = 'audit'".to_vec(),
            "did you mean `mode`?",
        ),
        ("huge", vec![b'#'; 17 << 20], "more than 16777216 bytes"),
        ("deep", "[".repeat(100_000).into_bytes(), ":1:"),
        (
            "a rule without effect",
            b"[[rule]]\nname = 'x'".to_vec(),
            "it changes nothing",
        ),
        (
            "namesakes",
            [DENY, DENY].concat().into_bytes(),
            ":6:8: rule \"nobody\" has a namesake",
        ),
    ];
    for (what, text, expected) in broken {
        let (file, new) = (
            sandbox.lab.config(),
            sandbox.lab.config().with_extension("new"),
        );
        fs::write(&new, text).unwrap();
        fs::rename(&new, &file).unwrap();
        let change = sandbox.change();
        assert_eq!(
            (change.change, change.mode),
            (Change::Rejected, Mode::Enforce),
            "{what}"
        );
        assert_eq!(change.rules, 1, "{what}");
        let error = change.error.unwrap();
        assert!(
            error.contains("config.toml") && error.contains(expected),
            "{what}: {error}"
        );
        let told = sandbox.try_to_tell(GUARD, &["reload"]);
        assert_eq!(told.status.code(), Some(23));
        let said = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(said.contains(expected), "{what}: {said}");
        assert_eq!(sandbox.change().change, Change::Rejected);
        assert_eq!(v1(&sandbox), 403, "{what}");
        assert_eq!(sandbox.request().rule.as_deref(), Some("nobody"));
        let rejected = &status(&sandbox)["guard"]["rejected"];
        assert!(
            rejected.as_str().unwrap().contains(expected),
            "{what}: {rejected}"
        );
    }
    sandbox.configure("mode = 'audit'");
    assert_eq!(sandbox.change().change, Change::Reloaded);
    assert_eq!(status(&sandbox)["guard"]["rejected"], Value::Null);
}

/// D4: a file that goes is no empty one, though the guard would start without it.
#[test]
fn d4_a_configuration_that_vanishes_changes_nothing() {
    let lab = lab();
    // Where it is looked for unless told otherwise, as the guard alone sees it.
    let etc = std::env::temp_dir().join(format!("imds-guard-{}-etc", std::process::id()));
    let (file, drop_in) = (
        etc.join("imds-guard/config.toml"),
        etc.join("imds-guard/conf.d/50-rules.toml"),
    );
    fs::create_dir_all(drop_in.parent().unwrap()).unwrap();
    fs::write(&file, "mode = 'enforce'").unwrap();
    fs::write(&drop_in, DENY).unwrap();
    let mut command = lab.command(Place::Guard, "unshare");
    let script = "mount --bind \"$0\" /etc && exec \"$@\"";
    command
        .args(["--mount", "sh", "-c", script])
        .arg(&etc)
        .arg(GUARD);
    let mut arguments = lab.guard_arguments();
    let config = arguments.iter().position(|it| it == "--config").unwrap();
    arguments.drain(config..config + 2);
    let guard = Guard::spawn(command.args(arguments)).unwrap();
    let sandbox = Sandbox { guard, lab };

    fs::remove_file(&file).unwrap();
    let change = sandbox.change();
    assert_eq!(
        (change.change, change.mode, change.rules),
        (Change::Rejected, Mode::Enforce, 1)
    );
    let error = change.error.unwrap();
    assert!(
        error.contains("/etc/imds-guard/config.toml: No such file"),
        "{error}"
    );
    assert_eq!(v1(&sandbox), 403);
    assert_eq!(sandbox.request().rule.as_deref(), Some("nobody"));
    // Those of conf.d may go.
    fs::write(&file, "mode = 'enforce'\nhop_limit = 2").unwrap();
    assert_eq!(sandbox.change().change, Change::Reloaded);
    fs::remove_file(&drop_in).unwrap();
    let change = sandbox.change();
    assert_eq!((change.change, change.rules), (Change::Reloaded, 0));
    assert_eq!(v1(&sandbox), 401);
    fs::remove_dir_all(&etc).unwrap();
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
