//! The nodes: a machine each, with a disk that outlives what runs on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use regent_raft::Node;
use regent_server::{MemoryDisk, Options, Server, SnapshotPolicy};
use regent_types::NodeId;

use crate::machine::{Machine, Rate};
use crate::network::{Host, Network, address};

/// The token of every client.
pub const TOKEN: &str = "regent_the_first_token_of_this_cluster";
/// The port of REST and gateway on every node.
pub const HTTP: u16 = 8_000;
/// The port of the peers.
const PEER: u16 = 7_000;
/// After how long a supervisor starts a node again that has ended by itself.
const SUPERVISOR_MS: u64 = 500;

/// What a node's process says of itself.
#[derive(Clone, Default)]
pub enum Said {
    /// It is starting.
    #[default]
    Nothing,
    /// It runs.
    Runs(Node),
    /// It could not start, or could not go on.
    Ended(String),
}

/// A node and its machine.
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Where it runs.
    pub machine: Machine,
    /// Its log and vote.
    pub disk: MemoryDisk,
    /// Its disk was made to fail since it was switched on, so that it may end with an error.
    pub disk_failed: bool,
    /// How long a sync takes when nothing is wrong.
    pub sync_takes: Duration,
    data: PathBuf,
    said: Arc<Mutex<Said>>,
    /// When it is to be switched on.
    pub on_at: Option<u64>,
    /// How often it was.
    pub starts: u64,
}

/// All nodes.
pub struct Cluster {
    /// By place; node 1 is at place 0, which is its host on the network as well.
    pub members: Vec<Member>,
    network: Network,
    snapshots: SnapshotPolicy,
    /// What nodes ended with that nothing explains.
    pub failures: Vec<String>,
}

impl Cluster {
    /// So many nodes, switched off, with clocks and a snapshot policy drawn from `rng`.
    pub fn new(size: usize, folder: &Path, network: Network, rng: &mut StdRng) -> Self {
        let members = (0..size)
            .map(|place| {
                let id = NodeId(place as u64 + 1);
                let rate = rate(rng);
                let wall_wrong_by = rng.random_range(-3_000..=3_000);
                Member {
                    id,
                    machine: Machine::new(format!("node {id}"), rate, wall_wrong_by),
                    disk: MemoryDisk::default(),
                    disk_failed: false,
                    sync_takes: Duration::from_millis(rng.random_range(0..6)),
                    data: folder.join(id.to_string()),
                    said: Arc::default(),
                    on_at: None,
                    starts: 0,
                }
            })
            .collect();
        let every = rng.random_range(20..300);
        Self {
            members,
            network,
            snapshots: SnapshotPolicy {
                every,
                keep: rng.random_range(0..=every),
            },
            failures: Vec::new(),
        }
    }

    /// How many nodes.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Switches a node on.
    pub fn switch_on(&mut self, place: Host, now: u64) {
        let size = self.len();
        let member = &mut self.members[place];
        member.on_at = None;
        if member.machine.is_on() {
            return;
        }
        self.network.light_up(place);
        member.disk.set_failing(false);
        member.disk.set_sync_takes(member.sync_takes);
        member.disk_failed = false;
        let mut options = Options::single(member.data.clone(), b"the secret of the simulation".to_vec());
        options.node = member.id;
        options.http = address(place, HTTP);
        options.peer = address(place, PEER);
        options.advertise_http = format!("http://{}", options.http);
        options.advertise_peer = options.peer.to_string();
        options.members = members(size);
        options.bootstrap_token = Some(TOKEN.to_owned());
        options.dev = true;
        options.heartbeat = Duration::from_secs(2);
        options.stale_after = Duration::from_secs(6);
        options.memory = Some(member.disk.clone());
        options.snapshots = self.snapshots.clone();
        options.sockets = Some(self.network.sockets(place));
        member.starts += 1;
        member.said = Arc::default();
        let said = member.said.clone();
        member.machine.switch_on(now, async move {
            let say = |what: Said| *said.lock().unwrap_or_else(PoisonError::into_inner) = what;
            match Server::start(options).await {
                Ok(server) => {
                    say(Said::Runs(server.node().clone()));
                    say(Said::Ended(server.failed().await));
                }
                Err(error) => say(Said::Ended(chain(&error))),
            }
        });
    }

    /// Ends a node as `kill -9` does, or, with its machine, as a power cut. `kept` chooses how many of the writes
    /// that were not synced are on the disk nevertheless.
    pub fn switch_off(&mut self, place: Host, power: bool, kept: impl FnOnce(usize) -> usize) {
        if power {
            self.network.go_dark(place);
        }
        let member = &mut self.members[place];
        if !member.machine.is_on() {
            return;
        }
        *member.said.lock().unwrap_or_else(PoisonError::into_inner) = Said::Nothing;
        member.machine.switch_off();
        // What a process wrote survives its end; what the machine had not synced does not survive the machine's.
        if power {
            member.disk.crash_keeping(kept);
        } else {
            member.disk.crash_keeping(|all| all);
        }
    }

    /// Does what a supervisor does: starts again what has ended, and what is to be switched on by now.
    pub fn supervise(&mut self, now: u64) {
        for place in 0..self.len() {
            let member = &self.members[place];
            if let Said::Ended(why) = self.said(place) {
                if !member.disk_failed {
                    self.failures
                        .push(format!("{now}: node {} ended: {why}", member.id));
                }
                self.switch_off(place, false, |_| 0);
                self.members[place].on_at = Some(now + SUPERVISOR_MS);
            }
            if self.members[place].on_at.is_some_and(|at| at <= now) {
                self.switch_on(place, now);
            }
        }
    }

    /// What its process says of itself.
    pub fn said(&self, place: Host) -> Said {
        let said = &self.members[place].said;
        said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A node that runs (be it frozen).
    pub fn node(&self, place: Host) -> Option<Node> {
        match self.said(place) {
            Said::Runs(node) => Some(node),
            Said::Nothing | Said::Ended(_) => None,
        }
    }

    /// Who leads, by its own word.
    pub fn leader(&self) -> Option<Host> {
        (0..self.len()).find(|place| {
            self.node(*place)
                .is_some_and(|node| node.leadership().borrow().mine.is_some())
        })
    }
}

/// The error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn members(size: usize) -> BTreeMap<NodeId, String> {
    (0..size)
        .map(|place| (NodeId(place as u64 + 1), address(place, PEER).to_string()))
        .collect()
}

/// A clock within the bound that is documented: rates of any two differ by at most 1 %.
pub fn rate(rng: &mut StdRng) -> Rate {
    const HALF_RHO_PPM: i32 = 4_950;
    Rate {
        ppm: rng.random_range(-HALF_RHO_PPM..=HALF_RHO_PPM),
        offset_ms: rng.random_range(0..1_000_000_000),
    }
}
