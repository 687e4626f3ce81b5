//! What happened: the event schema and where events go.

mod event;
mod json;
mod metrics;
pub mod output;
mod queue;
mod sink;
mod tally;
mod words;

pub use event::{
    ALIVE, AnsweredBy, By, Chain, Change, ConnectionRefusal, Counts, Endpoint, Event, Folded, Host,
    Kind, Latency, Layer, Packet, PolicyChange, RefusedConnection, Request, RuleExpired,
    SCHEMA_VERSION, Started, Stopped, Unwatched, UpstreamFailure, UpstreamFailureKind,
};
pub use json::{escaped, obeyed, to_json, to_json_pretty};
pub use metrics::Metrics;
pub use sink::{Lines, Recorder, Writer};
pub use tally::{ByVersion, Tally, Totals, label};
pub use words::words;
