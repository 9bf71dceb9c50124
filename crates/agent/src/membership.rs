//! Which cluster a data folder belongs to.
//!
//! A node that was restored from an old backup, or belongs to another cluster, must not tell an agent what to
//! stop. Invariant: the cluster of a data folder never changes, and its revision base only grows.

use regent_types::ClusterId;
use regent_types::frame::Welcome;
use serde::{Deserialize, Serialize};

/// The cluster that a data folder belongs to, and the newest revision base seen of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The base.
    pub base: u64,
}

/// What is to be thought of a node.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is of the cluster as it is known.
    Known,
    /// It is to be believed once this is remembered.
    Remember(Membership),
    /// It has an older base than this.
    Older(u64),
    /// It is of another cluster than this.
    Other(ClusterId),
}

/// Compares what a node says of its cluster with what is known.
pub(crate) fn judge(ours: Option<&Membership>, welcome: &Welcome) -> Verdict {
    match ours {
        Some(ours) if ours.cluster_id != welcome.cluster_id => Verdict::Other(ours.cluster_id.clone()),
        Some(ours) if ours.base > welcome.base => Verdict::Older(ours.base),
        Some(ours) if ours.base == welcome.base => Verdict::Known,
        Some(_) | None => Verdict::Remember(Membership {
            cluster_id: welcome.cluster_id.clone(),
            base: welcome.base,
        }),
    }
}
