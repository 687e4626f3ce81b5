//! How full the maps are that others can fill.

use std::{
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf, Pod,
    maps::{HashMap, Map, MapData},
};
use imds_guard_common::flow::{Origin, SynKey};

/// How long what was counted is good enough, as whoever asks costs a system call for each entry.
const FRESH: Duration = Duration::from_secs(5);

/// The maps, for counting.
pub struct MapFill {
    maps: Vec<Box<dyn Countable>>,
    last: Mutex<Option<(Instant, Vec<Fill>)>>,
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
        Self::counting(Vec::new())
    }

    fn counting(maps: Vec<Box<dyn Countable>>) -> Self {
        Self {
            maps,
            last: Mutex::default(),
        }
    }

    /// Of the maps of an object that still has them. Without PENDING and CALLERS: nothing is ever removed
    /// from these, so they are full in the end, and that costs nobody anything.
    pub(super) fn of(ebpf: &Ebpf) -> anyhow::Result<Self> {
        Ok(Self::counting(vec![
            counted::<u64, u8>(ebpf, "EXEMPT")?,
            counted::<SynKey, Origin>(ebpf, "FLOWS")?,
        ]))
    }

    /// Counts what is in each, if that was not done a moment ago. May take some milliseconds.
    #[must_use]
    pub fn read(&self) -> Vec<Fill> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((when, fill)) if when.elapsed() < FRESH => fill.clone(),
            _ => {
                let fill: Vec<_> = self.maps.iter().map(|map| map.count()).collect();
                *last = Some((Instant::now(), fill.clone()));
                fill
            }
        }
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
