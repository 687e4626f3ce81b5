//! What a cgroup path tells of containers and pods.

use super::cgroup::is_unit;
use crate::policy::caller::Runtime;

/// Units of runtimes, below which they make the cgroups of pods when kubelet uses systemd for its
/// own and they do not.
const RUNTIME_UNITS: [&str; 3] = ["containerd.service", "crio.service", "docker.service"];

/// What a cgroup path tells of containers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// As the runtime names it.
    pub id: Option<String>,
    /// Who runs it.
    pub runtime: Option<Runtime>,
    /// The Kubernetes pod that it belongs to.
    pub pod_uid: Option<String>,
}

impl Container {
    /// The outermost container: what lies within was named by the container itself, which may call
    /// its own cgroups like those of another one. A pod counts only above its container, and outside
    /// of services, scopes and users' own systemd, which can name what is below them in the same way.
    pub fn of(path: &str) -> Option<Self> {
        let mut above = Vec::new();
        let mut pod_uid = None;
        let mut is_kubelets = true;
        // A runtime that is told to use a systemd slice, and does not, joins with colons what it was
        // told: SLICE:RUNTIME:ID.
        for part in path.split(['/', ':']) {
            if is_supervisor(part) {
                return None;
            }
            if let Some((id, runtime)) = container(part, &above) {
                return Some(Self {
                    id: Some(id.to_owned()),
                    runtime,
                    pod_uid,
                });
            }
            is_kubelets &= !is_unit(part) || RUNTIME_UNITS.contains(&part);
            if is_kubelets {
                pod_uid = pod(part, &above).or(pod_uid);
            }
            above.push(part);
        }
        pod_uid.map(|uid| Self {
            pod_uid: Some(uid),
            ..Self::default()
        })
    }
}

/// Id and runtime, if a component is a container's. All runtimes name containers by 64 hex digits, with
/// their own name before it (`docker-ID.scope`, `crio-ID`), in a component above (`docker/ID`), or
/// nowhere: kubelet decides where pods are, and `ID` alone may be containerd's or docker's.
fn container<'a>(part: &'a str, above: &[&str]) -> Option<(&'a str, Option<Runtime>)> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = match name.rsplit_once('-') {
        Some((prefix, id)) => (Some(prefix), id),
        None => (None, name),
    };
    if let [.., "ecs", task] = above
        && prefix == Some(task)
        && is_hex(task, 32)
        && id.bytes().all(|byte| byte.is_ascii_digit())
    {
        // As Fargate names them.
        return Some((name, None));
    }
    // podman's own pods are named like containers.
    if !is_hex(id, 64) || matches!((prefix, above), (None, [.., "libpod_parent"])) {
        return None;
    }
    let runtime = match prefix {
        Some(prefix) => runtime(prefix),
        None => above.iter().rev().find_map(|part| runtime(part)),
    };
    Some((id, runtime))
}

/// conmon watches over a container from outside, in a cgroup with the same id.
fn is_supervisor(part: &str) -> bool {
    part.split_once("-conmon-")
        .is_some_and(|(name, _)| runtime(name).is_some())
}

fn runtime(name: &str) -> Option<Runtime> {
    match name {
        // ECS's agent has docker make containers in cgroups that it named.
        "docker" | "ecs" => Some(Runtime::Docker),
        "cri-containerd" | "nerdctl" => Some(Runtime::Containerd),
        "crio" => Some(Runtime::Crio),
        "libpod" | "libpod-payload" => Some(Runtime::Podman),
        _ => None,
    }
}

/// The UID, if a component is a pod's: `kubepods[-QOS]-podUID.slice` with underscores for dashes, or
/// `kubepods[/QOS]/podUID`. Guaranteed pods have no class; kubelet may have a slice above its own.
fn pod(part: &str, above: &[&str]) -> Option<String> {
    let uid = if let Some(slice) = part.strip_suffix(".slice") {
        let (class, uid) = slice.rsplit_once("-pod")?;
        if !class.split('-').any(|word| word == "kubepods") {
            return None;
        }
        uid.replace('_', "-")
    } else {
        let ([.., "kubepods"] | [.., "kubepods", "burstable" | "besteffort"]) = above else {
            return None;
        };
        part.strip_prefix("pod")?.to_owned()
    };
    is_pod_uid(&uid).then_some(uid)
}

