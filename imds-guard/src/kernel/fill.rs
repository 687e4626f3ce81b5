//! How full the maps are that others can fill.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, Pod,
    maps::{HashMap, Map, MapData},
};
use imds_guard_common::flow::{Origin, SynKey};

/// As the kernel programs have it: `imds_guard_common::packet::Budget`.
type Budget = [u64; 3];

/// The maps, for counting.
pub struct MapFill {
    maps: Vec<Box<dyn Countable>>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Its name.
    pub map: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that it has room for.
    pub capacity: u64,
}

trait Countable: Send + Sync {
    fn count(&self) -> Fill;
}

struct Counted<K: Pod, V: Pod> {
    name: &'static str,
    capacity: u32,
    map: HashMap<MapData, K, V>,
}

impl<K: Pod + Send + Sync, V: Pod + Send + Sync> Countable for Counted<K, V> {
    fn count(&self) -> Fill {
        Fill {
            map: self.name,
            // While others write, it may begin anew; it never ends later than with as many as fit.
            entries: self
                .map
                .keys()
                .take(self.capacity as usize)
                .flatten()
                .count() as u64,
            capacity: self.capacity.into(),
        }
    }
}

impl MapFill {
    /// Nothing to count: no kernel programs are there.
    #[must_use]
    pub fn none() -> Self {
        Self { maps: Vec::new() }
    }

    /// Of the maps of an object that still has them.
    pub(super) fn of(ebpf: &Ebpf) -> anyhow::Result<Self> {
        Ok(Self {
            maps: vec![
                counted::<u64, u8>(ebpf, "EXEMPT")?,
                counted::<u64, Origin>(ebpf, "PENDING")?,
                counted::<SynKey, Origin>(ebpf, "FLOWS")?,
                counted::<u64, Budget>(ebpf, "CALLERS")?,
            ],
        })
    }

    /// Counts what is in each. A system call for each entry.
    #[must_use]
    pub fn read(&self) -> Vec<Fill> {
        self.maps.iter().map(|map| map.count()).collect()
    }
}

fn counted<K: Pod + Send + Sync, V: Pod + Send + Sync>(
    ebpf: &Ebpf,
    name: &'static str,
) -> anyhow::Result<Box<dyn Countable>> {
    let (Some(Map::HashMap(data)) | Some(Map::LruHashMap(data))) = ebpf.map(name) else {
        return Err(anyhow!("the kernel object has no map {name}"));
    };
    let again = data.fd().as_fd().try_clone_to_owned().context(name)?;
    let data = MapData::from_fd(again).context(name)?;
    let capacity = data.info().context(name)?.max_entries();
    let map: HashMap<_, K, V> = HashMap::try_from(Map::LruHashMap(data)).context(name)?;
    Ok(Box::new(Counted {
        name,
        capacity,
        map,
    }))
}
