//! From an accepted connection to its answers.
//!
//! [`listen`] binds, `accept` takes connections and finds out who made them, `gate` lets through what
//! is unambiguous HTTP, `pipeline` judges each request and forwards it or not, `upstream` speaks to
//! the metadata service, `answer` writes what the guard itself says.

mod accept;
mod answer;
mod fallback;
mod gate;
mod listen;
mod pipeline;
mod places;
mod syn;
mod ttl;
mod upgrade;
mod upstream;

pub use accept::{Acceptor, Backlog};
pub use fallback::Fallbacks;
pub use listen::{adopt, listen};
pub use pipeline::Proxy;
pub use upstream::Upstream;
