//! Configuration files.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    Keys,
    place::{Place, Places},
};
use crate::failure::Failure;

/// Where the configuration is unless told otherwise.
pub const CONFIG_FILE: &str = "/etc/imds-guard/config.toml";
/// Directory beside it, whose `*.toml` are read after it, in the order of their names.
pub const CONFIG_DIR: &str = "conf.d";

/// Largest file that is read: enough for some 100,000 rules.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
/// How alike a key must be to one that exists for it to be taken for a slip of the pen.
const ALIKE: f64 = 0.7;

/// A file that was read.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its path.
    pub path: PathBuf,
    /// What is in it.
    pub keys: Keys,
    /// Where.
    pub places: Places,
}

/// Reads a configuration file and those of the directory beside it. It may be missing where it is not
/// `required`, and so may the directory.
///
/// # Errors
/// [`Failure::Settings`], with file, line and column where something is wrong in it.
pub fn read(file: &Path, required: bool) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::new();
    let directory = drop_ins(file);
    for directory in [directory_of(file), &directory] {
        check_directory(directory).map_err(|what| failure(directory, &what))?;
    }
    if required || !is_absent(file) {
        sources.push(read_one(file)?);
    }
    if !is_absent(&directory) {
        let more = list(&directory).map_err(|error| failure(&directory, &error.to_string()))?;
        for path in more {
            sources.push(read_one(&path)?);
        }
    }
    let mut seen = HashMap::new();
    for source in &sources {
        let path = source.path.display();
        for (rule, place) in source.keys.rules.iter().zip(&source.places.rules) {
            if let Some(other) = seen.insert(&rule.name, format!("{path}:{place}")) {
                let what = format!("rule \"{}\" has a namesake in {other}", rule.name);
                return Err(Failure::Settings(format!("{path}:{place}: {what}")));
            }
        }
    }
    Ok(sources)
}

/// Whether nothing has this name. What cannot be looked at, or is a link to nowhere, is an error for whoever
/// reads it: nobody meant it to be left out.
fn is_absent(path: &Path) -> bool {
    let found = fs::symlink_metadata(path);
    found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The configuration files in a directory, in the order of their names.
fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|it| it == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The directory beside a configuration file.
#[must_use]
pub fn drop_ins(file: &Path) -> PathBuf {
    directory_of(file).join(CONFIG_DIR)
}

fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(directory) if directory.as_os_str().is_empty() => Path::new("."),
        Some(directory) => directory,
        None => Path::new("/"),
    }
}

/// Who can write to a directory can remove a file with rules that deny.
fn check_directory(directory: &Path) -> Result<(), String> {
    let meta = match fs::metadata(directory) {
        Ok(meta) => meta,
        // Whoever reads it says so.
        Err(_) => return Ok(()),
    };
    // Kubernetes gives everybody the right to write to a ConfigMap, and mounts it so that nobody can.
    let is_read_only = nix::sys::statvfs::statvfs(directory).is_ok_and(|found| {
        found
            .flags()
            .contains(nix::sys::statvfs::FsFlags::ST_RDONLY)
    });
    if is_read_only {
        return Ok(());
    }
    check_owner(&meta)
}

fn read_one(path: &Path) -> Result<Source, Failure> {
    let wrong = |what| Failure::Settings(format!("{}{what}", path.display()));
    let bytes = bytes(path).map_err(|what| failure(path, &what))?;
    let text = text(bytes).map_err(wrong)?;
    Ok(Source {
        path: path.to_owned(),
        keys: parse(&text).map_err(wrong)?,
        places: Places::of(&text),
    })
}

/// What is in a file that nobody else can change.
fn bytes(path: &Path) -> Result<Vec<u8>, String> {
    // A named pipe in its place would hold up the start.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| error.to_string())?;
    let meta = file.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() {
        return Err("that is no file".into());
    }
    check_owner(&meta)?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it has more than {MAX_BYTES} bytes"));
    }
    Ok(bytes)
}

/// Whether nobody but root, or the guard's user, can change it.
fn check_owner(meta: &Metadata) -> Result<(), String> {
    if ![0, nix::unistd::geteuid().as_raw()].contains(&meta.uid()) {
        return Err(format!(
            "it belongs to user {}: `chown root` it",
            meta.uid()
        ));
    }
    // In a directory such as /tmp nobody can remove what is another's, and what they add is theirs.
    let is_sticky = meta.is_dir() && meta.mode() & libc::S_ISVTX != 0;
    if meta.mode() & 0o022 != 0 && !is_sticky {
        return Err("others may write to it: `chmod go-w` it".into());
    }
    Ok(())
}

/// The text that bytes are; an error begins with `:LINE:COLUMN: `.
fn text(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let place = Place::after(&String::from_utf8_lossy(before));
        format!(":{place}: that is not UTF-8")
    })
}

