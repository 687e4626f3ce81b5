//! What an interpreter runs, from its command line: the script, the main class, the applet.

use std::path::Path;

/// Options that take the next argument for their value, and those after which no script comes.
struct Options {
    /// Names of the program, without version numbers.
    programs: &'static [&'static str],
    with_value: &'static [&'static str],
    /// The script is in the command line itself, or comes from standard input.
    inline: &'static [&'static str],
    /// What is run is the value of one of these.
    names_it: &'static [&'static str],
}

const INTERPRETERS: &[Options] = &[
    Options {
        programs: &["python", "pypy"],
        with_value: &["-W", "-X", "--check-hash-based-pycs"],
        inline: &["-c", "-"],
        names_it: &["-m"],
    },
    Options {
        programs: &["bash", "sh", "dash", "zsh", "ksh", "mksh", "ash", "fish"],
        with_value: &["-o", "+o", "-O", "+O", "--rcfile", "--init-file"],
        inline: &["-c", "-s"],
        names_it: &[],
    },
    Options {
        programs: &["perl"],
        with_value: &["-I"],
        inline: &["-e", "-E"],
        names_it: &[],
    },
    Options {
        programs: &["ruby"],
        with_value: &["-I", "-r", "-C"],
        inline: &["-e"],
        names_it: &[],
    },
    Options {
        programs: &["node", "nodejs", "bun"],
        with_value: &["-r", "--require", "--import", "-C", "--conditions"],
        inline: &["-e", "--eval", "-p", "--print", "-"],
        names_it: &[],
    },
    Options {
        programs: &["php", "php-cgi"],
        with_value: &["-c", "-d", "-z"],
        inline: &["-r"],
        names_it: &["-f"],
    },
    Options {
        programs: &["lua", "luajit", "tclsh", "Rscript", "guile"],
        with_value: &["-l"],
        inline: &["-e", "-c"],
        names_it: &[],
    },
    Options {
        programs: &["pwsh", "powershell"],
        with_value: &["-ExecutionPolicy", "-WorkingDirectory"],
        inline: &["-Command", "-c", "-EncodedCommand"],
        names_it: &["-File", "-f"],
    },
];

const JAVA_WITH_VALUE: &[&str] = &[
    "-cp",
    "-classpath",
    "--class-path",
    "-p",
    "--module-path",
    "--add-modules",
    "--add-opens",
    "--add-exports",
    "--add-reads",
    "--upgrade-module-path",
];

/// What this program runs, as its command line says; `None` if it is no interpreter, or runs what is in
/// the command line itself. A file's name is made absolute with `cwd`.
///
/// The process can say anything there: the answer is for people, not for rules.
pub fn of(exe: &str, arguments: &[String], cwd: Option<&Path>) -> Option<String> {
    let exe = exe.strip_suffix(" (deleted)").unwrap_or(exe);
    let program = exe.rsplit('/').next()?;
    let (first, rest) = arguments.split_first()?;
    if matches!(program, "busybox" | "toybox") {
        let applet = first.rsplit('/').next().unwrap_or(first);
        let is_applet = applet.trim_start_matches('-') != program;
        let applet = if is_applet {
            Some(applet)
        } else {
            rest.first().map(String::as_str)
        };
        return applet.map(|applet| applet.trim_start_matches('-').to_owned());
    }
    if program == "java" {
        return java(rest, cwd);
    }
    let name = program.trim_end_matches(|it: char| it.is_ascii_digit() || matches!(it, '.' | '-'));
    let options = INTERPRETERS
        .iter()
        .find(|options| options.programs.contains(&name))?;
    let mut rest = rest.iter();
    while let Some(argument) = rest.next() {
        let argument = argument.as_str();
        if options.names_it.contains(&argument) {
            let named = rest.next()?;
            return Some(if argument == "-m" {
                format!("-m {named}")
            } else {
                absolute(named, cwd)
            });
        }
        if options.inline.contains(&argument) {
            return None;
        }
        if options.with_value.contains(&argument) {
            rest.next();
        } else if argument == "--" {
            return rest.next().map(|file| absolute(file, cwd));
        } else if !argument.starts_with(['-', '+']) {
            return Some(absolute(argument, cwd));
        } else if is_bundle_of(argument, options.inline) {
            return None;
        }
    }
    None
}

