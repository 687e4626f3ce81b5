//! What selectors are compared with.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::path::Path;

/// Characters that mean something in a glob.
const SPECIAL: [char; 5] = ['*', '?', '[', '{', '\\'];

/// One pattern or a list of them. It matches what one of them matches, and none that begins with `!`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OneOf<T> {
    any: Vec<T>,
    none: Vec<T>,
}

/// A text, or a glob for texts: `*` is anything but `/`, `**` anything, `?` one character, `[a-z]` and
/// `{a,b}` one of these. Case matters, and nothing is folded or trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    text: Box<str>,
    is_literal: bool,
}

/// A number, such as a user id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u32);

/// A glob for paths of the metadata service, and for all that lies below them. Versions of the
/// service's tree hold the same things, so `/latest/…` is about every version; what does not begin with
/// a slash is about every version, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathGlob {
    /// `None` for every version.
    version: Option<Glob>,
    /// What comes behind the version; of `/**/…`, which may begin anywhere, the whole.
    rest: Glob,
    is_whole: bool,
    written: Box<str>,
}

/// What can stand in a rule behind an optional `!`.
pub trait Pattern: Sized {
    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn read(text: &str) -> Result<Self, String>;

    /// As it was written.
    fn written(&self) -> Cow<'_, str>;

    /// Whether it may be written as a number.
    const IS_NUMBER: bool = false;
}

impl<T> OneOf<T> {
    /// Whether something matches, when `is` says what a single pattern matches.
    #[must_use]
    pub fn matches(&self, is: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&is)) && !self.none.iter().any(&is)
    }

    /// The patterns of which one must match.
    #[must_use]
    pub fn any(&self) -> &[T] {
        &self.any
    }

    /// All patterns.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.any.iter().chain(&self.none)
    }

    /// Adds what is made of each pattern, on the same side.
    pub fn add_each(&mut self, also: impl Fn(&T) -> Option<T>) {
        for side in [&mut self.any, &mut self.none] {
            let more: Vec<T> = side.iter().filter_map(&also).collect();
            side.extend(more);
        }
    }
}

impl<T: Pattern> OneOf<T> {
    /// Of a list as in a rule.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn read<'a>(list: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut patterns = Self {
            any: Vec::new(),
            none: Vec::new(),
        };
        for text in list {
            match text.strip_prefix('!') {
                Some(text) => patterns.none.push(T::read(text)?),
                None => patterns.any.push(T::read(text)?),
            }
        }
        if patterns.all().next().is_none() {
            return Err("an empty list matches nothing: leave the key out".into());
        }
        Ok(patterns)
    }

    fn list(&self) -> Vec<String> {
        let any = self.any.iter().map(|it| it.written().into_owned());
        let none = self.none.iter().map(|it| format!("!{}", it.written()));
        any.chain(none).collect()
    }
}

impl Glob {
    /// A text that is no glob, whatever is in it.
    #[must_use]
    pub fn literal(text: &str) -> Self {
        Self {
            text: text.into(),
            is_literal: true,
        }
    }

    /// Whether it matches.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        if self.is_literal {
            *self.text == *text
        } else {
            fast_glob::glob_match(&*self.text, text)
        }
    }

    /// Whether it matches a path, or a directory above it.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        if self.is_literal {
            let rest = path.strip_prefix(&*self.text);
            return rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        }
        let above = path.match_indices('/').map(|(at, _)| &path[..at]);
        self.matches(path) || above.filter(|it| !it.is_empty()).any(|it| self.matches(it))
    }

    /// The text, if it is no more than that.
    #[must_use]
    pub fn as_literal(&self) -> Option<&str> {
        self.is_literal.then_some(&*self.text)
    }
}

impl PathGlob {
    /// Whether it is about this path, or one above it.
    #[must_use]
    pub fn covers(&self, path: &Path<'_>) -> bool {
        let path = path.as_str().trim_start_matches('/');
        let (version, rest) = match path.split_once('/') {
            _ if self.is_whole => ("", path),
            Some(split) => split,
            None => (path, ""),
        };
        self.version
            .as_ref()
            .is_none_or(|glob| glob.matches(version))
            && (self.rest.text.is_empty() || self.rest.covers(rest))
    }
}

