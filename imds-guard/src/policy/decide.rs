//! The decision.

use std::fmt;

use clap::ValueEnum;
use hyper::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Binding, Flaw, Imds, Malformed, Request, Rule, RuleAction};

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

impl Mode {
    /// As in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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
    /// IMDSv1 that a rule carries over: forwarded with a session token of the guard's own.
    Upgrade,
    /// Refused by the guard. Nothing of it reached the metadata service; but of a token request that
    /// the instance's own hop limit stands against (`instance_hop_limit`), which only the service's
    /// answer tells.
    Deny,
}

impl fmt::Display for Verdict {
    /// As in events.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Padded, where that is asked for.
        f.pad(match self {
            Self::Allow => "allow",
            Self::Audit => "audit",
            Self::Upgrade => "upgrade",
            Self::Deny => "deny",
        })
    }
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
    /// A rule carries it over from IMDSv1.
    Upgraded,
    /// A rule says so.
    Rule,
    /// The caller sends more requests than a rule lets it.
    Rate,
    /// A rule asks for something about the caller that could not be found out.
    UnknownCaller,
    /// It asks for a token from further away than the hop limit allows.
    HopLimit,
    /// It asks for a token from further away than the instance's own hop limit allows.
    InstanceHopLimit,
    /// It asks for a token, and a proxy passed it on (`X-Forwarded-For`).
    Forwarded,
    /// It asks for a token without saying for how long, or for longer than 6 hours.
    TokenTtl,
    /// The service knows no such method.
    Method,
    /// Its session token was issued somewhere else (`--token-binding`).
    ForeignToken,
    /// Its session token was not issued through the guard, which has been there for longer than any
    /// token lives.
    UnboundToken,
    /// Its session token has expired or was altered.
    InvalidToken,
    /// It cannot be judged: see `malformed`.
    Malformed,
}

impl fmt::Display for Reason {
    /// As in events.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What becomes of a token request from beyond the hop limit.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum HopLimitAction {
    /// It is answered with 403 at once.
    #[default]
    Reject,
    /// It is never answered, as on EC2, where the answer is lost on the way.
    Drop,
}

/// What the session token of a request turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionToken {
    /// Issued by the service, and not bound to anything.
    Plain,
    /// As `Plain`, though every such token must have expired by now.
    Stray,
    /// Issued where it is used now.
    Bound,
    /// Issued somewhere else.
    Foreign,
    /// Sealed by no guard, or expired.
    Invalid,
}

/// Verdict, reason, and what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What becomes of the request.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// How that is done.
    pub action: Action,
}

/// What is done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The service answers it.
    Forward,
    /// The service answers it, as it gets a session token.
    Upgrade,
    /// The guard answers it.
    Refuse(StatusCode),
    /// Nobody answers it.
    Drop,
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Whether refusals are carried out.
    pub mode: Mode,
    /// How far a token may travel.
    pub hop_limit: u8,
    /// What becomes of token requests from further away.
    pub hop_limit_action: HopLimitAction,
    /// Where a session token is valid.
    pub token_binding: Binding,
    /// What the rule that matched wants, and how.
    pub action: Option<(RuleAction, Action)>,
}

impl Terms {
    /// With what a rule wants.
    #[must_use]
    pub fn with(self, rule: Option<&Rule>) -> Self {
        let action = rule.and_then(|rule| {
            let answer = rule.answer.unwrap_or_default();
            rule.action.map(|action| (action, answer.action()))
        });
        let mode = match action {
            Some((RuleAction::Audit, _)) => Mode::Audit,
            _ => self.mode,
        };
        Self {
            mode,
            action,
            ..self
        }
    }

    /// Judges a request that came over `hops` network hops, with a session token that was found to be
    /// `token`, if it has one.
    #[must_use]
    pub fn decide(&self, request: &Request<'_>, hops: u8, token: SessionToken) -> Decision {
        match self.action {
            Some((RuleAction::Deny, how)) => Decision::deny(Reason::Rule, how),
            Some((RuleAction::Audit, _)) => match self.decide_by_mode(request, hops, token) {
                Decision {
                    verdict: Verdict::Allow,
                    ..
                } => self.unwanted(Reason::Rule, Action::Forward),
                marked => marked,
            },
            _ => self.decide_by_mode(request, hops, token),
        }
    }

