//! How often callers ask, where a rule sets a rate.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use crate::policy::{Caller, Rule};

/// How many callers are counted at once. When more ask, those that have asked little are forgotten.
const COUNTED: usize = 8192;

/// A token bucket for each caller of each rule.
#[derive(Default)]
pub struct Rates(Mutex<HashMap<Key, Bucket>>);

/// A rule, and a user in a cgroup: forking does not help.
type Key = (Arc<str>, u64, u32);

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Requests that may come at once, up to a second's.
    left: f64,
    at: Instant,
}

impl Rates {
    /// Whether a caller may send one more request now.
    #[must_use]
    pub fn allow(&self, rule: &Rule, caller: &Caller) -> bool {
        match rule.rate {
            Some(rate) => {
                let key = (Arc::clone(&rule.name), caller.cgroup_id, caller.uid);
                self.allow_at(Instant::now(), key, rate)
            }
            None => true,
        }
    }

    fn allow_at(&self, now: Instant, key: Key, rate: NonZeroU32) -> bool {
        let rate = f64::from(rate.get());
        let full = Bucket {
            left: rate,
            at: now,
        };
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= COUNTED && !buckets.contains_key(&key) {
            // Those of a second ago are full again, whatever their rate.
            buckets.retain(|_, bucket| now.duration_since(bucket.at).as_secs() < 1);
            if buckets.len() >= COUNTED {
                return false;
            }
        }
        let bucket = buckets.entry(key).or_insert(full);
        let since = now.duration_since(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + since * rate).min(rate);
        bucket.at = now;
        let allowed = bucket.left >= 1.0;
        if allowed {
            bucket.left -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_caller_has_a_seconds_worth_at_once_and_no_more() {
        let rates = Rates::default();
        let begin = Instant::now();
        let rate = NonZeroU32::new(2).unwrap();
        let ask = |uid, after: u64| {
            let now = begin + Duration::from_millis(after);
            rates.allow_at(now, ("r".into(), 1, uid), rate)
        };
        assert!(ask(1, 0) && ask(1, 0) && !ask(1, 0));
        assert!(ask(2, 0), "another caller");
        assert!(!ask(1, 400) && ask(1, 500) && !ask(1, 500));
        assert!(ask(1, 9000) && ask(1, 9000) && !ask(1, 9000));
    }

    #[test]
    fn callers_are_bounded_and_the_idle_make_room() {
        let rates = Rates::default();
        let begin = Instant::now();
        let rate = NonZeroU32::new(1).unwrap();
        for uid in 0..COUNTED as u32 {
            assert!(rates.allow_at(begin, ("r".into(), 1, uid), rate));
        }
        assert!(!rates.allow_at(begin, ("r".into(), 2, 0), rate));
        let later = begin + Duration::from_secs(1);
        assert!(rates.allow_at(later, ("r".into(), 2, 0), rate));
    }
}
