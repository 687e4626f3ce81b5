//! Who has just been refused a session token: an IMDSv1 request that follows from the same process is
//! its fall-back, and not what it would have asked.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::policy::Caller;

/// How long after its token request was refused a process is taken to fall back. SDKs try again
/// within seconds.
const WITHIN: Duration = Duration::from_secs(60);
/// How many refusals are remembered.
const REMEMBERED: usize = 1024;

/// The processes that were refused a token lately, the latest last.
#[derive(Default)]
pub struct Fallbacks(Mutex<VecDeque<(Process, Instant)>>);

/// A process: its pid, and when it was started, as pids are used again.
type Process = (u32, Option<String>);

impl Fallbacks {
    /// Remembers that a caller's token request was refused.
    pub fn refused(&self, caller: &Caller) {
        let mut refused = self.lock();
        if refused.len() == REMEMBERED {
            refused.pop_front();
        }
        let process = (caller.pid, caller.started.clone());
        refused.push_back((process, Instant::now()));
    }

    /// Whether a caller's IMDSv1 request is a fall-back.
    pub fn is_one(&self, caller: &Caller) -> bool {
        let is_recent = |at: &Instant| at.elapsed() < WITHIN;
        let refused = self.lock();
        let mut recent = refused.iter().rev().take_while(|(_, at)| is_recent(at));
        recent.any(|((pid, started), _)| *pid == caller.pid && *started == caller.started)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Process, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
