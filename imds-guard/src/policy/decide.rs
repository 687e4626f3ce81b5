//! The decision.

use std::fmt;

use clap::ValueEnum;
use hyper::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Imds, Malformed, Request};

/// What happens to requests that the policy does not want.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Everything is forwarded; what `enforce` would refuse is marked in the events.
    #[default]
    Audit,
    /// Requests without a session token are refused with 401, as an instance with
    /// `HttpTokens=required` does.
    Enforce,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        })
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Forwarded.
    Allow,
    /// Forwarded, though enforce mode would have refused it.
    Audit,
    /// Refused by the guard; nothing reached the metadata service.
    Deny,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It carries a session token.
    SessionToken,
    /// It asks for a session token.
    TokenRequest,
    /// IMDSv1: it carries no session token.
    NoToken,
    /// It asks for a token from further away than the hop limit allows.
    HopLimit,
    /// It asks for a token, and a proxy passed it on (`X-Forwarded-For`).
    Forwarded,
    /// It cannot be judged: see `malformed`.
    Malformed,
}

/// The rules as configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether refusals are carried out.
    pub mode: Mode,
    /// How many network hops a token may travel (1–64), as the instance's
    /// `HttpPutResponseHopLimit`; AWS's default is 1.
    pub hop_limit: u8,
}

/// Verdict, reason, and the status the guard answers with if it refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What becomes of the request.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The HTTP status of a refusal, if it is not forwarded.
    pub refusal: Option<StatusCode>,
}

impl Policy {
    /// Judges a request that came over `hops` network hops.
    #[must_use]
    pub fn decide(&self, request: &Request, hops: u8) -> Decision {
        match request.imds {
            Imds::V1 => self.unwanted(Reason::NoToken, StatusCode::UNAUTHORIZED),
            Imds::Token if request.forwarded => {
                self.unwanted(Reason::Forwarded, StatusCode::FORBIDDEN)
            }
            Imds::Token if hops > self.hop_limit => {
                self.unwanted(Reason::HopLimit, StatusCode::FORBIDDEN)
            }
            Imds::Token => Decision::allow(Reason::TokenRequest),
            Imds::V2 => Decision::allow(Reason::SessionToken),
        }
    }

    fn unwanted(&self, reason: Reason, status: StatusCode) -> Decision {
        match self.mode {
            Mode::Audit => Decision {
                verdict: Verdict::Audit,
                reason,
                refusal: None,
            },
            Mode::Enforce => Decision {
                verdict: Verdict::Deny,
                reason,
                refusal: Some(status),
            },
        }
    }
}

impl Decision {
    fn allow(reason: Reason) -> Self {
        Self {
            verdict: Verdict::Allow,
            reason,
            refusal: None,
        }
    }

    /// What cannot be judged is refused in every mode.
    #[must_use]
    pub fn malformed(malformed: Malformed) -> Self {
        let refusal = match malformed {
            Malformed::Target => StatusCode::METHOD_NOT_ALLOWED,
            Malformed::TooLong => StatusCode::URI_TOO_LONG,
            Malformed::Body => StatusCode::PAYLOAD_TOO_LARGE,
            Malformed::RepeatedToken | Malformed::Upgrade => StatusCode::BAD_REQUEST,
        };
        Self {
            verdict: Verdict::Deny,
            reason: Reason::Malformed,
            refusal: Some(refusal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_policy_is_this_table() {
        use {
            Reason::*,
            Verdict::{Allow, Deny},
        };
        let marked = Verdict::Audit;
        let (enforce, audit) = (Mode::Enforce, Mode::Audit);
        #[rustfmt::skip]
        let table = [
            // mode    hop limit  version      forwarded hops  verdict reason        status
            (enforce, 1,         Imds::V1,    false,    1,    Deny,   NoToken,      401),
            (enforce, 1,         Imds::V1,    true,     3,    Deny,   NoToken,      401),
            (enforce, 1,         Imds::V2,    false,    1,    Allow,  SessionToken, 0),
            (enforce, 1,         Imds::V2,    true,     3,    Allow,  SessionToken, 0),
            (enforce, 1,         Imds::Token, false,    1,    Allow,  TokenRequest, 0),
            (enforce, 1,         Imds::Token, false,    2,    Deny,   HopLimit,     403),
            (enforce, 2,         Imds::Token, false,    2,    Allow,  TokenRequest, 0),
            (enforce, 2,         Imds::Token, false,    3,    Deny,   HopLimit,     403),
            (enforce, 2,         Imds::Token, true,     1,    Deny,   Forwarded,    403),
            (audit,   1,         Imds::V1,    false,    1,    marked,  NoToken,      0),
            (audit,   1,         Imds::V2,    false,    1,    Allow,  SessionToken, 0),
            (audit,   1,         Imds::Token, false,    1,    Allow,  TokenRequest, 0),
            (audit,   1,         Imds::Token, false,    2,    marked,  HopLimit,     0),
            (audit,   1,         Imds::Token, true,     1,    marked,  Forwarded,    0),
        ];
        for (mode, hop_limit, imds, forwarded, hops, verdict, reason, refusal) in table {
            let request = Request { imds, forwarded };
            let refusal = StatusCode::from_u16(refusal).ok();
            let got = Policy { mode, hop_limit }.decide(&request, hops);
            assert_eq!(
                got,
                Decision {
                    verdict,
                    reason,
                    refusal
                },
                "{mode:?} {request:?} {hops}"
            );
        }
    }
}
