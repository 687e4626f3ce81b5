//! Threads for what a caller can hold up, of which nobody gets all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::policy::Caller;

/// How many parties are remembered before those that have no place are forgotten.
const REMEMBERED: usize = 1024;

/// Somebody whose work is counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// All of a cgroup.
    Cgroup(u64),
    /// Not root, which containers share.
    User(u32),
}

/// Places for work. Each cgroup and each user has a share of them at most.
pub struct Shares {
    all: Arc<Semaphore>,
    each: usize,
    parties: Mutex<HashMap<Party, Arc<Semaphore>>>,
}

/// A place; given back when it is dropped.
pub struct Place(#[expect(dead_code, reason = "it is held")] Vec<OwnedSemaphorePermit>);

impl Shares {
    /// So many places, and so many for one party.
    #[must_use]
    pub fn new(all: usize, each: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all)),
            each,
            parties: Mutex::default(),
        }
    }

    /// A place, when there is one.
    pub async fn take(&self, parties: &[Party]) -> Option<Place> {
        let mut place = Vec::new();
        for semaphore in self.of(parties) {
            place.push(semaphore.acquire_owned().await.ok()?);
        }
        Some(Place(place))
    }

    /// A place, if there is one.
    pub fn try_take(&self, parties: &[Party]) -> Option<Place> {
        let places = self.of(parties);
        let place: Option<_> = places.map(|it| it.try_acquire_owned().ok()).collect();
        place.map(Place)
    }

    /// First those of a party's own, so that whoever waits for them keeps nobody else waiting.
    fn of(&self, parties: &[Party]) -> impl Iterator<Item = Arc<Semaphore>> + use<> {
        let mut known = self.parties.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.retain(|_, places| Arc::strong_count(places) > 1);
        }
        let of = |party: &Party| {
            let places = known.entry(*party);
            Arc::clone(places.or_insert_with(|| Arc::new(Semaphore::new(self.each))))
        };
        let mut places: Vec<_> = parties.iter().map(of).collect();
        places.push(Arc::clone(&self.all));
        places.into_iter()
    }
}

/// Whose work it is to find out about a caller.
pub fn parties(caller: &Caller) -> Vec<Party> {
    let user = (caller.uid != 0).then_some(Party::User(caller.uid));
    user.into_iter()
        .chain([Party::Cgroup(caller.cgroup_id)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_party_leaves_places_for_others() {
        let shares = Shares::new(3, 2);
        let (one, two) = ([Party::Cgroup(1)], [Party::User(7), Party::Cgroup(2)]);
        let held = [&one, &one].map(|party| shares.try_take(party));
        assert!(held.iter().all(Option::is_some));
        assert!(shares.try_take(&one).is_none());
        let other = shares.try_take(&two);
        assert!(other.is_some());
        drop(held);
        // A user has no more by having several cgroups.
        let second = shares.try_take(&[Party::User(7), Party::Cgroup(3)]);
        assert!(second.is_some());
        assert!(
            shares
                .try_take(&[Party::User(7), Party::Cgroup(4)])
                .is_none()
        );
        assert!(shares.try_take(&one).is_some());
        drop((other, second));
        for cgroup in 0..2 * REMEMBERED as u64 {
            assert!(shares.try_take(&[Party::Cgroup(cgroup)]).is_some());
        }
        assert!(shares.parties.lock().unwrap().len() <= REMEMBERED);
    }
}
