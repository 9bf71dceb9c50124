//! Why a node could not do what it was asked, and what the caller may conclude from it.
//!
//! For a write one question decides everything: may it still happen? [`ProposeError::is_unknown`] answers
//! it, and it is answered once, here, so that 503 and 504 are never confused above.

use std::path::PathBuf;

use regent_types::NodeId;

/// Why a write was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No leader became known before the deadline. Never appended.
    #[error("no leader known; reachable: {}", list(reachable))]
    NoLeader {
        /// Members that this node reaches, itself included.
        reachable: Vec<NodeId>,
    },
    /// A quorum is known to be out of reach. Never appended.
    #[error("no quorum; reachable: {}", list(reachable))]
    NoQuorum {
        /// Members that this node reaches, itself included.
        reachable: Vec<NodeId>,
    },
    /// Too many proposals wait already. Never appended.
    #[error("too many writes are waiting")]
    Busy,
    /// The encoded operation is too large to be replicated. Never appended.
    #[error("the operation takes {size} bytes encoded, {limit} are allowed")]
    TooLarge {
        /// Bytes of the encoded operation.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// It was handed over and no answer came: it may be done, it may still happen, or neither.
    #[error("the outcome of the write is unknown")]
    OutcomeUnknown,
    /// This node is stopping, failed, or differs from the majority. Never appended.
    #[error("this node does not serve: {0}")]
    Stopped(String),
}

impl ProposeError {
    /// Whether the write may have happened or may still happen. All others certainly did not and will not.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::OutcomeUnknown)
    }

    /// Whether the same call may succeed a little later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoLeader { .. } | Self::NoQuorum { .. } | Self::Busy | Self::Stopped(_) => true,
            Self::TooLarge { .. } | Self::OutcomeUnknown => false,
        }
    }
}

/// Why a linearizable read was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader became known before the deadline, or for `confirm`: this node does not lead.
    #[error("no leader known; reachable: {}", list(reachable))]
    NoLeader {
        /// Members that this node reaches, itself included.
        reachable: Vec<NodeId>,
    },
    /// A quorum is known to be out of reach.
    #[error("no quorum; reachable: {}", list(reachable))]
    NoQuorum {
        /// Members that this node reaches, itself included.
        reachable: Vec<NodeId>,
    },
    /// The leader answered, but this node did not apply that far before the deadline; or no round ended.
    #[error("the read did not finish in time")]
    Timeout,
    /// Too many reads wait already.
    #[error("too many reads are waiting")]
    Busy,
    /// This node is stopping, failed, or differs from the majority.
    #[error("this node does not serve: {0}")]
    Stopped(String),
}

/// Why a call to another node was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The node is not a known member.
    #[error("node {0} is not a member")]
    UnknownNode(NodeId),
    /// There is no connection to the node; the call was not sent.
    #[error("node {0} is not reachable")]
    Unreachable(NodeId),
    /// The call was sent and no answer came: the connection broke or the deadline passed.
    #[error("no answer from node {0}")]
    NoAnswer(NodeId),
    /// Too many calls wait already; not sent.
    #[error("too many calls are waiting")]
    Busy,
    /// The body is too large for one frame; not sent.
    #[error("the call takes {size} bytes, {limit} are allowed")]
    TooLarge {
        /// Bytes of the body.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The other node's service refused it, in its words.
    #[error("{0}")]
    Refused(String),
}

/// Why a transfer of the leadership did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Only the leader can hand the leadership over.
    #[error("this node does not lead")]
    NotLeader,
    /// No other voter is reachable and has all entries; a transfer would leave nobody leading.
    #[error("no other voter is caught up")]
    NoCandidate,
    /// The chosen node did not take over before the deadline.
    #[error("the leadership was not taken over in time")]
    Timeout,
    /// This node is stopping or failed.
    #[error("this node does not serve: {0}")]
    Stopped(String),
}

/// Why the members of consensus were not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Only the leader can change them.
    #[error("this node does not lead")]
    NotLeader,
    /// It was begun; whether it is done will show.
    #[error("the change was begun, but not finished in time")]
    Unknown,
    /// It was not begun, for this reason.
    #[error("{0}")]
    Refused(String),
}

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The members given do not name this node.
    #[error("node {node} is not among the members {members}")]
    NotAMember {
        /// This node's id.
        node: NodeId,
        /// The list as given.
        members: String,
    },
    /// The data folder belongs to another node id.
    #[error(
        "{} belongs to node {found}, but this process was started as node {given}: start it as node {found}, \
         or give node {given} a data folder of its own",
        data.display()
    )]
    NodeIdChanged {
        /// The data folder.
        data: PathBuf,
        /// The id that the folder was written under.
        found: NodeId,
        /// The id given now.
        given: NodeId,
    },
    /// The peer port could not be opened.
    #[error("cannot listen for peers")]
    Listen(#[source] std::io::Error),
    /// The store could not be opened, or holds damaged data.
    #[error("cannot open the store")]
    Storage(#[from] crate::log::LogError),
    /// No snapshot can be used, and the log alone does not reach back far enough.
    #[error("cannot read the snapshots")]
    Snapshots(#[from] crate::snapshot::SnapshotError),
    /// Timeouts or snapshot settings contradict themselves.
    #[error("the settings contradict themselves: {0}")]
    Config(String),
    /// openraft refused to start.
    #[error("consensus did not start: {0}")]
    Raft(String),
}

fn list(nodes: &[NodeId]) -> String {
    if nodes.is_empty() {
        return "nobody".to_owned();
    }
    let names: Vec<String> = nodes.iter().map(|node| format!("node {node}")).collect();
    names.join(", ")
}
