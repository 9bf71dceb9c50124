//! What a process holds: files, sockets, memory. Whoever leaks holds more after a run than before.

use std::collections::BTreeMap;

use regent_history::Violation;

use crate::cluster::{Cluster, REPLICAS, node_name, replica_name};

/// The name in [`Violation::checker`].
pub(crate) const CHECKER: &str = "nothing leaks";

/// Files and sockets more than at the begin, with all clients gone: connections that are kept for a while.
const MORE_FILES: usize = 60;
/// Resident memory that no process of these short runs needs, in MiB (a debug build).
const MEMORY_MB: u64 = 600;

/// What one process holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Held {
    files: usize,
    sockets: usize,
    memory_mb: u64,
}

/// What each process of a cluster holds, by its name.
pub(crate) fn held(cluster: &Cluster) -> BTreeMap<String, Held> {
    let nodes = (0..cluster.plan.nodes).map(node_name);
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

/// Judges what is held in the end.
pub(crate) fn check(
    before: &BTreeMap<String, Held>,
    after: &BTreeMap<String, Held>,
) -> Result<(), Violation> {
    let too_much: Vec<String> = after
        .iter()
        .filter(|(name, held)| {
            let before = before.get(*name).copied().unwrap_or_default();
            held.files > before.files + MORE_FILES || held.memory_mb > MEMORY_MB
        })
        .map(|(name, held)| format!("{name}: {held:?}, before {:?}", before.get(name)))
        .collect();
    if too_much.is_empty() {
        Ok(())
    } else {
        Err(Violation::new(CHECKER, "a process holds more than it needs").with(too_much))
    }
}
