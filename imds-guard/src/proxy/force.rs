//! The policy that is in force, which changes while requests are served.

use std::{
    mem,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use imds_guard_common::flow::{Family, Origin};
use jiff::Timestamp;

use crate::{
    identify::{Resolver, workload::Wait},
    policy::{
        Binding, Caller, Candidates, Policy, Subject, Terms,
        caller::{Missing, Netns},
        hops,
    },
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

/// How long to wait before what is still missing about a caller is looked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// A connection as the policy sees it: worked out once, and again when the policy has changed or more is
/// known of the caller.
pub(super) struct View {
    pub force: Arc<Force>,
    pub caller: Arc<Caller>,
    pub candidates: Candidates,
    pub hops: u8,
    family: Family,
    /// What rules still ask for.
    wanted: Missing,
    looked: Instant,
    scopes: [Option<String>; 4],
}

impl View {
    /// Names the caller of a connection, and waits for what rules ask about it.
    pub async fn meet(
        force: Arc<Force>,
        resolver: &Resolver,
        origin: &Origin,
        (family, syn_ttl): (Family, u8),
    ) -> Self {
        let hops = |caller: &Caller| hops(caller.netns == Netns::Host, Some(syn_ttl));
        let wanted = |caller: &Caller| wanted(&force, caller, (family, hops(caller)));
        let caller = resolver.resolve(origin, wanted, Wait::Bounded).await;
        let hops = hops(&caller);
        Self::new(force, Arc::new(caller), (family, hops))
    }

    fn new(force: Arc<Force>, caller: Arc<Caller>, (family, hops): (Family, u8)) -> Self {
        let rules = &force.policy.rules;
        let candidates = rules.candidates(&subject(&caller, (family, hops)));
        let bindings = [
            Binding::Off,
            Binding::Netns,
            Binding::Container,
            Binding::Cgroup,
        ];
        Self {
            scopes: bindings.map(|binding| binding.scope(&caller)),
            wanted: rules.wanted(&candidates, &caller),
            looked: Instant::now(),
            force,
            caller,
            candidates,
            hops,
            family,
        }
    }

    /// Whether it still is how things are, as far as that has been looked at lately.
    pub fn is_current(&self, in_force: &InForce) -> bool {
        let is_known = !self.wanted.any() || self.looked.elapsed() < AGAIN;
        is_known && Arc::ptr_eq(&self.force, &in_force.now())
    }

    /// With what has become known of the caller meanwhile; nobody is waited for. `None` if that is nothing.
    pub fn news(&self, resolver: &Resolver) -> Option<Self> {
        let caller = Arc::new(resolver.news(&self.caller)?);
        let force = Arc::clone(&self.force);
        Some(Self::new(force, caller, (self.family, self.hops)))
    }

    /// As things are now. The caller is waited for only once, and again if new rules ask about it.
    pub async fn renew(&self, in_force: &InForce, resolver: &Resolver, origin: &Origin) -> Self {
        let force = in_force.now();
        let place = (self.family, self.hops);
        let is_same = Arc::ptr_eq(&self.force, &force);
        let view = Self::new(Arc::clone(&force), Arc::clone(&self.caller), place);
        if !view.wanted.any() {
            return view;
        }
        let wait = if is_same { Wait::No } else { Wait::Bounded };
        let wanted = |caller: &Caller| wanted(&force, caller, place);
        let caller = resolver.resolve(origin, wanted, wait).await;
        // Who has ended since was known better before.
        if self.caller.resolved && !caller.resolved {
            return view;
        }
        Self::new(force, Arc::new(caller), place)
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

/// What rules ask about a caller of whom the least is known.
fn wanted(force: &Force, caller: &Caller, place: (Family, u8)) -> Missing {
    let rules = &force.policy.rules;
    rules.wanted(&rules.candidates(&subject(caller, place)), caller)
}

fn subject(caller: &Caller, (family, hops): (Family, u8)) -> Subject<'_> {
    Subject {
        caller,
        endpoint: endpoint(family),
        hops,
    }
}

/// As in rules.
fn endpoint(family: Family) -> &'static str {
    match family {
        Family::Ipv4 | Family::Ipv4Mapped => "ipv4",
        Family::Ipv6 => "ipv6",
    }
}