/// The jar, or the main class.
fn java(arguments: &[String], cwd: Option<&Path>) -> Option<String> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "-jar" => return arguments.next().map(|jar| absolute(jar, cwd)),
            "-m" | "--module" => return arguments.next().cloned(),
            option if JAVA_WITH_VALUE.contains(&option) => {
                arguments.next();
            }
            option if option.starts_with(['-', '@']) => {}
            source if source.ends_with(".java") => return Some(absolute(source, cwd)),
            class => return Some(class.to_owned()),
        }
    }
    None
}

/// Whether one-letter options in one argument (`-lc`) end with one of these.
fn is_bundle_of(argument: &str, options: &[&str]) -> bool {
    let letters = argument.strip_prefix('-').unwrap_or_default();
    let is_bundle = !letters.starts_with('-') && letters.chars().all(|it| it.is_ascii_alphabetic());
    let last = letters.chars().last();
    is_bundle
        && options
            .iter()
            .any(|option| option.len() == 2 && option.chars().last() == last)
}

fn absolute(file: &str, cwd: Option<&Path>) -> String {
    match cwd {
        Some(cwd) if !file.starts_with('/') && !file.contains("[redacted]") => {
            let file = file.strip_prefix("./").unwrap_or(file);
            cwd.join(file).to_string_lossy().into_owned()
        }
        _ => file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters_are_asked_for_what_they_run() {
        let table: &[(&str, &str, Option<&str>)] = &[
            (
                "/usr/bin/python3.11",
                "python3 /opt/app/sync.py --all",
                Some("/opt/app/sync.py"),
            ),
            (
                "/usr/bin/python3.11",
                "python3 -u -W ignore sync.py",
                Some("/srv/sync.py"),
            ),
            (
                "/usr/bin/python3.11",
                "python3 -m http.server 80",
                Some("-m http.server"),
            ),
            ("/usr/bin/python3.11", "python3 -c import\u{20}x", None),
            (
                "/usr/bin/python3.11 (deleted)",
                "python3 ./a.py",
                Some("/srv/a.py"),
            ),
            (
                "/usr/bin/bash",
                "bash /etc/init.d/x start",
                Some("/etc/init.d/x"),
            ),
            ("/usr/bin/bash", "bash -lc curl", None),
            ("/usr/bin/bash", "-bash", None),
            ("/usr/bin/dash", "sh -e /x", Some("/x")),
            ("/usr/bin/perl", "perl -w -I lib x.pl", Some("/srv/x.pl")),
            ("/usr/bin/perl", "perl -we print", None),
            (
                "/usr/bin/node",
                "node -r dotenv /app/index.js",
                Some("/app/index.js"),
            ),
            ("/usr/bin/ruby3.1", "ruby job.rb", Some("/srv/job.rb")),
            ("/usr/bin/php8.2", "php -f /www/x.php", Some("/www/x.php")),
            (
                "/usr/lib/jvm/bin/java",
                "java -Xmx1g -cp a.jar:b.jar com.example.Main x",
                Some("com.example.Main"),
            ),
            (
                "/usr/lib/jvm/bin/java",
                "java -Dx=y -jar app.jar",
                Some("/srv/app.jar"),
            ),
            (
                "/usr/lib/jvm/bin/java",
                "java -p mods -m com.example/com.example.Main",
                Some("com.example/com.example.Main"),
            ),
            ("/bin/busybox", "wget http://x", Some("wget")),
            ("/bin/busybox", "busybox wget http://x", Some("wget")),
            ("/bin/busybox", "-sh", Some("sh")),
            ("/usr/bin/curl", "curl x", None),
        ];
        for (exe, line, expected) in table {
            let arguments: Vec<_> = line.split(' ').map(str::to_owned).collect();
            let got = of(exe, &arguments, Some(Path::new("/srv")));
            assert_eq!(got.as_deref(), *expected, "{line}");
        }
    }
}