    fn decide_by_mode(&self, request: &Request<'_>, hops: u8, token: SessionToken) -> Decision {
        let too_far = hops > self.hop_limit;
        let rule = self.action.map(|(action, _)| action);
        match (request.imds, request.flaw, token) {
            (Imds::Token, ..) if request.forwarded => {
                self.refuse(Reason::Forwarded, StatusCode::FORBIDDEN)
            }
            (Imds::Token, ..) if too_far => self.unwanted(Reason::HopLimit, self.beyond_limit()),
            (_, Some(Flaw::Method), _) => {
                self.refuse(Reason::Method, StatusCode::METHOD_NOT_ALLOWED)
            }
            (_, Some(Flaw::Ttl), _) => self.refuse(Reason::TokenTtl, StatusCode::BAD_REQUEST),
            (Imds::Token, None, _) => Decision::allow(Reason::TokenRequest),
            // No further than the guard's own host, and not for a proxy's visitors.
            (Imds::V1, None, _) if rule == Some(RuleAction::Allow) => Decision::allow(Reason::Rule),
            (Imds::V1, None, _)
                if rule == Some(RuleAction::Upgrade) && hops == 1 && !request.forwarded =>
            {
                Decision {
                    verdict: Verdict::Upgrade,
                    reason: Reason::Upgraded,
                    action: Action::Upgrade,
                }
            }
            (Imds::V1, None, _) => self.refuse(Reason::NoToken, StatusCode::UNAUTHORIZED),
            (Imds::V2, None, SessionToken::Foreign) => {
                self.refuse(Reason::ForeignToken, StatusCode::UNAUTHORIZED)
            }
            (Imds::V2, None, SessionToken::Stray) => {
                self.refuse(Reason::UnboundToken, StatusCode::UNAUTHORIZED)
            }
            // Whatever is done, the service would not know it.
            (Imds::V2, None, SessionToken::Invalid) => {
                let action = Action::Refuse(StatusCode::UNAUTHORIZED);
                Decision::deny(Reason::InvalidToken, action)
            }
            (Imds::V2, None, SessionToken::Plain | SessionToken::Bound) => {
                Decision::allow(Reason::SessionToken)
            }
        }
    }

    /// Judges a token request once more when the service has answered it: `ttl` is the answer's, which
    /// says how far the instance lets it go (1–64). In every mode: without the guard, the answer would
    /// not have arrived either.
    #[must_use]
    pub fn decide_answer(&self, hops: u8, ttl: u8) -> Option<Decision> {
        (hops > ttl).then(|| Decision::deny(Reason::InstanceHopLimit, self.beyond_limit()))
    }

    fn beyond_limit(&self) -> Action {
        match self.hop_limit_action {
            HopLimitAction::Reject => Action::Refuse(StatusCode::FORBIDDEN),
            HopLimitAction::Drop => Action::Drop,
        }
    }

    fn refuse(&self, reason: Reason, status: StatusCode) -> Decision {
        self.unwanted(reason, Action::Refuse(status))
    }

    fn unwanted(&self, reason: Reason, action: Action) -> Decision {
        match self.mode {
            Mode::Audit => Decision {
                verdict: Verdict::Audit,
                reason,
                action: Action::Forward,
            },
            Mode::Enforce => Decision::deny(reason, action),
        }
    }
}

impl Decision {
    fn allow(reason: Reason) -> Self {
        Self {
            verdict: Verdict::Allow,
            reason,
            action: Action::Forward,
        }
    }

    fn deny(reason: Reason, action: Action) -> Self {
        Self {
            verdict: Verdict::Deny,
            reason,
            action,
        }
    }

    /// What cannot be judged is refused in every mode.
    #[must_use]
    pub fn malformed(malformed: Malformed) -> Self {
        let status = match malformed {
            Malformed::Target => StatusCode::METHOD_NOT_ALLOWED,
            Malformed::TooLong => StatusCode::URI_TOO_LONG,
            Malformed::Oversized => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Malformed::Body => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::deny(Reason::Malformed, Action::Refuse(status))
    }
}

#[cfg(test)]
mod tests {
    use super::{SessionToken as Token, *};
    use crate::policy::{Binding, path::Path};

