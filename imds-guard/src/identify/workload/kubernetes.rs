//! What Kubernetes knows of the pods on this node: a watch, kept up in the background.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Pod as ApiPod;
use kube::{
    Api, Client, Config, ResourceExt as _,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::sync::watch;

use super::{PATIENCE, Wait};
use crate::policy::caller::Pod;

/// Pods that are remembered: nodes have some hundred at most.
const REMEMBERED: usize = 16 * 1024;
/// How long to wait before the configuration of the connection is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// kubelet's own UID of a static pod, which is what its cgroup is called; the API server gives its
/// image of the pod another one.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// How Kubernetes is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// The node that this host is.
    pub node: String,
    /// How the API server is reached; without it, as from within a pod.
    pub kubeconfig: Option<PathBuf>,
}

/// The pods of a node.
pub struct Pods {
    known: Arc<Mutex<Pages>>,
    changes: watch::Receiver<u64>,
}

/// Pods by UID.
#[derive(Default)]
struct Pages {
    current: HashMap<String, Arc<Pod>>,
    /// A list that is still coming in, to replace all that is known.
    coming: Option<HashMap<String, Arc<Pod>>>,
}

impl Pods {
    /// Watches them in the background, for as long as the runtime lives.
    #[must_use]
    pub fn watch(kubernetes: &Kubernetes) -> Self {
        let known = Arc::<Mutex<Pages>>::default();
        let (changed, changes) = watch::channel(0);
        tokio::spawn(keep(kubernetes.clone(), Arc::clone(&known), changed));
        Self { known, changes }
    }

    /// The pod of a UID. A pod that is not known may just have been started: that it does not exist is
    /// never certain.
    pub async fn get(&self, uid: &str, wait: Wait) -> Option<Arc<Pod>> {
        let mut changes = self.changes.clone();
        let found = async {
            loop {
                changes.borrow_and_update();
                if let Some(pod) = self.known(uid) {
                    return Some(pod);
                }
                changes.changed().await.ok()?;
            }
        };
        match wait {
            Wait::No => self.known(uid),
            Wait::Bounded => tokio::time::timeout(PATIENCE, found).await.ok().flatten(),
        }
    }

    fn known(&self, uid: &str) -> Option<Arc<Pod>> {
        lock(&self.known).current.get(uid).cloned()
    }
}

async fn keep(kubernetes: Kubernetes, known: Arc<Mutex<Pages>>, changed: watch::Sender<u64>) {
    let client = loop {
        match client(kubernetes.kubeconfig.as_deref()).await {
            Ok(client) => break client,
            Err(error) => log::error!("the pods of this node are not known: {error:#}"),
        }
        tokio::time::sleep(RETRY).await;
    };
    let node = format!("spec.nodeName={}", kubernetes.node);
    let config = watcher::Config::default().fields(&node);
    let events = watcher(Api::<ApiPod>::all(client), config).default_backoff();
    follow(events, &known, &changed).await;
}

async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let config = match kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file);
            let read = read.with_context(|| file.display().to_string())?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?
        }
        None => Config::incluster().context("not in a pod, and no kubeconfig is given")?,
    };
    Ok(Client::try_from(config)?)
}

async fn follow(
    events: impl Stream<Item = Result<Event<ApiPod>, watcher::Error>>,
    known: &Mutex<Pages>,
    changed: &watch::Sender<u64>,
) {
    let mut events = std::pin::pin!(events);
    let mut failing = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if std::mem::take(&mut failing) {
                    log::info!("the pods of this node are watched again");
                }
                lock(known).take(event);
                changed.send_modify(|count| *count += 1);
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    log::warn!(
                        "the pods of this node cannot be watched, and are tried again: {error}"
                    );
                }
            }
        }
    }
}

impl Pages {
    fn take(&mut self, event: Event<ApiPod>) {
        match event {
            Event::Init => self.coming = Some(HashMap::new()),
            Event::InitApply(pod) => add(self.coming.get_or_insert_default(), &pod),
            Event::InitDone => self.current = self.coming.take().unwrap_or_default(),
            Event::Apply(pod) => add(&mut self.current, &pod),
            Event::Delete(pod) => {
                for uid in uids(&pod) {
                    self.current.remove(&uid);
                }
            }
        }
    }
}

fn add(pods: &mut HashMap<String, Arc<Pod>>, pod: &ApiPod) {
    let service_account = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.service_account_name.clone());
    let described = Arc::new(Pod {
        name: pod.name_any(),
        namespace: pod.namespace().unwrap_or_default(),
        owner: owner(pod),
        service_account,
        labels: pod.labels().clone(),
    });
    for uid in uids(pod) {
        if pods.len() < REMEMBERED || pods.contains_key(&uid) {
            pods.insert(uid, Arc::clone(&described));
        }
    }
}

/// What made the pod. A ReplicaSet is named after its Deployment and the hash of its template.
fn owner(pod: &ApiPod) -> Option<String> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))?;
    let hash = pod.labels().get("pod-template-hash");
    let deployment = hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'));
    match deployment {
        Some(name) if owner.kind == "ReplicaSet" => Some(format!("Deployment/{name}")),
        _ => Some(format!("{}/{}", owner.kind, owner.name)),
    }
}

fn uids(pod: &ApiPod) -> impl Iterator<Item = String> {
    pod.uid()
        .into_iter()
        .chain(pod.annotations().get(STATIC_UID).cloned())
}

fn lock(known: &Mutex<Pages>) -> MutexGuard<'_, Pages> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}