/// The keys in a text; an error begins with `:LINE:COLUMN: `.
pub(super) fn parse(text: &str) -> Result<Keys, String> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start).min(text.len());
        let place = Place::after(&text[..text.floor_char_boundary(at)]);
        format!(":{place}: {}", hint(error.message()))
    })
}

/// An error about an unknown key says which one may be meant, instead of naming all.
fn hint(message: &str) -> String {
    let mut names = message.split('`').skip(1).step_by(2);
    let is_unknown = message.starts_with("unknown field") || message.starts_with("unknown variant");
    let Some(unknown) = names.next().filter(|_| is_unknown) else {
        return message.trim_end().replace('\n', ": ");
    };
    let known: Vec<&str> = names.collect();
    let alike = |name: &str| strsim::jaro_winkler(unknown, name);
    let nearest = known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
    let kind = if message.contains("field") {
        "key"
    } else {
        "value"
    };
    match nearest {
        Some(name) if alike(name) > ALIKE => {
            format!("unknown {kind} `{unknown}`: did you mean `{name}`?")
        }
        _ => format!(
            "unknown {kind} `{unknown}`: it is one of {}",
            known.join(", ")
        ),
    }
}

fn failure(path: &Path, what: &str) -> Failure {
    Failure::Settings(format!("{}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_line_is_named() {
        let rule = |more: &str| format!("[[rule]]\nname = 'a'\nuid = 7\n{more}");
        let table = [
            (String::new(), Ok(0)),
            (rule("action = 'upgrade'"), Ok(1)),
            (rule("action = 'deny'\nanswer = 404"), Ok(1)),
            (rule("hop_limit = 65"), Err(":4:13: a hop limit is")),
            (
                rule("action = 'denied'"),
                Err(":4:10: unknown value `denied`: did you mean `deny`?"),
            ),
            (
                rule("usr = 'x'"),
                Err(":4:1: unknown key `usr`: did you mean `user`?"),
            ),
            (
                rule("zzzz = 'x'"),
                Err(":4:1: unknown key `zzzz`: it is one of name, "),
            ),
            (rule(""), Err(":1:1: rule \"a\": it changes nothing")),
            (
                rule("action = 'allow'\nanswer = 404"),
                Err("answer belongs to"),
            ),
            (
                rule("action = 'deny'\nanswer = 500"),
                Err(":5:10: an answer is 401, 403, 404"),
            ),
            (
                rule("action = 'deny'\npath = '/a//b'"),
                Err(":5:8: \"/a//b\": write paths"),
            ),
            (
                rule("action = 'deny'\nexe = 'curl'"),
                Err("give a path from the root"),
            ),
            (
                rule("action = 'deny'\nimds = 'v3'"),
                Err("it is one of v1, v2, token"),
            ),
            (
                rule("action = 'deny'\nexpires = 'soon'"),
                Err(":5:11: \"soon\" is no date"),
            ),
            (rule("path = '/a'\nhop_limit = 2"), Err("are about callers")),
            (
                rule("sha256 = 'abc'\naction = 'allow'"),
                Err("sha256 is 64 digits"),
            ),
            (
                "[[rule]]\nname = 'a'\nuid = 'x'".into(),
                Err(":3:7: \"x\" is no number"),
            ),
            ("[[rule]]\nuid = 7".into(), Err("missing field `name`")),
            (
                "mod = 'audit'".into(),
                Err(":1:1: unknown key `mod`: did you mean `mode`?"),
            ),
            (
                "mode = 'enforced'".into(),
                Err(":1:8: unknown value `enforced`: did you mean `enforce`?"),
            ),
            (
                "\n\nmax_connections = 0".into(),
                Err(":3:19: max_connections is"),
            ),
            (
                "mode = 'audit'\nmode = 'audit'".into(),
                Err(":2:1: duplicate key"),
            ),
            ("[rule".into(), Err(":1:")),
            ("mode = \"enf".into(), Err(":1:")),
        ];
        for (text, expected) in table {
            match (parse(&text), expected) {
                (Ok(keys), Ok(count)) => assert_eq!(keys.rules.len(), count, "{text}"),
                (Err(error), Err(part)) => assert!(error.contains(part), "{text}: {error}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }

    #[test]
    fn a_link_to_nowhere_is_not_an_absent_file() {
        let folder = std::env::temp_dir().join(format!("imds-guard-{}-links", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("config.toml");
        assert!(read(&file, false).unwrap().is_empty());
        for link in [&file, &drop_ins(&file)] {
            std::os::unix::fs::symlink("/nonexistent", link).unwrap();
            let error = read(&file, false).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{}: No such file", link.display())),
                "{error}"
            );
            fs::remove_file(link).unwrap();
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