impl Pattern for Glob {
    fn read(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty pattern matches nothing".into());
        }
        if text.starts_with('!') {
            return Err(format!("\"!{text}\" is excluded twice"));
        }
        fast_glob::validate(text).map_err(|error| format!("\"{text}\": {error}"))?;
        Ok(Self {
            text: text.into(),
            is_literal: !text.contains(SPECIAL),
        })
    }

    fn written(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.text)
    }
}

impl Pattern for PathGlob {
    fn read(text: &str) -> Result<Self, String> {
        let odd = |it: char| !it.is_ascii_graphic() || "%;#".contains(it);
        if text.contains(odd) || format!("{text}/").contains("/./") || text.contains("..") {
            return Err(format!(
                "\"{text}\": write paths plainly, without %, ;, # and dots; they are compared decoded"
            ));
        }
        if text.contains("//") {
            return Err(format!("\"{text}\": write paths with single slashes"));
        }
        let trimmed = text.strip_suffix('/').unwrap_or(text);
        let (version, rest) = match trimmed.strip_prefix('/') {
            // `/**` alone is everything.
            Some(whole) if whole.starts_with("**/") => ("**", whole),
            Some(absolute) => absolute.split_once('/').unwrap_or((absolute, "")),
            None => ("latest", trimmed),
        };
        let glob = |text: &str| match text {
            "" => Ok(Glob::literal("")),
            text => Glob::read(text),
        };
        if text.is_empty() {
            return Err("an empty pattern matches nothing".into());
        }
        Ok(Self {
            version: match version {
                "" | "latest" | "*" | "**" => None,
                version => Some(Glob::read(version)?),
            },
            rest: glob(rest)?,
            is_whole: version == "**",
            written: text.into(),
        })
    }

    fn written(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.written)
    }
}

impl Pattern for Number {
    fn read(text: &str) -> Result<Self, String> {
        let number = text.parse();
        number
            .map(Self)
            .map_err(|_| format!("\"{text}\" is no number from 0 to 4294967295"))
    }

    fn written(&self) -> Cow<'_, str> {
        Cow::Owned(self.0.to_string())
    }

    const IS_NUMBER: bool = true;
}

impl<T: Pattern> fmt::Display for OneOf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.list().join(", "))
    }
}

impl<T: Pattern> Serialize for OneOf<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.list().serialize(serializer)
    }
}