    #[test]
    fn the_whole_policy_is_this_table() {
        use {Mode::*, Reason::*};
        let terms = |mode, hop_limit| Terms {
            mode,
            hop_limit,
            hop_limit_action: HopLimitAction::Reject,
            token_binding: Binding::Container,
            action: None,
        };
        let (one, two, audit) = (terms(Enforce, 1), terms(Enforce, 2), terms(Audit, 1));
        let not_found = Action::Refuse(StatusCode::NOT_FOUND);
        let with = |terms: Terms, action| Terms {
            mode: if action == RuleAction::Audit {
                Audit
            } else {
                terms.mode
            },
            action: Some((action, not_found)),
            ..terms
        };
        let upgrade = with(one, RuleAction::Upgrade);
        let (permit, watch) = (with(one, RuleAction::Allow), with(one, RuleAction::Audit));
        let (ban, ban_in_audit) = (with(one, RuleAction::Deny), with(audit, RuleAction::Deny));
        let drop = Terms {
            hop_limit_action: HopLimitAction::Drop,
            ..one
        };
        let (v1, v2, put) = (Imds::V1, Imds::V2, Imds::Token);
        let (ttl, method) = (Some(Flaw::Ttl), Some(Flaw::Method));
        let plain = Token::Plain;
        let allow = |reason| Decision::allow(reason);
        let deny = |reason, status| {
            let status = StatusCode::from_u16(status).unwrap();
            Decision::deny(reason, Action::Refuse(status))
        };
        let mark = |reason| Decision {
            verdict: Verdict::Audit,
            reason,
            action: Action::Forward,
        };
        let carried_over = Decision {
            verdict: Verdict::Upgrade,
            reason: Upgraded,
            action: Action::Upgrade,
        };
        #[rustfmt::skip]
        let table = [
            // terms  version flaw    forwarded hops session token         decision
            (&one,     v1,  None,   false, 1, plain,                 deny(NoToken, 401)),
            (&one,     v1,  None,   true,  3, plain,                 deny(NoToken, 401)),
            (&one,     v1,  method, false, 1, plain,                 deny(Method, 405)),
            (&one,     v2,  None,   false, 1, plain,                 allow(SessionToken)),
            (&one,     v2,  None,   true,  3, plain,                 allow(SessionToken)),
            (&one,     v2,  method, false, 1, plain,                 deny(Method, 405)),
            (&one,     v2,  None,   false, 1, Token::Bound,   allow(SessionToken)),
            (&one,     v2,  None,   false, 1, Token::Foreign, deny(ForeignToken, 401)),
            (&one,     v2,  None,   false, 1, Token::Stray,   deny(UnboundToken, 401)),
            (&one,     v2,  None,   false, 1, Token::Invalid, deny(InvalidToken, 401)),
            (&one,     put, None,   false, 1, plain,                 allow(TokenRequest)),
            (&one,     put, None,   false, 2, plain,                 deny(HopLimit, 403)),
            (&drop,    put, None,   false, 2, plain,                 Decision::deny(HopLimit, Action::Drop)),
            (&one,     put, ttl,    false, 1, plain,                 deny(TokenTtl, 400)),
            (&one,     put, method, false, 1, plain,                 deny(Method, 405)),
            (&one,     put, ttl,    false, 2, plain,                 deny(HopLimit, 403)),
            (&two,     put, None,   false, 2, plain,                 allow(TokenRequest)),
            (&two,     put, None,   false, 3, plain,                 deny(HopLimit, 403)),
            (&two,     put, None,   true,  1, plain,                 deny(Forwarded, 403)),
            (&upgrade, v1,  None,   false, 1, plain,                 carried_over),
            (&upgrade, v1,  None,   true,  1, plain,                 deny(NoToken, 401)),
            (&upgrade, v1,  None,   false, 2, plain,                 deny(NoToken, 401)),
            (&upgrade, v1,  method, false, 1, plain,                 deny(Method, 405)),
            (&upgrade, put, None,   false, 2, plain,                 deny(HopLimit, 403)),
            (&permit,  v1,  None,   true,  2, plain,                 allow(Rule)),
            (&permit,  v1,  method, false, 1, plain,                 deny(Method, 405)),
            (&permit,  v2,  None,   false, 1, plain,                 allow(SessionToken)),
            (&permit,  v2,  None,   false, 1, Token::Foreign, deny(ForeignToken, 401)),
            (&permit,  put, None,   false, 2, plain,                 deny(HopLimit, 403)),
            (&watch,   v1,  None,   false, 1, plain,                 mark(NoToken)),
            (&watch,   v2,  None,   false, 1, plain,                 mark(Rule)),
            (&watch,   v2,  None,   false, 1, Token::Invalid, deny(InvalidToken, 401)),
            (&watch,   put, None,   false, 2, plain,                 mark(HopLimit)),
            (&ban,     v2,  None,   false, 1, plain,                 deny(Rule, 404)),
            (&ban,     put, None,   false, 1, plain,                 deny(Rule, 404)),
            (&ban_in_audit, v1, None, false, 1, plain,               deny(Rule, 404)),
            (&audit,   v1,  None,   false, 1, plain,                 mark(NoToken)),
            (&audit,   v1,  method, false, 1, plain,                 mark(Method)),
            (&audit,   v2,  None,   false, 1, plain,                 allow(SessionToken)),
            (&audit,   v2,  None,   false, 1, Token::Foreign, mark(ForeignToken)),
            (&audit,   v2,  None,   false, 1, Token::Invalid, deny(InvalidToken, 401)),
            (&audit,   put, None,   false, 1, plain,                 allow(TokenRequest)),
            (&audit,   put, ttl,    false, 1, plain,                 mark(TokenTtl)),
            (&audit,   put, None,   false, 2, plain,                 mark(HopLimit)),
            (&audit,   put, None,   true,  1, plain,                 mark(Forwarded)),
        ];
        for (terms, imds, flaw, forwarded, hops, token, expected) in table {
            let request = Request {
                imds,
                forwarded,
                flaw,
                path: Path::read("/").unwrap(),
                token: None,
            };
            let got = terms.decide(&request, hops, token);
            assert_eq!(got, expected, "{terms:?} {request:?} {hops} {token:?}");
        }

        for (terms, hops, ttl, expected) in [
            (&one, 1, 1, None),
            (&two, 2, 2, None),
            (&two, 2, 1, Some(deny(InstanceHopLimit, 403))),
            (&audit, 2, 1, Some(deny(InstanceHopLimit, 403))),
            (
                &drop,
                3,
                2,
                Some(Decision::deny(InstanceHopLimit, Action::Drop)),
            ),
        ] {
            assert_eq!(terms.decide_answer(hops, ttl), expected, "{hops} {ttl}");
        }
    }
}
