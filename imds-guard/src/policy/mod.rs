//! What is asked, by whom, and what becomes of it: pure functions over plain data.
//!
//! Nothing here knows sockets, files, clocks or logs; the same request and caller always get the
//! same decision.

mod binding;
pub mod caller;
mod decide;
mod expiry;
mod explain;
mod fit;
pub mod head;
mod hops;
pub mod path;
pub mod pattern;
mod refusal;
mod request;
mod rule;
mod rules;

pub use binding::Binding;
pub use caller::Caller;
pub use decide::{Action, Decision, HopLimitAction, Mode, Reason, SessionToken, Terms, Verdict};
pub use expiry::Expiry;
pub use explain::{Explanation, RuleExplanation};
pub use fit::{Ask, Fit, Subject};
pub use hops::{hops, reply_ttl};
pub use refusal::Refusal;
pub use request::{Flaw, Imds, MAX_TTL, Malformed, Request, TOKEN_HEADER, TTL_HEADER};
pub use rule::{HopLimit, Rule, RuleAction};
pub use rules::{Candidates, Judgement, Policy, Rules};

/// The beginning of a text, of at most so many bytes: what a client can make long is cut before it is
/// recorded.
#[must_use]
pub fn shortened(text: &str, bytes: usize) -> String {
    text[..text.floor_char_boundary(bytes)].to_owned()
}
