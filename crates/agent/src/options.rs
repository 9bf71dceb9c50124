//! How an agent is set up.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use regent_client::Trust;
use regent_types::agent::Capacity;
use regent_types::{AgentId, Cpu, Memory, ReplicaName};

/// The TTL that replicas ask for: longer than a failover of the control plane and two keepalives together, so that
/// a failover costs no leadership, and short enough that a replica that died is soon replaced.
pub const LEASE_TTL: Duration = Duration::from_secs(4);

/// How an agent is set up.
#[derive(Clone)]
pub struct Options {
    /// Its id.
    pub agent_id: AgentId,
    /// The URLs of the nodes, `http://HOST:PORT` or `https://HOST:PORT`; tried in turn.
    pub servers: Vec<String>,
    /// Which certificates of nodes it believes, and what it shows them.
    pub trust: Trust,
    /// Its token.
    pub token: String,
    /// Its name among the replicas of this agent; none for an agent that has only one.
    pub replica: Option<ReplicaName>,
    /// The TTL of the lease for which a replica campaigns.
    pub lease_ttl: Duration,
    /// How long after its connection is lost a replica's lease is given up early; none waits for the TTL.
    pub release_on_disconnect: Option<Duration>,
    /// Where the fence, the journal and the cluster's identity are kept; shared by the replicas of a host.
    pub data: PathBuf,
    /// What it runs sessions on, for placement; the runtime's kind when empty.
    pub platform: String,
    /// Where it is, for placement.
    pub region: String,
    /// For placement.
    pub labels: BTreeMap<String, String>,
    /// What it can carry.
    pub capacity: Capacity,
    /// So many commands are worked on side by side; none is [`crate::session::MAX_PARALLEL`].
    pub parallel: Option<NonZeroUsize>,
    /// Whether its sessions end with it, as in `dev`. Otherwise they go on and are found again.
    pub stop_sessions_on_exit: bool,
}

impl Options {
    /// An agent of this machine, with all that it has.
    pub fn new(agent_id: AgentId, servers: Vec<String>, token: String, data: impl Into<PathBuf>) -> Self {
        Self {
            agent_id,
            servers,
            trust: Trust::default(),
            token,
            replica: None,
            lease_ttl: LEASE_TTL,
            release_on_disconnect: None,
            data: data.into(),
            platform: String::new(),
            region: String::new(),
            labels: BTreeMap::new(),
            capacity: machine_capacity(),
            parallel: None,
            stop_sessions_on_exit: false,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("agent_id", &self.agent_id)
            .field("servers", &self.servers)
            .field("replica", &self.replica)
            .field("data", &self.data)
            .finish_non_exhaustive()
    }
}

/// What this machine has: its cores (as far as this process may use them) and its memory. What cannot be
/// found out is not counted.
pub fn machine_capacity() -> Capacity {
    let cores = std::thread::available_parallelism().ok();
    Capacity {
        max_sessions: None,
        cpu: cores.map(|cores| Cpu(cores.get() as u64 * 1000)),
        memory: std::fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| total_memory(&text)),
    }
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn total_memory(meminfo: &str) -> Option<Memory> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(Memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kib_and_left_out_when_it_is_not_there() {
        let text = "MemTotal:       24689764 kB\nMemFree:        23000000 kB\n";
        assert_eq!(total_memory(text), Some(Memory(24_689_764 * 1024)));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn the_token_is_not_in_debug_output() {
        let options = Options::new(AgentId::new("a").unwrap(), vec![], "secret".to_owned(), "/tmp");
        assert!(!format!("{options:?}").contains("secret"));
    }
}
