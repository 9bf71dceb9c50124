//! What a node is started with.
//!
//! Durations that must stand in a relation to each other (a heartbeat well below the stale time) are
//! checked once, in [`Options::check`], so that nothing later has to.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use regent_raft::{LogStore, MemoryDisk, SnapshotPolicy, Sockets};
pub use regent_tls::{Credentials, Files, HttpClients};
use regent_types::NodeId;
use regent_types::lease::{MAX_TTL_MS, MIN_TTL_DEV_MS, MIN_TTL_MS};

/// How often agents send a heartbeat, unless told otherwise.
pub const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(10);
/// After how long without one an agent is offline, unless told otherwise.
pub const DEFAULT_STALE_AFTER: Duration = Duration::from_secs(30);

/// How many voters stay at least when dead ones are removed, unless told otherwise.
pub const DEFAULT_MIN_VOTERS: usize = 3;

/// Everything that one node needs to know.
pub struct Options {
    /// This node's id; it must be in `members` at the first start.
    pub node: NodeId,
    /// Folder of log, vote and snapshots; created when it is missing.
    pub data: PathBuf,
    /// Where REST and the agent gateway listen.
    pub http: SocketAddr,
    /// Where the peer transport listens.
    pub peer: SocketAddr,
    /// Base address at which clients and agents reach this node, such as `http://10.0.0.1:8000`; empty: from `http`.
    pub advertise_http: String,
    /// `host:port` at which the other members reach this node; empty: from `peer`.
    pub advertise_peer: String,
    /// Peer addresses of all members, this node included.
    pub members: BTreeMap<NodeId, String>,
    /// What all members know and nobody else does; at least 16 bytes.
    pub secret: Vec<u8>,
    /// How often agents send a heartbeat.
    pub heartbeat: Duration,
    /// After how long without one an agent is offline; more than twice the heartbeat.
    pub stale_after: Duration,
    /// The first admin token. Needed on at least one node at the very first start, ignored later.
    pub bootstrap_token: Option<String>,
    /// The first admin's password at the very first start; without it only the token can be used.
    pub admin_password: Option<String>,
    /// Shorter leases are granted, as tests and demonstrations need them.
    pub dev: bool,
    /// What keeps log and vote in the data folder; it never changes for a folder.
    pub log_store: LogStore,
    /// Log and vote live in this process only (tests), on a disk that outlives the node.
    pub memory: Option<MemoryDisk>,
    /// When snapshots are taken.
    pub snapshots: SnapshotPolicy,
    /// Backups on a schedule, if any.
    pub backups: Option<BackupSchedule>,
    /// After how long without a sign of life a voter is removed without a person; never when absent.
    pub remove_dead_after: Option<Duration>,
    /// How many voters stay at least when dead ones are removed.
    pub min_voters: usize,
    /// What one caller may take of this node.
    pub limits: Limits,
    /// Over what everybody talks in a simulation; none is TCP.
    pub sockets: Option<Arc<dyn Sockets>>,
    /// The certificates of this node, for peers and for HTTP; none is plain text.
    pub tls: Option<Arc<Credentials>>,
    /// A socket that listens already; `http` is then ignored. Lets a test choose port 0 and know it.
    pub http_listener: Option<TcpListener>,
    /// The same for `peer`.
    pub peer_listener: Option<TcpListener>,
}

/// When backups are made, and where they are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSchedule {
    /// The folder; created when it is missing.
    pub folder: PathBuf,
    /// How long after the newest one the next is made.
    pub every: Duration,
    /// How many are kept; older ones are removed.
    pub keep: usize,
}

/// What one caller may take of a node, so that enough is left for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections to the HTTP port at once from one address; those that became sockets of agents do not count.
    pub connections_per_address: NonZeroUsize,
    /// Requests a second with one token, except an admin's.
    pub requests_per_second: NonZeroU32,
}

impl Default for Limits {
    /// Half of all the connections that there may be: whoever takes what it can leaves as much to the others, and
    /// thousands of clients behind one address are still served. Requests: above any program that is in its right
    /// mind, and a fraction of what a node can answer.
    fn default() -> Self {
        Self {
            connections_per_address: const {
                NonZeroUsize::new(crate::listener::MAX_CONNECTIONS / 2).expect("not 0")
            },
            requests_per_second: const { NonZeroU32::new(5_000).expect("not 0") },
        }
    }
}

