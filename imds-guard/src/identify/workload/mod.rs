//! What container runtimes and Kubernetes know of a caller. All of it is cached, and nobody waits for it
//! whom no rule makes wait.

mod docker;
mod kubernetes;
mod state;

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, watch};

use crate::policy::caller::{Container, Pod, Runtime};
pub use kubernetes::Kubernetes;
use kubernetes::Pods;

/// How long a client waits for what a rule wants to know of it.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a lookup may take in all; what it finds is there for the next one.
const LOOKUP: Duration = Duration::from_secs(5);
/// How many lookups run at once.
const AT_ONCE: usize = 8;
/// How many containers are remembered.
const REMEMBERED: usize = 4096;
/// How long it is remembered that there is no such container.
const ABSENT: Duration = Duration::from_secs(10);
/// How soon a failed lookup is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// docker's socket.
    pub docker_socket: Option<PathBuf>,
    /// State of containerd.
    pub containerd_state: PathBuf,
    /// State of CRI-O and podman.
    pub containers_storage: PathBuf,
    /// Kubernetes.
    pub kubernetes: Option<Kubernetes>,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            docker_socket: Some("/run/docker.sock".into()),
            containerd_state: "/run/containerd".into(),
            containers_storage: "/run/containers/storage".into(),
            kubernetes: None,
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known<T> {
    /// This is it.
    Yes(Arc<T>),
    /// There is none.
    No,
    /// It could not be found out in time.
    Unknown,
}

impl<T> Known<T> {
    /// What is known.
    #[must_use]
    pub fn yes(self) -> Option<Arc<T>> {
        match self {
            Self::Yes(it) => Some(it),
            Self::No | Self::Unknown => None,
        }
    }

    /// Whether it could not be found out.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

/// Whom a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// For nobody: what is known is enough.
    No,
    /// For a second at most.
    Bounded,
}

/// Containers and pods of this host.
pub struct Workloads {
    sources: Arc<Sources>,
    containers: Mutex<Cache>,
    lookups: Arc<Semaphore>,
    pods: Option<Pods>,
}

/// Lookups by container id, the oldest first in `order`.
#[derive(Default)]
struct Cache {
    lookups: HashMap<String, Lookup>,
    order: VecDeque<String>,
}

#[derive(Clone)]
struct Lookup {
    begun: Instant,
    found: watch::Receiver<Option<Known<Container>>>,
}

impl Workloads {
    /// Must be called within a tokio runtime, in which Kubernetes is watched.
    #[must_use]
    pub fn new(sources: Sources) -> Self {
        Self {
            pods: sources.kubernetes.as_ref().map(Pods::watch),
            sources: Arc::new(sources),
            containers: Mutex::default(),
            lookups: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// What the runtime says of a container.
    pub async fn container(
        &self,
        id: &str,
        runtime: Option<Runtime>,
        wait: Wait,
    ) -> Known<Container> {
        // It comes from the name of a cgroup, which may be anybody's choice, and goes into paths.
        let is_id =
            (12..=64).contains(&id.len()) && id.bytes().all(|it| it.is_ascii_alphanumeric());
        if !is_id {
            return Known::No;
        }
        let mut found = self.lookup(id, runtime);
        let known = match wait {
            Wait::No => found.borrow().clone(),
            Wait::Bounded => {
                let found = tokio::time::timeout(PATIENCE, found.wait_for(Option::is_some)).await;
                found.ok().and_then(|found| found.ok()?.clone())
            }
        };
        known.unwrap_or(Known::Unknown)
    }

    /// What Kubernetes says of a pod.
    pub async fn pod(&self, uid: &str, wait: Wait) -> Known<Pod> {
        match &self.pods {
            Some(pods) => pods.get(uid, wait).await,
            None => Known::No,
        }
    }

    fn lookup(
        &self,
        id: &str,
        runtime: Option<Runtime>,
    ) -> watch::Receiver<Option<Known<Container>>> {
        let mut cache = self.cache();
        if let Some(lookup) = cache.lookups.get(id)
            && lookup.is_good()
        {
            return lookup.found.clone();
        }
        let (tell, found) = watch::channel(None);
        cache.add(id, found.clone());
        drop(cache);
        let (sources, lookups) = (Arc::clone(&self.sources), Arc::clone(&self.lookups));
        let id = id.to_owned();
        tokio::spawn(async move {
            let looked = async {
                let _place = lookups.acquire().await;
                look(&sources, &id, runtime).await
            };
            let known = tokio::time::timeout(LOOKUP, looked).await;
            tell.send_replace(Some(known.unwrap_or(Known::Unknown)));
        });
        found
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lookup {
    fn is_good(&self) -> bool {
        let age = self.begun.elapsed();
        match &*self.found.borrow() {
            None => age < LOOKUP + RETRY,
            Some(Known::Yes(_)) => true,
            Some(Known::No) => age < ABSENT,
            Some(Known::Unknown) => age < RETRY,
        }
    }
}

impl Cache {
    fn add(&mut self, id: &str, found: watch::Receiver<Option<Known<Container>>>) {
        let lookup = Lookup {
            begun: Instant::now(),
            found,
        };
        if self.lookups.insert(id.to_owned(), lookup).is_none() {
            self.order.push_back(id.to_owned());
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.lookups.remove(&oldest);
        }
    }
}

/// Asks the runtime of a container, or all of them.
async fn look(sources: &Sources, id: &str, runtime: Option<Runtime>) -> Known<Container> {
    let is = |candidate| runtime.is_none_or(|runtime| runtime == candidate);
    let mut unknown = false;
    if is(Runtime::Docker)
        && let Some(socket) = &sources.docker_socket
    {
        match docker::inspect(socket, id).await {
            Ok(Some(container)) => return Known::Yes(Arc::new(container)),
            Ok(None) => {}
            Err(error) => {
                log::debug!("docker does not tell of container {id}: {error:#}");
                unknown = true;
            }
        }
    }
    let (sources, id) = (sources.clone(), id.to_owned());
    let read = tokio::task::spawn_blocking(move || state::read(&sources, &id)).await;
    match read {
        Ok(Ok(Some(container))) => Known::Yes(Arc::new(container)),
        Ok(Ok(None)) if !unknown => Known::No,
        Ok(Ok(None)) => Known::Unknown,
        Ok(Err(error)) => {
            log::debug!("the state of a container cannot be read: {error:#}");
            Known::Unknown
        }
        Err(_) => Known::Unknown,
    }
}
