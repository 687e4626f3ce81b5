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
pub use request::{Imds, Malformed, Request, TOKEN_HEADER, TOKEN_PATH};
