//! From an accepted connection to its answers.
//!
//! [`listen`] binds, `accept` takes connections and finds out who made them, `pipeline` judges each
//! request and forwards it or not, `upstream` speaks to the metadata service, `answer` writes what
//! the guard itself says.

mod accept;
mod answer;
mod listen;
mod pipeline;
mod places;
mod syn;
mod upstream;

pub use accept::{Acceptor, Backlog};
pub use listen::{adopt, listen};
pub use pipeline::Proxy;
pub use upstream::Upstream;
