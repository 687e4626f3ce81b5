//! Where something is, for whoever has to mend it.

use std::{collections::BTreeMap, fmt};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::Origin;
use crate::failure::Failure;

/// A place in a text; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Letter in the line.
    pub column: usize,
}

/// Where a file says what.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Its keys' values.
    pub keys: BTreeMap<String, Place>,
    /// The names of its rules.
    pub rules: Vec<Place>,
}

/// What is wrong with a key, or with some of them together.
#[derive(Debug)]
pub struct Wrong {
    keys: Vec<&'static str>,
    what: String,
}

impl Place {
    /// Of the letter at which a text ends.
    #[must_use]
    pub fn after(before: &str) -> Self {
        let begin = before.rfind('\n').map_or(0, |at| at + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[begin..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

impl Places {
    /// In a text that is TOML.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let Ok(table) = DeTable::parse(text) else {
            return Self::default();
        };
        // Lines are counted once: there may be many rules.
        let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
        let place = |at: usize| {
            let line = ends.partition_point(|end| *end < at);
            let begin = line.checked_sub(1).map_or(0, |before| ends[before] + 1);
            Place {
                line: line + 1,
                column: text[begin..at].chars().count() + 1,
            }
        };
        let mut places = Self::default();
        for (key, value) in table.get_ref() {
            if let ("rule", DeValue::Array(list)) = (&**key.get_ref(), value.get_ref()) {
                places.rules = list.iter().map(|rule| place(start_of(rule))).collect();
            } else {
                let place = place(value.span().start);
                places.keys.insert(key.get_ref().to_string(), place);
            }
        }
        places
    }
}

/// Where a rule's name is, or else the rule itself.
fn start_of(rule: &Spanned<DeValue<'_>>) -> usize {
    let name = rule.get_ref().as_table().and_then(|it| it.get("name"));
    name.map_or(rule.span().start, |name| name.span().start)
}

impl Wrong {
    /// With the keys by which it can be mended, the likeliest first.
    #[must_use]
    pub fn new(keys: impl Into<Vec<&'static str>>, what: String) -> Self {
        let keys = keys.into();
        Self { keys, what }
    }

    /// With the place where the first of the keys that is given comes from.
    #[must_use]
    pub fn at(self, origins: &BTreeMap<String, Origin>) -> Failure {
        let origin = self.keys.iter().find_map(|key| origins.get(*key));
        match origin {
            Some(origin) => Failure::Settings(format!("{origin}: {}", self.what)),
            None => self.into(),
        }
    }
}

impl From<Wrong> for Failure {
    fn from(wrong: Wrong) -> Self {
        Self::Settings(wrong.what)
    }
}
