//! Who acts, and what they may do. Looked up in apply, under the state as it is at that revision:
//! so a token that was revoked changes nothing, even through a node that has not heard of it.

use std::fmt;

use regent_types::{AgentId, NodeId, Principal, TokenId, UserName};

use crate::operation::Caller;
use crate::outcome::Rejection;
use crate::record::Role;
use crate::state::State;

/// Who acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Actor {
    /// A user, by a token.
    User {
        name: UserName,
        role: Role,
        token: TokenId,
    },
    /// An agent, by a token of its own.
    Agent { id: AgentId, token: TokenId },
    /// The cluster itself: gateways and reconcilers.
    Node(NodeId),
}

impl Actor {
    /// Looks up who that is, as of `state`.
    pub(crate) fn resolve(state: &State, caller: &Caller) -> Result<Self, Rejection> {
        match caller {
            Caller::Node(id) => Ok(Self::Node(*id)),
            Caller::Token(token) => match state.principal_of(token, state.now) {
                Some((Principal::User(name), role)) => Ok(Self::User {
                    name,
                    role,
                    token: token.clone(),
                }),
                Some((Principal::Agent(id), _)) => Ok(Self::Agent {
                    id,
                    token: token.clone(),
                }),
                None => Err(Rejection::Unauthenticated),
            },
        }
    }

    /// The user or agent; a node is neither.
    pub(crate) fn principal(&self) -> Option<Principal> {
        match self {
            Self::User { name, .. } => Some(Principal::User(name.clone())),
            Self::Agent { id, .. } => Some(Principal::Agent(id.clone())),
            Self::Node(_) => None,
        }
    }

    /// Whether this is the cluster itself, or somebody with at least that role.
    pub(crate) fn is_at_least(&self, role: Role) -> bool {
        match self {
            Self::User { role: own, .. } => *own >= role,
            Self::Agent { .. } => role == Role::Agent,
            Self::Node(_) => true,
        }
    }

    /// Refuses all but the cluster itself and those with at least that role.
    pub(crate) fn require(&self, role: Role, what: &str) -> Result<(), Rejection> {
        if self.is_at_least(role) {
            return Ok(());
        }
        Err(Rejection::Forbidden(format!(
            "to {what} takes the role {}; {self} does not have it",
            role.as_str()
        )))
    }

    /// Refuses all but the cluster itself, operators and admins.
    pub(crate) fn need_operator(&self, what: &str) -> Result<(), Rejection> {
        self.require(Role::Operator, what)
    }

    /// Refuses all but the cluster itself.
    pub(crate) fn require_node(&self) -> Result<(), Rejection> {
        match self {
            Self::Node(_) => Ok(()),
            Self::User { .. } | Self::Agent { .. } => Err(Rejection::Forbidden(
                "only the cluster itself does this".to_owned(),
            )),
        }
    }

    /// Refuses all but that user and operators: for what belongs to a user.
    pub(crate) fn require_user(&self, owner: &UserName, what: &str) -> Result<(), Rejection> {
        match self {
            Self::User { name, .. } if name == owner => Ok(()),
            _ => self.require(Role::Operator, what),
        }
    }

    /// Refuses all but that agent and operators: for what belongs to an agent.
    pub(crate) fn require_agent(&self, agent: &AgentId, what: &str) -> Result<(), Rejection> {
        match self {
            Self::Agent { id, .. } if id == agent => Ok(()),
            _ => self.require(Role::Operator, what),
        }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User { name, .. } => write!(f, "user:{name}"),
            Self::Agent { id, .. } => write!(f, "agent:{id}"),
            Self::Node(_) => f.write_str("system"),
        }
    }
}
