//! What happened: the event schema and where events go.

mod event;
mod sink;
mod tally;

pub use event::{
    AnsweredBy, By, Change, ConnectionRefusal, Counts, Endpoint, Event, Kind, Latency, Layer,
    Packet, PolicyChange, RefusedConnection, Request, RuleExpired, SCHEMA_VERSION, Started,
    Stopped, UpstreamFailure, UpstreamFailureKind,
};
pub use sink::{Lines, Recorder, Writer};
pub use tally::{ByVersion, Tally, Totals, label};