impl<'de, T: Pattern> Deserialize<'de> for OneOf<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Pattern> de::Visitor<'de> for Visitor<T> {
            type Value = OneOf<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(if T::IS_NUMBER {
                    "a number, \"!\" and a number, or a list of these"
                } else {
                    "a text or a list of texts"
                })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                OneOf::read([text]).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
                if T::IS_NUMBER {
                    self.visit_str(&number.to_string())
                } else {
                    Err(E::invalid_type(de::Unexpected::Signed(number), &self))
                }
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
                match i64::try_from(number) {
                    Ok(number) => self.visit_i64(number),
                    Err(_) => Err(E::invalid_type(de::Unexpected::Unsigned(number), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> Result<Self::Value, A::Error> {
                let mut texts = Vec::new();
                while let Some(item) = list.next_element::<Item>()? {
                    texts.push(match item {
                        Item::Text(text) => text,
                        Item::Number(number) if T::IS_NUMBER => number.to_string(),
                        Item::Number(number) => {
                            let number = de::Unexpected::Signed(number);
                            return Err(de::Error::invalid_type(number, &self));
                        }
                    });
                }
                OneOf::read(texts.iter().map(String::as_str)).map_err(de::Error::custom)
            }
        }
        deserializer.deserialize_any(Visitor(PhantomData))
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a list here has texts and numbers in it")]
enum Item {
    Text(String),
    Number(i64),
}

impl<T: Pattern> JsonSchema for OneOf<T> {
    fn schema_name() -> Cow<'static, str> {
        if T::IS_NUMBER { "Numbers" } else { "Patterns" }.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        if T::IS_NUMBER {
            json_schema!({"anyOf": [
                {"type": "integer", "minimum": 0, "maximum": u32::MAX},
                {"type": "string"},
                {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1}
            ]})
        } else {
            json_schema!({"anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1}
            ]})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn globs(list: &[&str]) -> OneOf<Glob> {
        OneOf::read(list.iter().copied()).unwrap()
    }

    #[test]
    fn one_must_match_and_none_that_is_excluded() {
        let table: [(&[&str], &str, bool); 9] = [
            (&["a"], "a", true),
            (&["a"], "A", false),
            (&["a"], "a ", false),
            (&["a", "b*"], "bc", true),
            (&["b*"], "b/c", false),
            (&["b/**"], "b/c/d", true),
            (&["!a"], "b", true),
            (&["!a"], "a", false),
            (&["*", "!a"], "a", false),
        ];
        for (list, text, expected) in table {
            let got = globs(list).matches(|glob| glob.matches(text));
            assert_eq!(got, expected, "{list:?} {text}");
        }
    }

    #[test]
    fn a_path_covers_what_lies_below_it_in_every_version() {
        let credentials = "/latest/meta-data/iam/security-credentials/role";
        let old = "/2009-04-04/meta-data/iam/security-credentials/role";
        let table = [
            ("/latest/meta-data/iam", credentials, true),
            ("/latest/meta-data/iam", old, true),
            ("/latest/meta-data/iam/", credentials, true),
            ("meta-data/iam", old, true),
            ("meta-data/iam/**", credentials, true),
            ("meta-data/*/security-credentials", credentials, true),
            ("/2009-*/meta-data/iam", old, true),
            ("/2009-*/meta-data/iam", credentials, false),
            ("/latest/meta-data/ia", credentials, false),
            ("/latest/meta-data/iam", "/latest/meta-data/iamx", false),
            ("/latest/meta-data/iam", "/latest/meta-data", false),
            ("/latest/meta-data/iam", "/latest/iam", false),
            ("/", "", true),
            ("/**", credentials, true),
            ("/**", "/latest", true),
            ("/**/", credentials, true),
            ("/**/security-credentials", old, true),
            ("/**/security-credentials/*", credentials, true),
            ("/**/security-credentials", "/latest/meta-data/iam", false),
            ("/**/user-data", credentials, false),
            ("/**/iam/**", credentials, true),
            ("/**/meta-data", credentials, true),
            ("/**/latest/meta-data", credentials, true),
            ("**/iam", credentials, true),
            ("**/user-data", credentials, false),
            ("**", "/latest", true),
            ("/latest/**", "/latest", true),
            ("/*/meta-data", old, true),
            ("/*/user-data", old, false),
            ("/", credentials, true),
            ("/latest", old, true),
            ("user-data", "/latest/user-data", true),
        ];
        for (pattern, path, expected) in table {
            let got = PathGlob::read(pattern).unwrap();
            assert_eq!(
                got.covers(&Path::read(path).unwrap()),
                expected,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn what_is_no_pattern_is_said() {
        for text in ["", "[a", "{a,b", "a\\"] {
            assert!(Glob::read(text).is_err(), "{text}");
        }
        for text in [
            "",
            "/latest//iam",
            "/latest/../iam",
            "/a%2f",
            "/a/./b",
            "/é",
            "[a",
        ] {
            assert!(PathGlob::read(text).is_err(), "{text}");
        }
        for text in ["", "-1", "4294967296", "x"] {
            assert!(Number::read(text).is_err(), "{text}");
        }
        assert!(OneOf::<Glob>::read([]).is_err());
        assert!(OneOf::<Glob>::read(["!!a"]).is_err());
    }
}
