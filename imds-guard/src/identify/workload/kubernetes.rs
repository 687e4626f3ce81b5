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
/// Says that a pod is such an image, and repeats that UID.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// The least number at the end of the name of a CronJob's Job: the minute that it is for, since 1970. This one
/// was in 2019; less is a year or a date that somebody gave a Job of their own.
const FIRST_MINUTE: u32 = 26_000_000;

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
                    if self
                        .current
                        .get(&uid)
                        .is_some_and(|known| is_same(known, &pod))
                    {
                        self.current.remove(&uid);
                    }
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
        let may_add = match pods.get(&uid) {
            // Anybody who makes pods can annotate them as they like, and must not take another one's place.
            Some(known) => is_same(known, pod),
            None => pods.len() < REMEMBERED,
        };
        if may_add {
            pods.insert(uid, Arc::clone(&described));
        }
    }
}

fn is_same(known: &Pod, pod: &ApiPod) -> bool {
    known.name == pod.name_any() && Some(&known.namespace) == pod.namespace().as_ref()
}

/// What made the pod. A ReplicaSet is named after its Deployment and the hash of its template, a Job after its
/// CronJob and the minute.
fn owner(pod: &ApiPod) -> Option<String> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))?;
    let hash = pod.labels().get("pod-template-hash");
    let deployment = hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'));
    let cron_job = owner.name.rsplit_once('-').and_then(|(name, minute)| {
        let minute: u32 = minute.parse().ok()?;
        (minute >= FIRST_MINUTE).then_some(name)
    });
    Some(match (owner.kind.as_str(), deployment, cron_job) {
        ("ReplicaSet", Some(name), _) => format!("Deployment/{name}"),
        ("Job", _, Some(name)) => format!("CronJob/{name}"),
        (kind, ..) => format!("{kind}/{}", owner.name),
    })
}

/// What the pod's cgroup is called. A static pod's name for that cannot be taken for an UID of the API server,
/// which has dashes.
fn uids(pod: &ApiPod) -> impl Iterator<Item = String> {
    let annotations = pod.annotations();
    let of_static = annotations.get(STATIC_UID).filter(|uid| {
        let is_uid = uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_uid && annotations.get(MIRROR) == Some(*uid)
    });
    pod.uid().into_iter().chain(of_static.cloned())
}

fn lock(known: &Mutex<Pages>) -> MutexGuard<'_, Pages> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";
    const STATIC: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";

    fn pod(metadata: Value) -> ApiPod {
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    #[test]
    fn owners_are_named_as_people_made_them() {
        let table = [
            (("ReplicaSet", "web-5d4c7b", true), Some("Deployment/web")),
            (("ReplicaSet", "by-hand", true), Some("ReplicaSet/by-hand")),
            (("Job", "backup-28512345", true), Some("CronJob/backup")),
            (("Job", "import-2024", true), Some("Job/import-2024")),
            (
                ("Job", "import-20260131", true),
                Some("Job/import-20260131"),
            ),
            (
                ("Job", "import-28512345x", true),
                Some("Job/import-28512345x"),
            ),
            (("Job", "import", true), Some("Job/import")),
            (("CronJob", "backup", true), Some("CronJob/backup")),
            (
                ("DaemonSet", "agent-28512345", true),
                Some("DaemonSet/agent-28512345"),
            ),
            (("StatefulSet", "db", true), Some("StatefulSet/db")),
            (("Custom", "thing", false), None),
        ];
        for ((kind, name, controller), expected) in table {
            let pod = pod(json!({
                "name": "it", "labels": {"pod-template-hash": "5d4c7b"},
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": kind, "name": name, "uid": "1", "controller": controller},
                ],
            }));
            assert_eq!(owner(&pod).as_deref(), expected, "{kind}/{name}");
        }
        assert_eq!(owner(&pod(json!({"name": "alone"}))), None);
    }

    #[test]
    fn nobody_takes_the_place_of_another_pod_by_annotations() {
        let static_pod = json!({
            "name": "etcd", "namespace": "kube-system", "uid": UID,
            "annotations": {STATIC_UID: STATIC, MIRROR: STATIC},
        });
        let forged = |uid: &str, annotations: Value| {
            pod(
                json!({"name": "evil", "namespace": "evil", "uid": uid, "annotations": annotations}),
            )
        };
        let mut pages = Pages::default();
        let who = |pages: &Pages, uid: &str| pages.current.get(uid).map(|pod| pod.name.clone());
        let other = UID.replace("01", "02");
        for annotations in [
            json!({STATIC_UID: UID, MIRROR: UID}),
            json!({STATIC_UID: STATIC}),
            json!({STATIC_UID: STATIC, MIRROR: "x"}),
        ] {
            pages.take(Event::Apply(forged(&other, annotations)));
            assert_eq!(who(&pages, STATIC), None);
            assert_eq!(who(&pages, UID), None);
        }
        pages.take(Event::Apply(pod(static_pod.clone())));
        // The same that a mirror has, and that nobody else may have.
        let evil = forged(&other, json!({STATIC_UID: STATIC, MIRROR: STATIC}));
        pages.take(Event::Apply(evil.clone()));
        pages.take(Event::Delete(evil));
        for uid in [STATIC, UID] {
            assert_eq!(who(&pages, uid).as_deref(), Some("etcd"));
        }
        assert_eq!(who(&pages, &other), None);
        pages.take(Event::Delete(pod(static_pod)));
        assert!(pages.current.is_empty());
    }
}
