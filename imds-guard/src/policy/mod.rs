//! What is asked, by whom, and what becomes of it: pure functions over plain data.
//!
//! Nothing here knows sockets, files, clocks or logs; the same request and caller always get the
//! same decision.

pub mod caller;
mod decide;
mod hops;
mod request;

pub use caller::Caller;
pub use decide::{Decision, Mode, Policy, Reason, Verdict};
pub use hops::hops;
/// The beginning of a text, of at most so many bytes: what a client can make long is cut before it is
/// recorded.
#[must_use]
pub fn shortened(text: &str, bytes: usize) -> String {
    text[..text.floor_char_boundary(bytes)].to_owned()
}

pub use request::{Imds, Malformed, Request, TOKEN_HEADER};
