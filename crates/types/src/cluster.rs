//! The cluster as its operators see it.

use serde::{Deserialize, Serialize};

use crate::{ClusterId, NodeId, Revision, Time};

/// Answer to `GET /cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// The identity of the cluster; absent before its first start is through.
    pub cluster_id: Option<ClusterId>,
    /// The clusters that this one was restored or recovered from, the latest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_cluster_ids: Vec<ClusterId>,
    /// Until when no lease is granted and no agent connects, because the cluster was just restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leases_held_back_until: Option<Time>,
    /// The node that answers.
    pub node: NodeId,
    /// Who leads, if known.
    pub leader: Option<NodeId>,
    /// The term of that.
    pub term: u64,
    /// The feature level: what all members have agreed to do.
    #[serde(default)]
    pub feature_level: u32,
    /// All members.
    pub members: Vec<Member>,
    /// What is wrong and what to do about it, in words; empty when all is well.
    #[serde(default)]
    pub findings: Vec<String>,
}

/// One member, as the node that answers sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// `leader`, `follower`, `candidate` or `learner`; `unknown` when it cannot be reached.
    pub role: String,
    /// Whether it has a vote.
    #[serde(default)]
    pub voter: bool,
    /// Since when it is a member; absent before the cluster has written that down, a second after its first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Where its REST API is.
    pub http: String,
    /// Where its peer port is.
    pub peer: String,
    /// The revision that it has applied.
    pub applied_index: Option<Revision>,
    /// Its state's digest at the last common checkpoint, in hexadecimal.
    pub digest: Option<String>,
    /// Whether this node hears it.
    pub reachable: bool,
    /// Milliseconds since this node last heard it; 0 for itself.
    pub lag_ms: Option<u64>,
    /// The version of its program; absent when it did not say lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Bytes free where its data is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free: Option<u64>,
    /// Bytes there in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_total: Option<u64>,
}

/// Body of `POST /cluster/members`, which a new node sends with a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Join {
    /// Its id: 1 and up, never used before.
    pub node_id: NodeId,
    /// The random name of its data folder: 32 hexadecimal digits.
    pub incarnation: String,
    /// `host:port` of its peer port.
    pub peer: String,
    /// Base address of its REST API.
    pub http: String,
}

/// Answer to `POST /cluster/members`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Joined {
    /// The identity of the cluster.
    pub cluster_id: ClusterId,
    /// The revision of the admission.
    pub revision: Revision,
    /// All members, the new one included.
    pub members: Vec<JoinedMember>,
    /// What the members prove to each other that they know.
    pub cluster_secret: String,
}

/// A member, as the new node has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct JoinedMember {
    /// Its id.
    pub id: NodeId,
    /// The name of its data folder.
    pub incarnation: String,
    /// Where its peer port is.
    pub peer: String,
    /// Where its REST API is.
    pub http: String,
}

/// Body of `POST /cluster/transfer`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Transfer {
    /// Who shall lead; without it any voter that has caught up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<NodeId>,
}

/// Answer to `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// The version of the program.
    pub version: String,
    /// The version of the agent protocol.
    pub protocol: u32,
    /// The feature level that this program supports.
    pub feature_level: u32,
}

/// A revision in an answer's header, `X-Regent-Index`.
pub const INDEX_HEADER: &str = "x-regent-index";
/// The id of a request, `X-Request-Id`.
pub const REQUEST_ID_HEADER: &str = "x-request-id";
/// The revision type of [`INDEX_HEADER`].
pub type Index = Revision;
