//! What is asked, by whom, and what becomes of it: pure functions over plain data.
//!
//! Nothing here knows sockets, files, clocks or logs; the same request and caller always get the
//! same decision.

mod binding;
pub mod caller;
mod decide;
pub mod head;
mod hops;
pub mod path;
mod request;
mod rule;

pub use binding::Binding;
pub use caller::Caller;
pub use decide::{Action, Decision, HopLimitAction, Mode, Reason, SessionToken, Verdict};
pub use hops::{hops, reply_ttl};
pub use request::{Flaw, Imds, MAX_TTL, Malformed, Request, TOKEN_HEADER, TTL_HEADER};
pub use rule::{Policy, Rule, RuleAction, Terms};

/// The beginning of a text, of at most so many bytes: what a client can make long is cut before it is
/// recorded.
#[must_use]
pub fn shortened(text: &str, bytes: usize) -> String {
    text[..text.floor_char_boundary(bytes)].to_owned()
}
