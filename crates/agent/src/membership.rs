//! Which cluster a data folder belongs to.
//!
//! A node that was restored from an old backup, or belongs to another cluster, must not tell an agent what to
//! stop. Invariant: the cluster of a data folder changes only to one that was made of it, by restore or recovery, and
//! its revision base only grows. So whoever has followed obeys the old cluster no more, even if that is still there.

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
    /// The first cluster of its line, unless it is that one itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<ClusterId>,
}

impl Membership {
    /// The first cluster of its line: what runs here is named after it, whatever was restored since.
    pub fn origin(&self) -> &ClusterId {
        self.origin.as_ref().unwrap_or(&self.cluster_id)
    }
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
    let former = &welcome.former_cluster_ids;
    match ours {
        Some(ours) if ours.cluster_id != welcome.cluster_id => {
            if former.contains(&ours.cluster_id) && welcome.base > ours.base {
                return Verdict::Remember(Membership {
                    cluster_id: welcome.cluster_id.clone(),
                    base: welcome.base,
                    origin: Some(ours.origin().clone()),
                });
            }
            Verdict::Other(ours.cluster_id.clone())
        }
        Some(ours) if ours.base > welcome.base => Verdict::Older(ours.base),
        Some(ours) if ours.base == welcome.base => Verdict::Known,
        Some(_) | None => Verdict::Remember(Membership {
            cluster_id: welcome.cluster_id.clone(),
            base: welcome.base,
            origin: ours.map_or_else(|| former.last().cloned(), |ours| ours.origin.clone()),
        }),
    }
}
