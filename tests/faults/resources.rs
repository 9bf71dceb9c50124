//! What a process holds: files, sockets, memory. Whoever leaks holds more after a run than before.

use std::collections::BTreeMap;

use regent_history::Violation;

use crate::cluster::{Cluster, REPLICAS, replica_name};

/// The name in [`Violation::checker`].
pub(crate) const CHECKER: &str = "nothing leaks";

/// Files or sockets more than at first: what comes and goes with sessions.
const MORE_FILES: usize = 40;
/// The same while clients are there: a process that has just begun has none yet.
const MORE_WITH_CLIENTS: usize = 150;
/// Resident memory more than at first, in MiB: a log's tail and a snapshot being written.
const MORE_MEMORY_MB: u64 = 200;
/// Resident memory that no process of these short runs needs, in MiB (a debug build).
const MEMORY_MB: u64 = 600;

impl Held {
    fn is_more_than(&self, before: &Self, by: usize) -> bool {
        self.files > before.files + by
            || self.sockets > before.sockets + by
            || self.memory_mb > before.memory_mb + MORE_MEMORY_MB
            || self.memory_mb > MEMORY_MB
    }
}

/// What one process holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Held {
    files: usize,
    sockets: usize,
    memory_mb: u64,
}

/// What each process of a cluster holds, by its name.
pub(crate) fn held(cluster: &Cluster) -> BTreeMap<String, Held> {
    let nodes = cluster.members().into_iter().map(|node| cluster.name(node));
    let names = nodes.chain((0..REPLICAS.len()).map(replica_name));
    names
        .filter_map(|name| Some((name.clone(), of(cluster.pid(&name)?))))
        .collect()
}

fn of(pid: u32) -> Held {
    let mut held = Held::default();
    for file in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        held.files += 1;
        let target = std::fs::read_link(file.path()).unwrap_or_default();
        held.sockets += usize::from(target.to_string_lossy().starts_with("socket:"));
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|text| text.trim().split(' ').next()?.parse::<u64>().ok());
    held.memory_mb = kib.unwrap_or(0) / 1_024;
    held
}

/// Judges what is held in the end, with all clients gone.
pub(crate) fn check(
    before: &BTreeMap<String, Held>,
    after: &BTreeMap<String, Held>,
) -> Result<(), Violation> {
    let too_much = before.iter().filter_map(|(name, before)| match after.get(name) {
        None => Some(format!("{name} does not run")),
        Some(held) => held
            .is_more_than(before, MORE_FILES)
            .then(|| format!("{name}: {held:?}, before {before:?}")),
    });
    told(too_much.collect())
}

/// What each process held after each round, under the same load all the time.
#[derive(Default)]
pub(crate) struct Samples(BTreeMap<(String, u32), (Held, Held)>);

impl Samples {
    pub(crate) fn take(&mut self, cluster: &Cluster) {
        for (name, held) in held(cluster) {
            if let Some(pid) = cluster.pid(&name) {
                self.0.entry((name, pid)).or_insert((held, held)).1 = held;
            }
        }
    }

    /// A process that held more and more while it ran.
    pub(crate) fn check(&self) -> Result<(), Violation> {
        let more = self
            .0
            .iter()
            .filter(|(_, (first, last))| last.is_more_than(first, MORE_WITH_CLIENTS));
        told(
            more.map(|((name, pid), (first, last))| format!("{name} ({pid}): {last:?}, at first {first:?}"))
                .collect(),
        )
    }
}

fn told(too_much: Vec<String>) -> Result<(), Violation> {
    if too_much.is_empty() {
        Ok(())
    } else {
        Err(Violation::new(CHECKER, "a process holds more than it needs").with(too_much))
    }
}
