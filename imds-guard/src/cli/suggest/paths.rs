//! Paths that were asked for, as the `path` of a rule.

use std::collections::BTreeSet;

use crate::policy::path::Path;

/// Paths that a suggestion names; of more, those that lie next to each other become the one above them.
const MAX_PATHS: usize = 8;

/// What is no by-catch of a listing above it: a rule's path is about all that lies below, too.
const SECRETS: [&str; 3] = [
    "meta-data/iam/security-credentials",
    "meta-data/identity-credentials/ec2/security-credentials",
    "user-data",
];

/// Patterns for all paths that were asked for, without the secrets that nobody asked for.
pub fn patterns<'a>(asked: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let asked: BTreeSet<String> = asked.into_iter().map(normal).collect();
    let mut named = asked.clone();
    while named.len() > MAX_PATHS
        && let Some(deepest) = named.iter().max_by_key(|it| it.matches('/').count())
    {
        let above = deepest.rsplit_once('/').map_or("", |(above, _)| above);
        let above = above.to_owned();
        named.retain(|path| !is_within(path, &above));
        named.insert(above);
    }
    let is_by_catch = |secret: &&str| {
        let is_covered = named
            .iter()
            .any(|path| is_within(secret, below_version(path)));
        let is_asked_for = asked
            .iter()
            .any(|path| is_within(below_version(path), secret));
        is_covered && !is_asked_for
    };
    let by_catch = SECRETS.into_iter().filter(is_by_catch);
    let by_catch = by_catch.map(|secret| format!("!{secret}"));
    named
        .iter()
        .map(|path| pattern(path))
        .chain(by_catch)
        .collect()
}

/// A path as the guard compares it; of one that was cut in the middle of a letter, the one above it.
fn normal(path: &str) -> String {
    let mut path = path;
    loop {
        if let Ok(read) = Path::read(path) {
            return read.as_str().to_owned();
        }
        path = path.rsplit_once('/').map_or("", |(above, _)| above);
    }
}

/// What a path says behind the version of the tree.
fn below_version(path: &str) -> &str {
    let path = path.trim_start_matches('/');
    path.split_once('/').map_or("", |(_, rest)| rest)
}

/// Whether a path is this one, or lies below it; everything lies below the empty one.
fn is_within(path: &str, above: &str) -> bool {
    let rest = path.strip_prefix(above);
    rest.is_some_and(|rest| above.is_empty() || rest.is_empty() || rest.starts_with('/'))
}

/// A path as a pattern that means it. What cannot stand in one is any character.
fn pattern(path: &str) -> String {
    let plain: String = path
        .chars()
        .map(|it| match it {
            ' ' | '%' | ';' | '#' => "?".to_owned(),
            '*' | '?' | '[' | ']' | '{' | '}' | '!' => format!("\\{it}"),
            it => it.to_string(),
        })
        .collect();
    let plain = plain.replace("..", "?.");
    if plain.is_empty() { "/".into() } else { plain }
}
