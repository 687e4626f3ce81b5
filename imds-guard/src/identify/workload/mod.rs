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

use crate::policy::{
    Rules,
    caller::{Container, Pod, Runtime},
};
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

impl Sources {
    /// What is to be said of rules that nobody can answer.
    #[must_use]
    pub fn warning(&self, rules: &Rules) -> Option<String> {
        let mut about_pods = rules.list().iter().filter(|rule| rule.needs_pod());
        let rule = about_pods.next().filter(|_| self.kubernetes.is_none())?;
        Some(format!(
            "rule \"{}\" asks for what only Kubernetes knows, and kubernetes_node is not given: of callers in \
             pods it is never known whether it matches",
            rule.name
        ))
    }
}

/// What came of asking for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Looked {
    /// This is it.
    Found(Arc<Container>),
    /// Nobody knows it. That says nothing about it: whoever does may not have been asked.
    Nowhere,
    /// Somebody did not answer.
    Failed,
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
    found: watch::Receiver<Option<Looked>>,
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

    /// What the runtime says of a container: its image, at least. `None` is that it is not known: where there
    /// is an id, there is an image.
    pub async fn container(
        &self,
        id: &str,
        runtime: Option<Runtime>,
        wait: Wait,
    ) -> Option<Arc<Container>> {
        let mut found = self.lookup(id, runtime)?;
        let looked = match wait {
            Wait::No => found.borrow().clone(),
            Wait::Bounded => {
                let found = tokio::time::timeout(PATIENCE, found.wait_for(Option::is_some)).await;
                found.ok().and_then(|found| found.ok()?.clone())
            }
        };
        looked?.found()
    }

    /// What Kubernetes says of a pod; `None` if it is not known.
    pub async fn pod(&self, uid: &str, wait: Wait) -> Option<Arc<Pod>> {
        self.pods.as_ref()?.get(uid, wait).await
    }

    fn lookup(
        &self,
        id: &str,
        runtime: Option<Runtime>,
    ) -> Option<watch::Receiver<Option<Looked>>> {
        // It comes from the name of a cgroup, which may be anybody's choice, and goes into paths.
        let is_id =
            (12..=64).contains(&id.len()) && id.bytes().all(|it| it.is_ascii_alphanumeric());
        if !is_id {
            return None;
        }
        let mut cache = self.cache();
        if let Some(lookup) = cache.lookups.get(id)
            && lookup.is_good()
        {
            return Some(lookup.found.clone());
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
            let looked = tokio::time::timeout(LOOKUP, looked).await;
            tell.send_replace(Some(looked.unwrap_or(Looked::Failed)));
        });
        Some(found)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Looked {
    fn found(self) -> Option<Arc<Container>> {
        match self {
            Self::Found(container) => Some(container),
            Self::Nowhere | Self::Failed => None,
        }
    }
}

impl Lookup {
    fn is_good(&self) -> bool {
        let age = self.begun.elapsed();
        match &*self.found.borrow() {
            None => age < LOOKUP + RETRY,
            Some(Looked::Found(_)) => true,
            Some(Looked::Nowhere) => age < ABSENT,
            Some(Looked::Failed) => age < RETRY,
        }
    }
}

impl Cache {
    fn add(&mut self, id: &str, found: watch::Receiver<Option<Looked>>) {
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

/// Asks the runtime of a container, or all of them. Whoever does not know the image does not know the
/// container: docker's containers have state files, too, in which no image stands.
async fn look(sources: &Sources, id: &str, runtime: Option<Runtime>) -> Looked {
    let is = |candidate| runtime.is_none_or(|runtime| runtime == candidate);
    let mut not_found = Looked::Nowhere;
    if is(Runtime::Docker)
        && let Some(socket) = &sources.docker_socket
    {
        match docker::inspect(socket, id).await {
            Ok(Some(container)) if container.image.is_some() => {
                return Looked::Found(Arc::new(container));
            }
            Ok(_) => {}
            Err(error) => {
                log::debug!("docker does not tell of container {id}: {error:#}");
                not_found = Looked::Failed;
            }
        }
    }
    let (sources, id) = (sources.clone(), id.to_owned());
    let read = tokio::task::spawn_blocking(move || state::read(&sources, &id)).await;
    match read {
        Ok(Ok(Some(container))) if container.image.is_some() => Looked::Found(Arc::new(container)),
        Ok(Ok(_)) => not_found,
        Ok(Err(error)) => {
            log::debug!("the state of a container cannot be read: {error:#}");
            Looked::Failed
        }
        Err(_) => Looked::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        os::unix::net::UnixListener,
    };

    use super::*;

    const ID: &str = "3f4a0e6d1b2c";

    /// docker, which gives one answer to everybody.
    fn docker(socket: PathBuf, answer: &'static str) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let _asked = client.read(&mut [0; 4096]).unwrap();
                let length = answer.len();
                let head = if answer.is_empty() {
                    "500 Oh"
                } else {
                    "200 OK"
                };
                let answer = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\n\r\n{answer}");
                client.write_all(answer.as_bytes()).unwrap();
            }
        });
    }

    /// Where there is an id, there are an image and a pod: who knows of none is not asked the right one.
    #[tokio::test]
    async fn what_nobody_knows_is_not_known() {
        let root = std::env::temp_dir().join(format!("imds-guard-{}-nobody", std::process::id()));
        let task = root.join("io.containerd.runtime.v2.task/moby").join(ID);
        fs::create_dir_all(&task).unwrap();
        let sources = |docker: &str| Sources {
            docker_socket: Some(root.join(docker)),
            containerd_state: root.clone(),
            containers_storage: root.join("none"),
            kubernetes: None,
        };
        docker(root.join("fails"), "");
        docker(
            root.join("knows"),
            r#"{"Name": "/web", "Config": {"Image": "nginx"}}"#,
        );
        let image = async |docker: &str| {
            let workloads = Workloads::new(sources(docker));
            let found = workloads.container(ID, None, Wait::Bounded).await;
            found.and_then(|found| found.image.clone())
        };
        // docker's containers have such files, too.
        for spec in [
            None,
            Some("{}"),
            Some(r#"{"annotations": {"nerdctl/name": "web"}}"#),
        ] {
            if let Some(spec) = spec {
                fs::write(task.join("config.json"), spec).unwrap();
            }
            assert_eq!(image("absent").await, None);
            assert_eq!(image("fails").await, None);
            assert_eq!(image("knows").await.as_deref(), Some("nginx"));
        }
        let failed = look(&sources("fails"), ID, None).await;
        assert_eq!(failed, Looked::Failed, "and is asked again soon");
        let spec = r#"{"annotations": {"nerdctl/image-ref": "alpine:3"}}"#;
        fs::write(task.join("config.json"), spec).unwrap();
        assert_eq!(image("fails").await.as_deref(), Some("alpine:3"));
        let workloads = Workloads::new(sources("absent"));
        assert_eq!(
            workloads.container("task-1", None, Wait::Bounded).await,
            None
        );
        assert_eq!(workloads.pod("a-pod", Wait::Bounded).await, None);
        fs::remove_dir_all(&root).unwrap();
    }
}
