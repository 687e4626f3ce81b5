//! What looks like a secret in a command line is not recorded.

const REDACTED: &str = "[redacted]";

/// Parts of names whose values are secrets.
const SECRET_NAMES: [&str; 8] = [
    "password",
    "passwd",
    "secret",
    "token",
    "credential",
    "apikey",
    "api-key",
    "authorization",
];

/// Shortest run of letters and digits that is taken for a key or token. Session tokens have 56
/// characters, secret access keys 40.
const OPAQUE_RUN: usize = 32;

/// The command line with secrets replaced: the value of `--password=…`, `--token …`, `SECRET=…` and
/// `Header-Token: …`, passwords in URLs, access key ids, and long runs of letters and digits.
///
/// A heuristic: it hides too much rather than too little, and a short secret under a harmless name
/// still passes.
pub fn command_line(arguments: &[String]) -> Vec<String> {
    let mut value_of_secret = false;
    arguments
        .iter()
        .map(|argument| {
            let is_option = argument.starts_with('-');
            if value_of_secret && !is_option {
                value_of_secret = false;
                return REDACTED.to_owned();
            }
            value_of_secret =
                is_option && !argument.contains(['=', ' ']) && is_secret_name(argument);
            self::argument(argument)
        })
        .collect()
}

fn argument(argument: &str) -> String {
    if let Some(at) = argument.find(['=', ':'])
        && is_secret_name(&argument[..at])
        && !argument[at..].starts_with("://")
        && argument.len() > at + 1
    {
        let separator_end =
            at + 1 + argument[at + 1..].len() - argument[at + 1..].trim_start().len();
        return format!("{}{REDACTED}", &argument[..separator_end]);
    }
    opaque_runs(&url_password(argument))
}

fn is_secret_name(name: &str) -> bool {
    // A name, not a sentence that contains one: scripts are handled by their opaque runs.
    let name = name.to_ascii_lowercase();
    name.len() <= 64
        && !name.contains(|c: char| c.is_whitespace() || c == '/')
        && !name.ends_with("ttl-seconds")
        && SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// `scheme://user:password@host` loses the password.
fn url_password(argument: &str) -> String {
    let Some((scheme, rest)) = argument.split_once("://") else {
        return argument.to_owned();
    };
    let authority_end = rest.find(['/', '?', '#', ' ']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    match authority.rsplit_once('@') {
        Some((user, host)) => match user.split_once(':') {
            Some((user, _)) => format!("{scheme}://{user}:{REDACTED}@{host}{path}"),
            None => argument.to_owned(),
        },
        None => argument.to_owned(),
    }
}

fn opaque_runs(argument: &str) -> String {
    let in_run = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '=');
    let mut out = String::with_capacity(argument.len());
    let mut rest = argument;
    while !rest.is_empty() {
        let end = rest.find(|c| !in_run(c)).unwrap_or(rest.len());
        let (run, tail) = rest.split_at(end);
        out.push_str(if is_opaque(run) { REDACTED } else { run });
        let next = tail.find(in_run).unwrap_or(tail.len());
        out.push_str(&tail[..next]);
        rest = &tail[next..];
    }
    out
}

fn is_opaque(run: &str) -> bool {
    let access_key = run.len() == 20 && (run.starts_with("AKIA") || run.starts_with("ASIA"));
    access_key
        || (run.len() >= OPAQUE_RUN
            && run.bytes().any(|byte| byte.is_ascii_digit())
            && run.bytes().any(|byte| byte.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let token = "AQAEAJk2xT0b5vV9x3mR7wq1LtYz8UcDf4GhJk6NpQsSaBeFhIlMoPr0==";
        let table: [(&[&str], &[&str]); 12] = [
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
            (&["é", "", "--secret="], &["é", "", "--secret="]),
        ];
        for (arguments, expected) in table {
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            assert_eq!(command_line(&arguments), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics_and_never_keeps_a_session_token(before in ".{0,20}", after in ".{0,20}") {
            let token = "AQAEAJk2xT0b5vV9x3mR7wq1LtYz8UcDf4GhJk6NpQsSaBeFhIlMoPr0==";
            let got = command_line(&[format!("{before}{token}{after}")]);
            proptest::prop_assert!(!got[0].contains(token));
        }
    }
}