/// A UUID; static pods, which kubelet names after their manifest, have one without dashes.
fn is_pod_uid(uid: &str) -> bool {
    is_hex(uid, 32)
        || (uid.split('-').map(str::len).eq([8, 4, 4, 4, 12])
            && uid.split('-').all(|group| is_hex(group, group.len())))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::{super::cgroup::Cgroups, *};

    const ID: &str = "3f4a0e6d1b2c5e7f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f";
    const FORGED: &str = "0000000000000000000000000000000000000000000000000000000000000000";
    const POD: &str = "1a2b3c4d-1111-2222-3333-444455556666";
    /// The UID of a static pod, the id of a task.
    const HEX32: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";

    /// Fills in what the paths of a table share: the ids, and a pod's UID as systemd can write it.
    fn filled(text: &str) -> String {
        text.replace("{ID}", ID)
            .replace("{FORGED}", FORGED)
            .replace("{HEX32}", HEX32)
            .replace("{POD}", POD)
            .replace("{P_O_D}", &POD.replace('-', "_"))
    }

    fn assert_contains(text: &str, id: Option<&str>, runtime: Option<Runtime>, pod: Option<&str>) {
        let expected = Container {
            id: id.map(filled),
            runtime,
            pod_uid: pod.map(str::to_owned),
        };
        assert_eq!(
            Cgroups::parse(&filled(text)).container(),
            expected,
            "{text}"
        );
    }

    #[test]
    fn containers_outside_of_kubernetes_are_found() {
        use Runtime::*;
        for (text, runtime) in [
            // docker, with systemd and without; buildx; within a container that has cgroups of its own.
            ("0::/system.slice/docker-{ID}.scope", Some(Docker)),
            (
                "0::/system.slice/docker-{ID}.scope/init.scope",
                Some(Docker),
            ),
            ("0::/docker/{ID}", Some(Docker)),
            ("0::/docker/buildx/{ID}", Some(Docker)),
            ("0::/docker/buildx/{ID}/buildkit/x1y2z3", Some(Docker)),
            ("0::/own-parent/{ID}", None),
            (
                "12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/",
                Some(Docker),
            ),
            (
                "11:memory:/docker/{ID}\n0::/system.slice/containerd.service",
                Some(Docker),
            ),
            (
                "5:devices:/\n1:name=systemd:/system.slice/docker-{ID}.scope",
                Some(Docker),
            ),
            // The guard is in a cgroup namespace.
            ("0::/../../docker/{ID}", Some(Docker)),
            ("0::/../docker-{ID}.scope", Some(Docker)),
            // ECS: v1, v2.
            ("9:memory:/ecs/{HEX32}/{ID}\n0::/", Some(Docker)),
            (
                "0::/ecstasks.slice/ecstasks-{HEX32}.slice/docker-{ID}.scope",
                Some(Docker),
            ),
            // podman: systemd with crun's and systemd's own cgroup inside, rootless, cgroupfs, in a
            // pod of its own, and in the cgroup of a unit (Quadlet).
            ("0::/machine.slice/libpod-{ID}.scope", Some(Podman)),
            (
                "0::/machine.slice/libpod-{ID}.scope/container",
                Some(Podman),
            ),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
                Some(Podman),
            ),
            ("0::/libpod_parent/libpod-{ID}", Some(Podman)),
            ("0::/libpod_parent/{FORGED}/libpod-{ID}", Some(Podman)),
            (
                "0::/machine.slice/machine-libpod_pod_{FORGED}.slice/libpod-{ID}.scope",
                Some(Podman),
            ),
            (
                "0::/system.slice/web.service/libpod-payload-{ID}",
                Some(Podman),
            ),
            // nerdctl.
            ("0::/system.slice/nerdctl-{ID}.scope", Some(Containerd)),
            ("0::/default/{ID}", None),
            // A name that nobody here knows.
            ("0::/box-{ID}", None),
        ] {
            assert_contains(text, Some("{ID}"), runtime, None);
        }
        let fargate = "0::/ecs/{HEX32}/{HEX32}-2531612879";
        assert_contains(fargate, Some("{HEX32}-2531612879"), None, None);
    }

    #[test]
    fn pods_and_their_containers_are_found() {
        use Runtime::*;
        for (text, runtime, pod) in [
            // kubelet with systemd: by class, guaranteed, static, CRI-O, cri-dockerd, v1, hybrid.
            (
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{P_O_D}.slice/cri-containerd-{ID}.scope",
                Some(Containerd),
                POD,
            ),
            (
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{P_O_D}.slice/crio-{ID}.scope",
                Some(Crio),
                POD,
            ),
            (
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{P_O_D}.slice/crio-{ID}.scope/container",
                Some(Crio),
                POD,
            ),
            (
                "0::/kubepods.slice/kubepods-pod{P_O_D}.slice/docker-{ID}.scope",
                Some(Docker),
                POD,
            ),
            (
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HEX32}.slice/cri-containerd-{ID}.scope",
                Some(Containerd),
                HEX32,
            ),
            (
                "0::/../../kubepods.slice/kubepods-pod{P_O_D}.slice/cri-containerd-{ID}.scope",
                Some(Containerd),
                POD,
            ),
            (
                "11:memory:/kubepods.slice/kubepods-pod{P_O_D}.slice/crio-{ID}.scope\n1:name=systemd:/",
                Some(Crio),
                POD,
            ),
            // kubelet with a slice of its own above it.
            (
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{P_O_D}.slice/cri-containerd-{ID}.scope",
                Some(Containerd),
                POD,
            ),
            // kubelet with systemd, containerd without.
            (
                "0::/system.slice/containerd.service/kubepods-burstable-pod{P_O_D}.slice:cri-containerd:{ID}",
                Some(Containerd),
                POD,
            ),
            (
                "0::/kubepods-besteffort-pod{P_O_D}.slice:cri-containerd:{ID}",
                Some(Containerd),
                POD,
            ),
            // Both without: the path does not say whose container it is, except CRI-O's.
            ("0::/kubepods/burstable/pod{POD}/{ID}", None, POD),
            ("0::/kubepods/pod{POD}/{ID}", None, POD),
            ("0::/kubepods/besteffort/pod{HEX32}/{ID}", None, HEX32),
            ("0::/kubepods/burstable/pod{POD}/crio-{ID}", Some(Crio), POD),
            (
                "12:memory:/kubepods/besteffort/pod{POD}/{ID}\n0::/",
                None,
                POD,
            ),
            (
                "12:memory:/kubepods/pod{POD}/{ID}\n0::/system.slice/containerd.service",
                None,
                POD,
            ),
        ] {
            assert_contains(text, Some("{ID}"), runtime, Some(pod));
        }
        // What is in a pod, but in no container of it, such as a virtual machine monitor.
        assert_contains("0::/kubepods/pod{POD}/kata_overhead", None, None, Some(POD));
    }

    #[test]
    fn what_is_no_container_is_not_taken_for_one() {
        for text in [
            "0::/",
            "garbage",
            "0::/short-{ID}0",
            "0::/docker/{HEX32}",
            "0::/ecs/{HEX32}/{FORGED}x",
            "0::/ecs/{HEX32}/abc-123",
            "0::/ecs/{HEX32}/{HEX32}",
            "0::/docker/buildkit/x1y2z3",
            "0::/machine.slice/libpod-conmon-{ID}.scope",
            "0::/kubepods.slice/kubepods-pod{P_O_D}.slice/crio-conmon-{ID}.scope",
            "0::/kubepods.slice/kubepods-burstable.slice",
            "0::/kubepods/burstable/podgarbage",
            "0::/kubepods/elsewhere/pod{POD}",
            "0::/other.slice/other-pod{P_O_D}.slice",
        ] {
            assert_contains(text, None, None, None);
        }
    }

    /// A container with cgroups of its own, a service and a user can name them as they like: the
    /// outermost container counts, and a pod only where nobody but kubelet makes cgroups.
    #[test]
    fn what_a_process_named_itself_is_not_believed() {
        use Runtime::*;
        const KUBEPODS: &str =
            "kubepods.slice/kubepods-pod{P_O_D}.slice/cri-containerd-{FORGED}.scope";
        for (outside, runtime, pod) in [
            // kind and minikube look like this, too: the node is the container.
            ("docker/{ID}/kubelet.slice", Docker, None),
            ("system.slice/docker-{ID}.scope", Docker, None),
            ("machine.slice/libpod-{ID}.scope/container", Podman, None),
            (
                "kubepods.slice/kubepods-pod{HEX32}.slice/cri-containerd-{ID}.scope",
                Containerd,
                Some(HEX32),
            ),
        ] {
            for within in [KUBEPODS, "docker/{FORGED}", "crio-conmon-{FORGED}.scope"] {
                let text = format!("0::/{outside}/{within}");
                assert_contains(&text, Some("{ID}"), Some(runtime), pod);
            }
        }
        // These are not containers, so that a container of theirs counts, but not its pod.
        for outside in [
            "user.slice/user-7.slice/user@7.service",
            "system.slice/job.service",
            "machine.slice/machine-guest.scope/payload",
        ] {
            let text = format!("0::/{outside}/{KUBEPODS}");
            assert_contains(&text, Some("{FORGED}"), Some(Containerd), None);
            let text = format!("0::/{outside}/kubepods/pod{{POD}}");
            assert_contains(&text, None, None, None);
        }
    }
}
