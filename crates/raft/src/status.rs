//! What a node knows of its cluster, for people and for the API.

use regent_types::{ClusterId, NodeId, Revision};
use serde::{Deserialize, Serialize};

/// The cluster as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterStatus {
    /// The cluster's identity; `None` until it is settled at the first start.
    pub cluster_id: Option<ClusterId>,
    /// The node that answers.
    pub node: NodeId,
    /// The leader, as far as this node knows.
    pub leader: Option<NodeId>,
    /// The current term.
    pub term: u64,
    /// The last operation applied on this node.
    pub revision: Revision,
    /// All members, by id.
    pub members: Vec<MemberStatus>,
    /// How this node is.
    pub health: Health,
    /// Wall clock minus cluster time in milliseconds, as the leader stamps it; see `alarm`.
    pub clock_offset_ms: i64,
    /// What a person must look at, if anything.
    pub alarms: Vec<Alarm>,
}

/// One member as the answering node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// The member.
    pub id: NodeId,
    /// Its part in consensus, as it last said itself.
    pub role: Role,
    /// Whether it has a vote, whether it can be reached or not.
    pub voter: bool,
    /// Base address of its HTTP API.
    pub http: String,
    /// Address of its peer transport.
    pub peer: String,
    /// Index of the last entry that it applied, as it last said.
    pub applied_index: u64,
    /// Digest of its state at its newest checkpoint, as `REVISION:DIGEST` in hexadecimal.
    pub digest: Option<String>,
    /// Whether the answering node has a live connection to it.
    pub reachable: bool,
    /// Milliseconds since it was last heard; 0 for the answering node, `None` when never.
    pub lag_ms: Option<u64>,
}

/// A member's part in consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Not started, or not heard of yet.
    Unknown,
    /// Receives the log and may not vote.
    Learner,
    /// Receives the log and votes.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

impl Role {
    /// The word for it in the API and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Learner => "learner",
            Self::Follower => "follower",
            Self::Candidate => "candidate",
            Self::Leader => "leader",
        }
    }
}

/// How a node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// It is not settled yet, or there is no leader; with what it waits for.
    Starting(String),
    /// It serves.
    Serving,
    /// It reaches no quorum: only stale reads are answered.
    NoQuorum,
    /// Its state differs from the majority's: it answers nothing.
    Diverged,
    /// It is stopping.
    Stopping,
    /// Its store or openraft failed, for this reason; the process should end.
    Failed(String),
}

/// Something that a person must look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Alarm {
    /// The leader's wall clock is this many milliseconds away from cluster time.
    Clock {
        /// Wall clock minus cluster time.
        offset_ms: i64,
    },
    /// The states of the members differ at this revision, and there is no majority to tell who is right.
    DigestSplit {
        /// Where they differ.
        revision: u64,
    },
    /// This member's state differs from the majority's at this revision.
    Diverged {
        /// The member.
        node: NodeId,
        /// Where it differs.
        revision: u64,
    },
}

/// What a node tells the others of itself, about once a second and outside the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) role: Role,
    pub(crate) term: u64,
    pub(crate) leader: Option<NodeId>,
    pub(crate) http: String,
    pub(crate) applied_index: u64,
    pub(crate) last_log_index: u64,
    /// Cluster time by this node's estimate.
    pub(crate) cluster_now: u64,
    pub(crate) clock_offset_ms: i64,
    pub(crate) health: Health,
    /// Recent digests of the state, oldest first.
    pub(crate) checkpoints: Vec<crate::digest::Checkpoint>,
}
