//! What a path means.

use std::borrow::Cow;

use super::Malformed;

/// A path in the one form in which paths are compared: percent-encoding decoded, `.`, `..` and empty
/// segments resolved, no slash at the end (a listing has both names).
///
/// It is for judging alone: the service gets the path as the client wrote it. So what the service
/// might read differently has no such form, and is refused: `..` behind an empty segment, encoded `/`, `\`, `%`, `?`, `#` and `;`,
/// parameters after `;`, control characters, and whatever is not ASCII. No path of the service has any
/// of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path<'a>(Cow<'a, str>);

impl<'a> Path<'a> {
    /// Reads the path of a request.
    ///
    /// # Errors
    /// [`Malformed::Path`] if it has no form that everybody would agree on.
    pub fn read(path: &'a str) -> Result<Self, Malformed> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
        if path.bytes().all(is_plain) && !path.contains("//") && !path.contains("/.") {
            let trimmed = path.strip_suffix('/').unwrap_or(path);
            return Ok(Self(Cow::Borrowed(trimmed)));
        }
        let decoded = decode(path).ok_or(Malformed::Path)?;
        let mut segments = Vec::new();
        for segment in decoded.strip_prefix('/').unwrap_or(&decoded).split('/') {
            match segment {
                "." => {}
                // It goes up from nothing (RFC 3986, 5.2.4), or, where slashes are merged first, from
                // what is before it.
                ".." if segments.pop() == Some("") => return Err(Malformed::Path),
                ".." => {}
                name => segments.push(name),
            }
        }
        let mut resolved = String::with_capacity(decoded.len());
        for segment in segments.into_iter().filter(|it| !it.is_empty()) {
            resolved.push('/');
            resolved.push_str(segment);
        }
        Ok(Self(Cow::Owned(resolved)))
    }

    /// The path in this form; the root is empty.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `path` or lies below it; `path` is in this form, too.
    #[must_use]
    pub fn is_within(&self, path: &str) -> bool {
        self.0
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether session tokens are had here, in whatever version of the service's tree.
    #[must_use]
    pub fn is_token(&self) -> bool {
        let mut segments = self.0.split('/').skip(2);
        segments.next() == Some("api")
            && segments.next() == Some("token")
            && segments.next().is_none()
    }
}

fn decode(path: &str) -> Option<String> {
    let mut decoded = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let meant = match byte {
            b'%' => {
                let digits =
                    [bytes.next()?, bytes.next()?].map(|digit| char::from(digit).to_digit(16));
                let [Some(high), Some(low)] = digits else {
                    return None;
                };
                let meant = u8::try_from(high * 16 + low).ok()?;
                if b"/%?#".contains(&meant) {
                    return None;
                }
                meant
            }
            byte => byte,
        };
        if !(b' '..=b'~').contains(&meant) || b"\\;".contains(&meant) {
            return None;
        }
        decoded.push(meant.into());
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D1: spellings that might lead to the same document are the same path, or none.
    #[test]
    fn d1_a_path_has_one_meaning_or_none() {
        let plain = "/latest/meta-data/iam";
        let table = [
            (plain, Some(plain)),
            ("/latest/meta-data/iam/", Some(plain)),
            ("//latest///meta-data//iam//", Some(plain)),
            ("/latest/./meta-data/./iam/.", Some(plain)),
            ("/latest/user-data/../meta-data/x/../iam", Some(plain)),
            ("/latest//meta-data/x/..//iam", Some(plain)),
            ("/../../latest/meta-data/iam", Some(plain)),
            ("/latest/meta%2Ddata/%69am", Some(plain)),
            ("/latest/%2e%2E/latest/%2e/meta-data/iam", Some(plain)),
            ("/", Some("")),
            ("/..", Some("")),
            // Others' names for other things: case and dots count.
            ("/latest/meta-data/IAM", Some("/latest/meta-data/IAM")),
            ("/latest/meta-data/iam.", Some("/latest/meta-data/iam.")),
            ("/latest/meta-data/iam...", Some("/latest/meta-data/iam...")),
            ("/latest/meta-data/iam%20", Some("/latest/meta-data/iam ")),
            ("/latest/meta-data/@a:b+c", Some("/latest/meta-data/@a:b+c")),
            // Nobody's.
            ("/latest/meta-data//../iam", None),
            ("/latest/meta-data//./../iam", None),
            ("/latest/meta-data//x/../../iam", None),
            ("/latest/meta-data//%2e%2e/iam", None),
            ("//../latest", None),
            ("/latest/meta-data/iam//..", None),
            ("/latest/meta-data%2fiam", None),
            ("/latest/meta-data/%252e%252e", None),
            ("/latest/meta-data/%25", None),
            ("/latest/meta-data\\iam", None),
            ("/latest/meta-data/%5ciam", None),
            ("/latest/meta-data/iam;x=y", None),
            ("/latest/meta-data/iam%3bx", None),
            ("/latest/meta-data/iam%00", None),
            ("/latest/meta-data/iam%0a", None),
            ("/latest/meta-data/iam%3f", None),
            ("/latest/meta-data/iam%23", None),
            ("/latest/meta-data/%c0%ae", None),
            ("/latest/meta-data/%e2%80%8biam", None),
            ("/latest/meta-data/i\u{e4}m", None),
            ("/latest/meta-data/%", None),
            ("/latest/meta-data/%6", None),
            ("/latest/meta-data/%+1", None),
            ("/latest/meta-data/%gg", None),
        ];
        for (path, expected) in table {
            let read = Path::read(path);
            let read = read.as_ref().map(Path::as_str).ok();
            assert_eq!(read, expected, "{path}");
        }
    }

    /// D2: what is said of `/a` is not said of `/ab`.
    #[test]
    fn d2_a_directory_does_not_hold_its_namesakes() {
        let table = [
            ("/a", true),
            ("/a/", true),
            ("/a/b", true),
            ("/x/../a/b", true),
            ("/ab", false),
            ("/a%62", false),
            ("/a.", false),
            ("/A", false),
            ("/", false),
            ("/b/a", false),
            ("/a/../b", false),
        ];
        for (path, expected) in table {
            assert_eq!(
                Path::read(path).unwrap().is_within("/a"),
                expected,
                "{path}"
            );
        }
        assert!(Path::read("/a").unwrap().is_within(""));
    }

    proptest::proptest! {
        /// Reading it once more changes nothing, and nothing of what is resolved is left.
        #[test]
        fn the_form_is_final(path in "/([a-c./%]|%2[0-9a-f]|%6[0-9]|\\.\\.){0,20}") {
            if let Ok(read) = Path::read(&path) {
                let text = read.as_str();
                proptest::prop_assert!(!text.split('/').skip(1).any(|it| ["", ".", ".."].contains(&it)), "{text}");
                if !text.contains(['%', ' ', '!', '"', '+', ';']) {
                    let again = Path::read(text).unwrap();
                    proptest::prop_assert_eq!(again.as_str(), text);
                }
            }
        }
    }
}
