//! From an accepted connection to its answers.
//!
//! [`listen`] binds, `accept` takes connections and finds out who made them, `gate` lets through what
//! is unambiguous HTTP, `pipeline` judges each request under the policy in `force` and forwards it or not, `upstream` speaks to
//! the metadata service, `answer` writes what the guard itself says.

mod accept;
mod answer;
mod fallback;
mod force;
mod gate;
mod listen;
mod pipeline;
mod places;
mod rate;
mod syn;
mod ttl;
mod upgrade;
mod upstream;

pub use accept::{Acceptor, Backlog};
pub use fallback::Fallbacks;
pub use force::{Force, InForce};
pub use listen::{adopt, listen};
pub use pipeline::Proxy;
pub use rate::Rates;
pub use upstream::Upstream;
