//! Until when a rule holds.

use std::{borrow::Cow, fmt, str::FromStr};

use jiff::{Timestamp, ToSpan as _, civil::Date, tz::TimeZone};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The end of a day (UTC), or a point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// The end of a day, in UTC.
    EndOf(Date),
    /// This very time.
    At(Timestamp),
}

impl Expiry {
    /// The first moment at which it is over.
    #[must_use]
    pub fn at(self) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::EndOf(day) => day
                .checked_add(1.day())
                .and_then(|next| next.to_zoned(TimeZone::UTC))
                .map_or(Timestamp::MAX, |midnight| midnight.timestamp()),
        }
    }
}

impl FromStr for Expiry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A day has no colon; a time without an offset is nobody's.
        if text.contains(':') {
            let time = text.parse();
            return time.map(Self::At).map_err(|_| {
                format!("\"{text}\" is no time: write one as 2030-01-31T18:00:00Z, with an offset")
            });
        }
        let day = text.parse();
        day.map(Self::EndOf)
            .map_err(|_| format!("\"{text}\" is no date: write one as 2030-01-31"))
    }
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndOf(day) => day.fmt(f),
            Self::At(at) => at.fmt(f),
        }
    }
}

impl Serialize for Expiry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// TOML has dates of its own; JSON has not.
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "that is no date: write one as 2030-01-31, or a time as 2030-01-31T18:00:00Z"
        )]
        enum Written {
            Toml(toml::value::Datetime),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Toml(date) => date.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Expiry {
    fn schema_name() -> Cow<'static, str> {
        "Expiry".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "string", "format": "date"},
            {"type": "string", "format": "date-time"}
        ]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_holds_until_its_end() {
        #[derive(Deserialize)]
        struct Rule {
            expires: Expiry,
        }
        let table = [
            ("2030-01-31", Some("2030-02-01T00:00:00Z")),
            ("\"2030-01-31\"", Some("2030-02-01T00:00:00Z")),
            ("2030-01-31T18:00:00+01:00", Some("2030-01-31T17:00:00Z")),
            ("\"2030-01-31T17:00:00Z\"", Some("2030-01-31T17:00:00Z")),
            ("2030-01-31T18:00:00", None),
            ("\"tomorrow\"", None),
            ("2030", None),
            ("20300131", None),
        ];
        for (written, expected) in table {
            let rule = toml::from_str::<Rule>(&format!("expires = {written}"));
            let got = rule.ok().map(|rule| rule.expires.at().to_string());
            assert_eq!(got.as_deref(), expected, "{written}");
        }
    }
}
