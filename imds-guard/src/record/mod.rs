//! What happened: the event schema and where events go.

mod event;
mod sink;

pub use event::{
    AnsweredBy, ConnectionRefusal, Counts, Endpoint, Event, Kind, Latency, Layer, Packet,
    RefusedConnection, Request, SCHEMA_VERSION, Started, Stopped, UpstreamFailure,
    UpstreamFailureKind,
};
pub use sink::{Recorder, Writer};
