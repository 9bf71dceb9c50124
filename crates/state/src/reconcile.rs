//! What an agent runs against what the state says.

use regent_types::AgentId;

use crate::operation::AgentConnected;
use crate::txn::Txn;

/// Called by `agents::connected` once the connection is in and leads: re-arms deadlines and, where
/// the agent says what it runs, adopts, restarts or removes.
pub(crate) fn agent_connected(_txn: &mut Txn<'_>, _op: &AgentConnected) {}

/// Called once the last connection of an agent is gone: deadlines stop, reasons say so.
pub(crate) fn agent_offline(_txn: &mut Txn<'_>, _agent: &AgentId, _reason: &str) {}

/// Called before an agent is forgotten: its sessions are lost, its open commands fail.
pub(crate) fn agent_removed(_txn: &mut Txn<'_>, _agent: &AgentId) {}
