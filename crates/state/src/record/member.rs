//! A member of the cluster: a node, where it is, and which data folder it votes from.

use std::fmt;

use serde::{Deserialize, Serialize};

use regent_types::{NodeId, Revision};

/// A node that is or was a member.
///
/// The record of one that was removed stays, so that its id is never used again: whoever votes under it would be
/// another node to those who have not heard of the removal. It is a hundred bytes for each machine that ever was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// The random name of its data folder. A folder of another name under this id has forgotten its votes.
    pub incarnation: [u8; 16],
    /// `host:port` of its peer transport.
    pub peer: String,
    /// Base address of its REST API.
    pub http: String,
    /// SHA-256 of the join token that admitted it; `None` for those that founded the cluster.
    pub admitted_by: Option<[u8; 32]>,
    /// When it became a member, by the cluster's clock.
    pub since: u64,
    /// When it was removed, if it was.
    pub removed_at: Option<u64>,
    /// The revision of its last change.
    pub changed: Revision,
}

impl Member {
    /// Whether it is to be part of the cluster.
    pub fn is_live(&self) -> bool {
        self.removed_at.is_none()
    }
}

/// What a join token admits, once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum JoinScope {
    /// A node.
    Node,
    /// An agent whose id is this, or begins with it when it ends with `*`.
    Agent(String),
}

impl JoinScope {
    /// Whether an agent of this id may be admitted.
    pub fn admits_agent(&self, id: &str) -> bool {
        match self {
            Self::Node => false,
            Self::Agent(pattern) => match pattern.strip_suffix('*') {
                Some(prefix) => id.starts_with(prefix),
                None => id == pattern,
            },
        }
    }

    /// Whether it is for whatever begins alike, and not for one whose name is known.
    pub fn is_pattern(&self) -> bool {
        matches!(self, Self::Agent(pattern) if pattern.ends_with('*'))
    }
}

impl fmt::Display for JoinScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Agent(pattern) => write!(f, "agent:{pattern}"),
        }
    }
}