impl Options {
    /// A node alone in its cluster, on loopback and free ports.
    pub fn single(data: PathBuf, secret: Vec<u8>) -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            node: NodeId(1),
            data,
            http: loopback,
            peer: loopback,
            advertise_http: String::new(),
            advertise_peer: String::new(),
            members: BTreeMap::new(),
            secret,
            heartbeat: DEFAULT_HEARTBEAT,
            stale_after: DEFAULT_STALE_AFTER,
            bootstrap_token: None,
            admin_password: None,
            dev: false,
            log_store: LogStore::default(),
            memory: None,
            snapshots: SnapshotPolicy::default(),
            backups: None,
            remove_dead_after: None,
            min_voters: DEFAULT_MIN_VOTERS,
            limits: Limits::default(),
            sockets: None,
            tls: None,
            http_listener: None,
            peer_listener: None,
        }
    }

    /// Refuses what contradicts itself, in words that name the option.
    pub fn check(&self) -> Result<(), String> {
        if self.node.0 == 0 {
            return Err("a node id is 1 or more".to_owned());
        }
        if self.heartbeat.is_zero() || self.stale_after <= self.heartbeat.saturating_mul(2) {
            return Err(format!(
                "the stale time ({:?}) must be more than twice the heartbeat ({:?})",
                self.stale_after, self.heartbeat
            ));
        }
        if self.stale_after > Duration::from_millis(MAX_TTL_MS) {
            return Err("the stale time must be at most an hour".to_owned());
        }
        if self
            .bootstrap_token
            .as_ref()
            .is_some_and(|token| token.trim().len() < MIN_TOKEN_CHARS)
        {
            return Err(format!(
                "the bootstrap token must have at least {MIN_TOKEN_CHARS} characters"
            ));
        }
        if let Some(backups) = &self.backups
            && (backups.keep == 0 || backups.every < MIN_BACKUP_EVERY)
        {
            return Err(format!(
                "backups must be kept (backup-keep at least 1) and be at least {MIN_BACKUP_EVERY:?} apart (backup-every)"
            ));
        }
        Ok(())
    }

    /// The TTLs that are granted, in milliseconds.
    pub(crate) fn ttls(&self) -> std::ops::RangeInclusive<u64> {
        let min = if self.dev { MIN_TTL_DEV_MS } else { MIN_TTL_MS };
        min..=MAX_TTL_MS
    }

    /// The stale time in milliseconds: the TTL of `agent/{id}` while a gateway holds it.
    pub fn stale_ms(&self) -> u64 {
        millis(self.stale_after)
    }

    /// The heartbeat in milliseconds.
    pub fn heartbeat_ms(&self) -> u64 {
        millis(self.heartbeat)
    }
}

/// Backups are not made more often: each writes the whole state.
const MIN_BACKUP_EVERY: Duration = Duration::from_secs(1);

/// Fewest characters of a bootstrap token: less could be guessed through the API.
pub(crate) const MIN_TOKEN_CHARS: usize = 16;

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

// By hand: three of the fields are secrets.
impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("node", &self.node)
            .field("data", &self.data)
            .field("http", &self.http)
            .field("peer", &self.peer)
            .field("members", &self.members)
            .field("log_store", &self.log_store)
            .field("heartbeat", &self.heartbeat)
            .field("stale_after", &self.stale_after)
            .field("dev", &self.dev)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_too_close_to_the_stale_time_is_refused() {
        let mut options = Options::single(PathBuf::new(), b"0123456789abcdef".to_vec());
        assert_eq!(options.check(), Ok(()));
        options.heartbeat = Duration::from_secs(15);
        assert!(options.check().unwrap_err().contains("twice"));
    }

    #[test]
    fn secrets_are_not_printed() {
        let mut options = Options::single(PathBuf::new(), b"0123456789abcdef".to_vec());
        options.bootstrap_token = Some("regent_very_secret_token".to_owned());
        assert!(!format!("{options:?}").contains("secret"));
    }
}
