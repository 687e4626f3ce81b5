//! State files of container runtimes: OCI runtime specifications with annotations of their own.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{ErrorKind, Read as _},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::Sources;
use crate::policy::caller::Container;

/// Largest file that is read.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// Annotations with the name of the image: of containerd's CRI plugin, nerdctl, CRI-O and podman.
const IMAGES: [&str; 5] = [
    "io.kubernetes.cri.image-name",
    "nerdctl/image-ref",
    "io.kubernetes.cri-o.ImageName",
    "io.podman.annotations.image",
    "org.opencontainers.image.ref.name",
];
/// Annotations with the name of the container.
const NAMES: [&str; 4] = [
    "io.kubernetes.cri.container-name",
    "nerdctl/name",
    "io.kubernetes.container.name",
    "io.podman.annotations.container.name",
];

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// What the state files say of a container; `None` if there are none.
///
/// # Errors
/// They cannot be read.
pub fn read(sources: &Sources, id: &str) -> anyhow::Result<Option<Container>> {
    // One directory for each of containerd's namespaces: k8s.io, moby, default.
    let tasks = sources
        .containerd_state
        .join("io.containerd.runtime.v2.task");
    let namespaces = fs::read_dir(&tasks).into_iter().flatten().flatten();
    let mut places: Vec<PathBuf> = namespaces.map(|entry| entry.path().join(id)).collect();
    let storage = sources.containers_storage.join("overlay-containers");
    places.push(storage.join(id).join("userdata"));
    for place in places {
        if let Some(spec) = spec(&place.join("config.json"))? {
            let of = |names: &[&str]| {
                names
                    .iter()
                    .find_map(|name| spec.annotations.get(*name))
                    .cloned()
            };
            return Ok(Some(Container {
                name: of(&NAMES),
                image: of(&IMAGES),
            }));
        }
    }
    Ok(None)
}

fn spec(file: &Path) -> anyhow::Result<Option<Spec>> {
    let file = match File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(Some(serde_json::from_str(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_runtime_tells_in_its_own_words() {
        let root = std::env::temp_dir().join(format!("imds-guard-{}-state", std::process::id()));
        let sources = Sources {
            docker_socket: None,
            containerd_state: root.join("containerd"),
            containers_storage: root.join("storage"),
            kubernetes: None,
        };
        let table = [
            (
                "containerd/io.containerd.runtime.v2.task/k8s.io/aaaaaaaaaaaa",
                r#"{"annotations": {"io.kubernetes.cri.image-name": "nginx:1", "io.kubernetes.cri.container-name": "web"}}"#,
                Some(("web", "nginx:1")),
            ),
            (
                "containerd/io.containerd.runtime.v2.task/default/bbbbbbbbbbbb",
                r#"{"annotations": {"nerdctl/image-ref": "alpine:3", "nerdctl/name": "sh"}}"#,
                Some(("sh", "alpine:3")),
            ),
            (
                "storage/overlay-containers/cccccccccccc/userdata",
                r#"{"annotations": {"io.kubernetes.cri-o.ImageName": "redis:7", "io.kubernetes.container.name": "db"}}"#,
                Some(("db", "redis:7")),
            ),
            (
                "storage/overlay-containers/dddddddddddd/userdata",
                "{}",
                None,
            ),
        ];
        for (place, text, expected) in table {
            fs::create_dir_all(root.join(place)).unwrap();
            fs::write(root.join(place).join("config.json"), text).unwrap();
            let id = place.split('/').find(|part| part.len() == 12).unwrap();
            let found = read(&sources, id).unwrap().unwrap();
            let expected = expected.map(|(name, image)| (name.to_owned(), image.to_owned()));
            assert_eq!(found.name.zip(found.image), expected, "{place}");
        }
        assert_eq!(read(&sources, "eeeeeeeeeeee").unwrap(), None);
        let broken = root.join("storage/overlay-containers/dddddddddddd/userdata/config.json");
        fs::write(broken, "{").unwrap();
        assert!(read(&sources, "dddddddddddd").is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
