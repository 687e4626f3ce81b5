//! The kernel side: loading, attaching and pinning the programs, and the maps shared with them.

mod control;
mod exempt;
mod fill;
mod flows;
mod load;
mod packets;
mod perimeter;
mod pins;
pub mod probe;

pub use control::{AliveUntil, Control, Heartbeat};
pub use exempt::{Exempt, Exemption};
pub use fill::{Fill, MapFill};
pub use flows::{Everyone, FlowTable, KernelFlows};
pub use load::{Counters, Kernel, Maps};
pub use packets::Packets;
pub use perimeter::{PIN as PERIMETER_PIN, remove_filters};
pub use pins::{Charge, DIRECTORY as PINS, LAYOUT, Pins};
