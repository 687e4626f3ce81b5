//! The policy that is in force, which changes while requests are served.

use std::{
    mem,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use imds_guard_common::flow::{Family, Origin};
use jiff::Timestamp;

use crate::{
    identify::Resolver,
    policy::{Binding, Caller, Candidates, Needs, Policy, Subject, Terms},
};

/// What applies to requests from now on.
#[derive(Debug)]
pub struct Force {
    /// What is decided.
    pub policy: Policy,
    /// Whether answers of the guard's own say so in a header.
    pub marks_answers: bool,
}

/// What is in force; swapped as a whole. A request is served under what it was judged by.
#[derive(Debug)]
pub struct InForce {
    force: RwLock<Arc<Force>>,
    version: AtomicU64,
}

impl InForce {
    /// At the start.
    #[must_use]
    pub fn new(force: Force) -> Self {
        Self {
            force: RwLock::new(Arc::new(force)),
            version: AtomicU64::new(1),
        }
    }

    /// At this moment.
    #[must_use]
    pub fn now(&self) -> Arc<Force> {
        Arc::clone(&self.force.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often it was swapped, and one more.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Relaxed)
    }

    /// From this moment. Returns what was before.
    pub fn swap(&self, force: Force) -> Arc<Force> {
        self.version.fetch_add(1, Relaxed);
        let mut now = self.force.write().unwrap_or_else(PoisonError::into_inner);
        mem::replace(&mut now, Arc::new(force))
    }
}

/// A connection as the policy sees it: worked out once, and again when the policy has changed.
pub(super) struct View {
    pub force: Arc<Force>,
    pub caller: Arc<Caller>,
    pub candidates: Candidates,
    needs: Needs,
    scopes: [Option<String>; 4],
}

impl View {
    pub fn new(
        force: Arc<Force>,
        caller: Arc<Caller>,
        needs: Needs,
        family: Family,
        hops: u8,
    ) -> Self {
        let candidates = force.policy.rules.candidates(&Subject {
            caller: &caller,
            endpoint: endpoint(family),
            hops,
        });
        let bindings = [
            Binding::Off,
            Binding::Netns,
            Binding::Container,
            Binding::Cgroup,
        ];
        Self {
            scopes: bindings.map(|binding| binding.scope(&caller)),
            force,
            caller,
            candidates,
            needs,
        }
    }

    /// Whether it still is how things are.
    pub fn is_current(&self, in_force: &InForce) -> bool {
        Arc::ptr_eq(&self.force, &in_force.now()) && !self.caller.missing.any()
    }

    /// As things are now. The caller is looked at again only if more must be known of it.
    pub async fn renew(
        &self,
        in_force: &InForce,
        resolver: &Resolver,
        origin: &Origin,
        (family, hops): (Family, u8),
    ) -> Self {
        let force = in_force.now();
        let needs = force.policy.rules.needs();
        let is_enough = self.needs.include(needs) && !self.caller.missing.any();
        let caller = match is_enough {
            true => Arc::clone(&self.caller),
            false => Arc::new(resolver.resolve(origin, needs).await),
        };
        let needs = if is_enough { self.needs } else { needs };
        Self::new(force, caller, needs, family, hops)
    }

    /// What holds for the caller.
    pub fn terms(&self, now: Timestamp) -> Terms {
        self.force.policy.terms(&self.candidates, now)
    }

    /// Where the caller's session tokens are valid.
    pub fn scope(&self, binding: Binding) -> Option<&str> {
        self.scopes[binding as usize].as_deref()
    }
}

/// As in rules.
fn endpoint(family: Family) -> &'static str {
    match family {
        Family::Ipv4 | Family::Ipv4Mapped => "ipv4",
        Family::Ipv6 => "ipv6",
    }
}
