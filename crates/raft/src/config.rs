//! The types and the settings that openraft runs with here.
//!
//! One place decides what travels in the log (`Proposal`), what comes back (`Reply`), who a member is
//! (`Member`) and which of openraft's many settings differ from its defaults and why. Everything else
//! in this crate uses the aliases below, so that openraft's generics appear once.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

openraft::declare_raft_types!(
    /// The openraft type configuration of a Regent cluster.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Reply,
        NodeId = u64,
        Node = Member,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

/// Term and node of a leader; with openraft's `leader_id_adv` it is in every log id.
pub(crate) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
/// Leader and index of an entry.
pub(crate) type LogId = openraft::LogId<LeaderId>;
/// A vote, granted or not yet.
pub(crate) type Vote = openraft::Vote<LeaderId>;
/// One entry of the replicated log.
pub(crate) type Entry = openraft::Entry<LeaderId, Payload>;
/// What an entry carries: nothing, a proposal or a membership.
pub(crate) type Payload = openraft::EntryPayload<Proposal, u64, Member>;
/// A membership together with the log id that set it.
pub(crate) type StoredMembership = openraft::StoredMembership<LeaderId, u64, Member>;
/// What a snapshot covers: last log id and last membership.
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, Member>;

/// Largest `Proposal::body` in bytes.
///
/// A session with a full manifest or an agent's first report of some thousand sessions stays below it; it is
/// what one entry may add to a replication request. The log itself keeps records of any size in parts.
pub const MAX_PROPOSAL: usize = 1024 * 1024;

/// One operation on its way through the log.
///
/// The body is encoded once, on the node that took the request, and stays bytes until it is applied.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proposal {
    /// Cluster time in milliseconds, stamped by the leader that appended the entry.
    pub(crate) at: u64,
    /// An encoded `regent_state::Request`, at most [`MAX_PROPOSAL`] bytes.
    pub(crate) body: Bytes,
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "proposal at {} of {} bytes", self.at, self.body.len())
    }
}

// The body may hold a secret (a password hash, a token hash), and openraft prints entries at debug.
impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What applying one entry gave, ready to travel back to the node that took the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// Revision of the entry: the state's base plus the log index.
    pub(crate) revision: u64,
    /// `regent_state::encode_applied` of the result; empty for entries that are not proposals.
    pub(crate) applied: Bytes,
}

/// Where a member of the cluster can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// `host:port` of the peer transport.
    pub(crate) peer: String,
    /// Base address of the public HTTP API.
    pub(crate) http: String,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.peer)
    }
}

/// The timeouts of consensus.
///
/// A leader is replaced `election_max` (its lease) plus between `election_min` and `election_max`
/// after its last sign of life, and one round of votes: 0.5 to 0.75 s with the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Interval of the leader's heartbeats.
    pub heartbeat: Duration,
    /// Shortest election timeout; must exceed `heartbeat`.
    pub election_min: Duration,
    /// Longest election timeout, and the leader's lease; must exceed `election_min`.
    pub election_max: Duration,
    /// How long sending and installing one whole snapshot may take.
    pub snapshot_timeout: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            // Five heartbeats may be late before anybody doubts the leader. Who doubts it alone does no harm:
            // with pre-vote a node changes the term only after a majority has missed the leader too.
            heartbeat: Duration::from_millis(75),
            election_min: Duration::from_millis(150),
            election_max: Duration::from_millis(375),
            // openraft's 200 ms would never let a snapshot of some hundred megabytes arrive.
            snapshot_timeout: Duration::from_mins(5),
        }
    }
}

/// When a snapshot is taken and how much of the log stays behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPolicy {
    /// Entries applied since the last snapshot that call for the next one.
    pub every: u64,
    /// Entries kept before the snapshot, so that a follower a little behind needs no snapshot. With at least
    /// `every` of them an older snapshot can also stand in for a damaged newest one.
    pub keep: u64,
}

impl SnapshotPolicy {
    /// One every so many entries, with a fifth more of them kept.
    pub fn every(entries: u64) -> Self {
        Self {
            every: entries,
            keep: entries.saturating_add(entries / 5),
        }
    }
}

impl Default for SnapshotPolicy {
    fn default() -> Self {
        Self::every(50_000)
    }
}

/// Entries of one replication request at most; its bytes are capped by `log::READ_BATCH_BYTES`.
const MAX_PAYLOAD_ENTRIES: u64 = 4_096;

/// openraft's settings for a cluster of this name.
///
/// # Errors
/// The timing contradicts itself (heartbeat, shortest and longest timeout must grow in this order).
pub(crate) fn raft_config(
    cluster: &str,
    timing: &Timing,
    snapshots: &SnapshotPolicy,
) -> Result<openraft::Config, openraft::ConfigError> {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let election_max = millis(timing.election_max);
    openraft::Config {
        cluster_name: cluster.to_owned(),
        heartbeat_interval: millis(timing.heartbeat),
        election_timeout_min: millis(timing.election_min),
        election_timeout_max: election_max,
        install_snapshot_timeout: millis(timing.snapshot_timeout),
        max_payload_entries: MAX_PAYLOAD_ENTRIES,
        snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(snapshots.every.max(1)),
        max_in_snapshot_log_to_keep: snapshots.keep,
        // A learner counts as caught up within this distance; it must exceed the snapshot interval,
        // or a snapshot could not end the lag.
        replication_lag_threshold: snapshots.every.saturating_mul(2),
        // Purging is a delete per entry: not one queue item for every applied entry.
        purge_batch_size: (snapshots.keep / 10).clamp(1, 1_000),
        // Batches form by themselves while a sync is in flight.
        api_batch_linger_ms: 0,
        // A node that was cut off must not raise its term and depose a healthy leader.
        enable_pre_vote: Some(true),
        // A restored leader would keep its old first log id as the no-op: with the state in memory a
        // read index could serve the past, and the lease clock of the last process start is lost.
        enable_leader_restore: Some(false),
        // Under a partial partition a leader without a quorum would otherwise silence its followers'
        // election timers for ever (openraft #2080). The least that openraft accepts is twice the
        // longest election timeout.
        quorum_loss_probe_interval: Some(election_max.saturating_mul(2)),
        ..openraft::Config::default()
    }
    .validate()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_accepted_by_openraft() {
        let config = raft_config("regent", &Timing::default(), &SnapshotPolicy::default()).unwrap();
        assert_eq!(config.enable_pre_vote, Some(true));
        assert_eq!(config.enable_leader_restore, Some(false));
        assert!(config.install_snapshot_timeout > 60_000);
    }

    #[test]
    fn a_heartbeat_longer_than_the_election_is_refused() {
        let timing = Timing {
            heartbeat: Duration::from_secs(9),
            ..Timing::default()
        };
        assert!(raft_config("regent", &timing, &SnapshotPolicy::default()).is_err());
    }

    #[test]
    fn a_proposal_does_not_print_its_body() {
        let proposal = Proposal {
            at: 7,
            body: Bytes::from_static(b"secret"),
        };
        assert_eq!(format!("{proposal:?}"), "proposal at 7 of 6 bytes");
    }
}
