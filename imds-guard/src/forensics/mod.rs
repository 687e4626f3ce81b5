//! From event logs of many hosts to answers: who still uses IMDSv1, and can it be switched off?

mod advice;
mod coverage;
mod identity;
mod line;
mod read;
pub mod render;
mod summary;

pub use advice::{Advice, advise};
pub use coverage::{Coverage, Gap, HostCoverage};
pub use identity::Identity;
use line::{Lifecycle, Line};
pub use read::{Log, Logs, Progress, read};
pub use summary::{Caller, Calls, Summary, Wanted};
