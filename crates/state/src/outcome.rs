//! What comes back: outcomes and rejections. Both are replicated results, the same on every node.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use regent_types::{AgentId, CommandId, Epoch, SessionName, Token};

use crate::record::{Agent, ApiToken, Candidate, Command, Lease, Member, Session, Template, User};

/// What applying one operation gives.
pub type Applied = Result<Outcome, Rejection>;

/// What was done. Records are those after the operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done; nothing to show.
    Done,
    /// A session.
    Session(Arc<Session>),
    /// A session and the command that acts on it; no command when nothing is left to do.
    SessionAction {
        /// The session.
        session: Arc<Session>,
        /// The command.
        command: Option<CommandId>,
    },
    /// An agent.
    Agent {
        /// The record.
        agent: Arc<Agent>,
        /// Whether it is new.
        created: bool,
    },
    /// A connection was taken up.
    Connected {
        /// The connection.
        epoch: Epoch,
        /// The token of `agent/{id}` that the gateway holds for it.
        token: Option<Token>,
    },
    /// A command.
    Command(Arc<Command>),
    /// A lease that was granted.
    Lease(Arc<Lease>),
    /// A template.
    Template {
        /// The record.
        template: Arc<Template>,
        /// Whether it is new.
        created: bool,
    },
    /// A user.
    User(Arc<User>),
    /// An API token; the secret is known only to who made it.
    ApiToken(Arc<ApiToken>),
    /// How many records were changed: leases expired, sessions placed, records pruned.
    Count(u64),
    /// Nothing was changed, since what was reported or decided is out of date.
    Stale,
    /// The recorded outcome of an earlier request with the same idempotency key.
    Replayed(Box<Outcome>),
    /// The lease is held: this candidate waits for it.
    Queued(Arc<Candidate>),
    /// A member of the cluster.
    Member(Arc<Member>),
}

/// What a name that was not found would have named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Noun {
    /// A session.
    Session,
    /// An agent.
    Agent,
    /// A command.
    Command,
    /// A lease.
    Lease,
    /// A template.
    Template,
    /// A user.
    User,
    /// An API token.
    Token,
    /// A member of the cluster.
    Member,
}

/// Why nothing was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    /// The caller's token is unknown, expired or revoked.
    #[error("the token is unknown, expired or revoked")]
    Unauthenticated,
    /// The caller may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// No such record.
    #[error("{noun:?} {name:?} does not exist")]
    NotFound {
        /// Of what kind.
        noun: Noun,
        /// What was asked for.
        name: String,
    },
    /// There is one of that name.
    #[error("{noun:?} {name:?} exists already")]
    AlreadyExists {
        /// Of what kind.
        noun: Noun,
        /// Its name.
        name: String,
    },
    /// The record's state does not allow it.
    #[error("{0}")]
    WrongState(String),
    /// The record has changed since.
    #[error("the record has changed: it is at {current}, not at {expected}")]
    Changed {
        /// What the caller saw.
        expected: u64,
        /// What it is at.
        current: u64,
    },
    /// A field cannot be as it is.
    #[error("{field}: {message}")]
    Invalid {
        /// The field of the request's body.
        field: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The user's quota would be exceeded.
    #[error("{0}")]
    QuotaExceeded(String),
    /// No agent can take the session; why, agent by agent.
    #[error("no agent can take the session now")]
    NoAgents(Vec<(AgentId, String)>),
    /// The lease is held.
    #[error("the lease is held by {holder:?} under token {token}")]
    LeaseHeld {
        /// Who holds it.
        holder: String,
        /// Under which token.
        token: Token,
    },
    /// The lease is not held under this token.
    #[error("the lease is not held under this token")]
    LeaseLost,
    /// The idempotency key was used with another body.
    #[error("the idempotency key was used before with another body")]
    IdempotencyKeyReused,
    /// The report comes from a connection that is not the current one, or from one that does not lead.
    #[error("the connection was superseded")]
    Superseded,
    /// A deciding leadership has ended before its decision was written.
    #[error("decided under another leadership")]
    WrongLeadership,
    /// The very first operation is missing, or came twice.
    #[error("{0}")]
    Identity(String),
    /// A session's name was taken by another one at the same moment; make another name.
    #[error("session {0} exists already")]
    NameTaken(SessionName),
    /// A queue is full just now.
    #[error("{0}")]
    Busy(String),
    /// The cluster was restored a moment ago, and who held a lease before may still act under it.
    #[error(
        "this cluster was restored, and whoever held leases of the cluster before it may act for another {} s: \
         until then none is granted",
        for_ms.div_ceil(1_000)
    )]
    LeasesHeldBack {
        /// Until when, by the cluster's clock.
        until: u64,
        /// How long that is.
        for_ms: u64,
    },
}
