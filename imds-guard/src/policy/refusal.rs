//! How a rule refuses.

use std::borrow::Cow;

use hyper::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::Action;

/// The answer to a request that a rule denies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refusal {
    /// As for a request without a session token: clients fetch a new one, and ask again.
    Unauthorized,
    /// As where access is switched off.
    #[default]
    Forbidden,
    /// As if there were no such thing.
    NotFound,
    /// None.
    Drop,
}

impl Refusal {
    /// What is done.
    #[must_use]
    pub const fn action(self) -> Action {
        match self {
            Self::Unauthorized => Action::Refuse(StatusCode::UNAUTHORIZED),
            Self::Forbidden => Action::Refuse(StatusCode::FORBIDDEN),
            Self::NotFound => Action::Refuse(StatusCode::NOT_FOUND),
            Self::Drop => Action::Drop,
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Written {
    Status(u16),
    Word(String),
}

impl Serialize for Refusal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.action() {
            Action::Refuse(status) => serializer.serialize_u16(status.as_u16()),
            _ => serializer.serialize_str("drop"),
        }
    }
}

impl<'de> Deserialize<'de> for Refusal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Written::deserialize(deserializer) {
            Ok(Written::Status(401)) => Ok(Self::Unauthorized),
            Ok(Written::Status(403)) => Ok(Self::Forbidden),
            Ok(Written::Status(404)) => Ok(Self::NotFound),
            Ok(Written::Word(word)) if word == "drop" => Ok(Self::Drop),
            _ => Err(D::Error::custom("an answer is 401, 403, 404 or \"drop\"")),
        }
    }
}

impl JsonSchema for Refusal {
    fn schema_name() -> Cow<'static, str> {
        "Refusal".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"enum": [401, 403, 404, "drop"]})
    }
}
