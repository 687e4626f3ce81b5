//! Who may have how many connections at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use imds_guard_common::flow::Origin;

use crate::config::Limits;

/// Somebody whose connections are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Party {
    Cgroup(u64),
    /// Not root, which containers share.
    User(u32),
    /// Not the guard's own, which all of the host shares.
    Netns(u64),
}

/// The connections of each party that has any.
pub struct Places {
    counts: Mutex<HashMap<Party, usize>>,
    limits: Limits,
    netns_cookie: Option<u64>,
}

/// A connection's place; given back when it is dropped.
pub struct Place {
    parties: [Option<Party>; 3],
    from: Arc<Places>,
}

impl Places {
    /// All free. `netns_cookie` is that of the guard's own network namespace.
    #[must_use]
    pub fn new(limits: Limits, netns_cookie: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            counts: Mutex::default(),
            limits,
            netns_cookie,
        })
    }

    /// A place for a connection of this caller, unless it has too many.
    pub fn take(self: &Arc<Self>, origin: &Origin) -> Option<Place> {
        let parties = [
            Some(Party::Cgroup(origin.cgroup_id)),
            (origin.uid != 0).then_some(Party::User(origin.uid)),
            (Some(origin.netns_cookie) != self.netns_cookie)
                .then_some(Party::Netns(origin.netns_cookie)),
        ];
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = parties.iter().flatten().all(|party| {
            let limit = match party {
                Party::Cgroup(_) | Party::User(_) => self.limits.connections_per_caller,
                Party::Netns(_) => self.limits.connections_per_netns,
            };
            counts.get(party).copied().unwrap_or_default() < limit
        });
        if !has_room {
            return None;
        }
        for party in parties.into_iter().flatten() {
            *counts.entry(party).or_default() += 1;
        }
        Some(Place {
            parties,
            from: Arc::clone(self),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self
            .from
            .counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for party in self.parties.into_iter().flatten() {
            if let Some(count) = counts.get_mut(&party) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&party);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(cgroup_id: u64, uid: u32, netns_cookie: u64) -> Origin {
        Origin {
            cookie: 1,
            cgroup_id,
            netns_cookie,
            connected_at: 1,
            pid: 1,
            tid: 1,
            uid,
            gid: 0,
            comm: [0; 16],
            family: 1,
            sequence: 0,
        }
    }

    #[test]
    fn nobody_takes_the_places_of_others() {
        let limits = Limits {
            connections_per_caller: 2,
            connections_per_netns: 3,
            ..Limits::default()
        };
        let places = Places::new(limits, Some(1));
        let take = |origin| places.take(&origin);

        let first = (take(origin(7, 0, 1)), take(origin(7, 0, 1)));
        assert!(first.0.is_some() && first.1.is_some());
        assert!(take(origin(7, 0, 1)).is_none(), "one cgroup");
        let root = take(origin(8, 0, 1));
        assert!(root.is_some(), "another one, also of root");

        let user = (take(origin(10, 5, 1)), take(origin(11, 5, 1)));
        assert!(user.0.is_some() && user.1.is_some());
        assert!(take(origin(12, 5, 1)).is_none(), "one user in many cgroups");

        let container = [20, 21, 22].map(|cgroup| take(origin(cgroup, 0, 2)));
        assert!(container.iter().all(Option::is_some));
        assert!(take(origin(23, 0, 2)).is_none(), "one namespace");

        drop(first.0);
        assert!(take(origin(7, 0, 1)).is_some(), "a place was given back");
        drop((first.1, root, user, container));
        assert!(places.counts.lock().unwrap().is_empty(), "nothing is left");
    }
}
