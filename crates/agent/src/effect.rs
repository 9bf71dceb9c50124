//! What the session hands back to be carried out, and why it may end. Effects are carried out in their order.

use regent_types::ClusterId;
use regent_types::Token;
use regent_types::frame::{AgentFrame, CommandFrame};

use crate::journal::RunKey;
use crate::membership::Membership;
use crate::runtime::SessionRef;

/// Something to be carried out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send a frame.
    Send(Box<AgentFrame>),
    /// Send a WebSocket ping, so that there is traffic to listen for.
    Ping,
    /// Make this durable before anything that follows.
    Remember(Membership),
    /// Do it; then [`crate::session::ControlSession::finished`].
    Begin(Box<CommandFrame>),
    /// Raise the fence to this token, list the runtime and recover the journal; then
    /// [`crate::session::ControlSession::taken_over`] or [`crate::session::ControlSession::takeover_failed`].
    TakeOver(Token),
    /// This outcome will not be asked for any more.
    Forget(RunKey),
    /// Remove what is left of a session that ended.
    Remove(SessionRef),
    /// Close the connection and make another one, at another node if there is one.
    Reconnect(String),
    /// Close the connection and end.
    End(Fatal),
}

/// Why an agent must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// Two processes would take turns for ever otherwise.
    #[error("another process connected as this agent: {reason}")]
    Superseded {
        /// What the control plane said.
        reason: String,
    },
    /// Its cluster would be told to stop what another cluster wants.
    #[error(
        "these servers are of cluster {found}, but this data folder belongs to cluster {ours}; use another data folder"
    )]
    OtherCluster {
        /// The cluster of the data folder.
        ours: ClusterId,
        /// The cluster of the servers.
        found: ClusterId,
    },
}
