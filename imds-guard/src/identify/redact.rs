//! What looks like a secret in a command line is not recorded.

const REDACTED: &str = "[redacted]";

/// Parts of names whose values are secrets.
const SECRET_NAMES: [&str; 15] = [
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "credential",
    "apikey",
    "api-key",
    "api_key",
    "accesskey",
    "access-key",
    "access_key",
    "authorization",
    "bearer",
    "signature",
];

/// Options that take `user:password`, of curl and others.
const USER_OPTIONS: [&str; 4] = ["-u", "--user", "-U", "--proxy-user"];

/// Shortest run that is taken for a key or token. Session tokens have 56 characters.
const OPAQUE_RUN: usize = 32;

/// Length of AWS's secret access keys, which may have slashes in them, as paths have.
const SECRET_KEY: usize = 40;

/// The command line with secrets replaced: the values of `--password=…`, `--token …`, `SECRET=…`,
/// `Header-Token: …` and `-u user:…`, also within a script, passwords in URLs, access keys, and long
/// runs of letters and digits.
///
/// A heuristic: it hides too much rather than too little, and a short secret under a harmless name
/// still passes.
pub fn command_line(arguments: &[String]) -> Vec<String> {
    let mut before = "";
    arguments
        .iter()
        .map(|argument| {
            let option = std::mem::replace(&mut before, argument);
            let takes_secret = option.starts_with('-')
                && option.bytes().all(is_name_byte)
                && is_secret_name(option);
            if takes_secret && !argument.starts_with("--") {
                return REDACTED.to_owned();
            }
            let is_user = USER_OPTIONS.contains(&option)
                || (argument.starts_with("-u") && argument.len() > 2);
            match argument.split_once(':') {
                Some((user, _)) if is_user => format!("{user}:{REDACTED}"),
                _ => self::argument(argument),
            }
        })
        .collect()
}

fn argument(argument: &str) -> String {
    // An argument that is one assignment or header as a whole: its value may have spaces in it.
    if let Some(at) = argument.find(['=', ':'])
        && argument[..at].bytes().all(is_name_byte)
        && is_secret_name(&argument[..at])
        && !argument[at..].starts_with("://")
    {
        let value = argument[at + 1..].trim_start();
        if !value.is_empty() {
            return format!("{}{REDACTED}", &argument[..argument.len() - value.len()]);
        }
    }
    opaque_runs(&url_passwords(&named_values(argument)))
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.len() <= 64
        && !name.ends_with("ttl-seconds")
        && SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// The values of secret names anywhere in a text, such as a script or JSON.
fn named_values(text: &str) -> String {
    let in_name = |c: char| c.is_ascii() && is_name_byte(c as u8);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(in_name) {
        let (between, from) = rest.split_at(at);
        let (name, after) = from.split_at(from.find(|c| !in_name(c)).unwrap_or(from.len()));
        out.push_str(between);
        out.push_str(name);
        rest = after;
        if is_secret_name(name)
            && let Some((separator, value)) = value_after(name, after)
        {
            out.push_str(separator);
            out.push_str(REDACTED);
            rest = &after[separator.len() + value.len()..];
        }
    }
    out + rest
}

/// What separates a name from its value, and the value: `=value`, `: value`, `": "value"`, ` value`.
fn value_after<'a>(name: &str, after: &'a str) -> Option<(&'a str, &'a str)> {
    const QUOTES: [char; 2] = ['"', '\''];
    let separated = after.strip_prefix(QUOTES).unwrap_or(after);
    let separator = separated.chars().next()?;
    let value = match separator {
        '=' => &separated[1..],
        ':' if !separated.starts_with("://") => separated[1..].trim_start(),
        ' ' | '\t' if name.starts_with('-') && !separated.trim_start().starts_with("--") => {
            separated.trim_start()
        }
        _ => return None,
    };
    let quote = value.chars().next().filter(|first| QUOTES.contains(first));
    let value = value.strip_prefix(QUOTES).unwrap_or(value);
    let end = match (quote, separator) {
        (Some(quote), _) => value.find(quote),
        // The value of a header may consist of several words.
        (None, ':') => value.find(['"', '\'', ';', ',', '}', '\n']),
        (None, _) => value.find([' ', '\t', '\n', '"', '\'', ';', '&', '|', ')']),
    };
    let value = &value[..end.unwrap_or(value.len())];
    let start = value.as_ptr() as usize - after.as_ptr() as usize;
    (!value.is_empty()).then(|| (&after[..start], value))
}

/// `scheme://user:password@host` loses the password.
fn url_passwords(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (scheme, from) = rest.split_at(at + 3);
        out.push_str(scheme);
        let end = from.find(['/', '?', '#', ' ', '"', '\'']);
        let (authority, path) = from.split_at(end.unwrap_or(from.len()));
        match authority.rsplit_once('@') {
            Some((user, host)) if user.contains(':') => {
                let name = user.split(':').next().unwrap_or_default();
                out.push_str(&format!("{name}:{REDACTED}@{host}"));
            }
            _ => out.push_str(authority),
        }
        rest = path;
    }
    out + rest
}

/// Long runs of what keys and tokens are made of (base64 in both alphabets, and hexadecimal).
fn opaque_runs(text: &str) -> String {
    let with_slashes = replace_runs(
        text,
        |c| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '='),
        |run| run.len() == SECRET_KEY && is_random(run),
    );
    let with_hyphens = replace_runs(
        &with_slashes,
        |c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '_' | '='),
        |run| run.len() >= OPAQUE_RUN && is_random(run),
    );
    replace_runs(
        &with_hyphens,
        |c| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '='),
        |run| {
            let access_key =
                run.len() == 20 && (run.starts_with("AKIA") || run.starts_with("ASIA"));
            access_key
                || (run.len() >= OPAQUE_RUN
                    && run.bytes().any(|byte| byte.is_ascii_digit())
                    && run.bytes().any(|byte| byte.is_ascii_alphabetic()))
        },
    )
}

