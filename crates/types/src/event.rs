//! Events: what changed, in the order of the log.

use serde::{Deserialize, Serialize};

use crate::{Revision, Time};

/// One event, the same on every node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// `REVISION.N`: the N-th event of that revision, from 0.
    pub id: String,
    /// The revision that caused it.
    pub revision: Revision,
    /// When, by the cluster's clock.
    pub time: Time,
    /// What happened, such as `session.running` or `agent.offline`.
    pub kind: String,
    /// The name of what it happened to.
    pub subject: String,
    /// Who caused it, such as `user:olga`; `system` for the cluster itself.
    #[serde(default)]
    pub by: String,
    /// Why, for people, where there is more to say than the kind does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The record after it, as its own GET would show it, but without what depends on other records (an agent's
    /// `activeSessions`, a token's `role`) or is not replicated; `null` when it is gone.
    pub record: serde_json::Value,
}
