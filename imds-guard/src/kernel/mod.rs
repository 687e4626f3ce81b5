//! The kernel side: loading and attaching the programs, and the maps shared with them.

mod exempt;
mod flows;
mod load;
pub mod probe;

pub use exempt::{Exempt, Exemption};
pub use flows::{FlowTable, KernelFlows, MemoryFlows, flow_key};
pub use load::{Counters, Kernel, Maps};