/// Whether letters of both cases and digits follow each other as if by chance: one is unlike the one
/// before it six times of ten in a key, and seldom in a name.
fn is_random(run: &str) -> bool {
    let classes: Vec<u8> = run
        .bytes()
        .filter_map(|byte| match byte {
            b'a'..=b'z' => Some(0),
            b'A'..=b'Z' => Some(1),
            b'0'..=b'9' => Some(2),
            _ => None,
        })
        .collect();
    let changes = classes.windows(2).filter(|pair| pair[0] != pair[1]).count();
    changes * 3 >= classes.len() && changes > 0
}

fn replace_runs(text: &str, in_run: fn(char) -> bool, is_secret: fn(&str) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (run, tail) = rest.split_at(rest.find(|c| !in_run(c)).unwrap_or(rest.len()));
        out.push_str(if is_secret(run) { REDACTED } else { run });
        let (between, next) = tail.split_at(tail.find(in_run).unwrap_or(tail.len()));
        out.push_str(between);
        rest = next;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let token = "AQAEAJk2xT0b5vV9x3mR7wq1LtYz8UcDf4GhJk6NpQsSaBeFhIlMoPr0==";
        let table: [(&[&str], &[&str]); 23] = [
            (
                &["curl", "-s", "http://h/latest/"],
                &["curl", "-s", "http://h/latest/"],
            ),
            (
                &["curl", "-H", &format!("X-aws-ec2-metadata-token: {token}")],
                &["curl", "-H", "X-aws-ec2-metadata-token: [redacted]"],
            ),
            (
                &["curl", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"],
                &["curl", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"],
            ),
            (
                &["mysql", "--password=hunter2"],
                &["mysql", "--password=[redacted]"],
            ),
            (
                &["x", "--token", "abc", "keep"],
                &["x", "--token", "[redacted]", "keep"],
            ),
            (
                &["x", "--token", "--verbose"],
                &["x", "--token", "--verbose"],
            ),
            (
                &["env", "DB_PASSWORD=x y", "run"],
                &["env", "DB_PASSWORD=[redacted]", "run"],
            ),
            (
                &["psql", "postgres://me:pw@db/x"],
                &["psql", "postgres://me:[redacted]@db/x"],
            ),
            (
                &["sh", "-c", &format!("T={token}; x")],
                &["sh", "-c", "[redacted]; x"],
            ),
            (&["x", "AKIAIOSFODNN7EXAMPLE"], &["x", "[redacted]"]),
            (
                &["/usr/lib/python3/dist-packages/averyveryverylongmodulenameindeed"],
                &["/usr/lib/python3/dist-packages/averyveryverylongmodulenameindeed"],
            ),
            (
                &[
                    "sh",
                    "-c",
                    "mysql --password=hunter2 db; TOKEN='a b' run --token abc -v",
                ],
                &[
                    "sh",
                    "-c",
                    "mysql --password=[redacted] db; TOKEN='[redacted]' run --token [redacted] -v",
                ],
            ),
            (
                &[
                    "sh",
                    "-c",
                    "curl -H 'Authorization: Bearer a.b' http://me:pw@h http://you:pw@i",
                ],
                &[
                    "sh",
                    "-c",
                    "curl -H 'Authorization: [redacted]' http://me:[redacted]@h http://you:[redacted]@i",
                ],
            ),
            (
                &["x", r#"{"SecretAccessKey": "abc", "Code": "ok"}"#],
                &["x", r#"{"SecretAccessKey": "[redacted]", "Code": "ok"}"#],
            ),
            (
                &["curl", "http://h/?a=1&X-Amz-Signature=abc&b=2"],
                &["curl", "http://h/?a=1&X-Amz-Signature=[redacted]&b=2"],
            ),
            (
                &["curl", "-u", "me:pw", "--user", "me:pw", "-ume:pw"],
                &[
                    "curl",
                    "-u",
                    "me:[redacted]",
                    "--user",
                    "me:[redacted]",
                    "-ume:[redacted]",
                ],
            ),
            (&["x", "--token", "-Abc"], &["x", "--token", "[redacted]"]),
            (
                &["x", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"],
                &["x", "[redacted]"],
            ),
            (
                &["x", "AQAEAJk2-T0b5vV9x3mR7-q1LtYz8UcDf4G-JkNp_sS="],
                &["x", "[redacted]"],
            ),
            (
                &["/opt/kubernetes-node-problem-detector-v0.8.13/bin/detector2"],
                &["/opt/kubernetes-node-problem-detector-v0.8.13/bin/detector2"],
            ),
            (
                &["x", "tokens are fine: so is this", "https://token/x"],
                &["x", "tokens are fine: so is this", "https://token/x"],
            ),
            (&["x", "--token", ""], &["x", "--token", "[redacted]"]),
            (&["é", "", "--secret="], &["é", "", "--secret="]),
        ];
        for (arguments, expected) in table {
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            assert_eq!(command_line(&arguments), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics_and_never_keeps_a_session_token(
            before in ".{0,20}",
            token in "[A-Za-z0-9_-]{54}==",
            after in ".{0,20}",
        ) {
            // Nearly all tokens.
            proptest::prop_assume!(is_random(&token[..54]));
            for arguments in [
                vec![format!("{before}{token}{after}")],
                vec![before, token.clone(), after],
            ] {
                let got = command_line(&arguments).join(" ");
                for piece in token.as_bytes().windows(16) {
                    let piece = str::from_utf8(piece).unwrap();
                    proptest::prop_assert!(!got.contains(piece), "{}", got);
                }
            }
        }
    }
}
