//! Who calls, and the two kinds of call: a [`Reading`] and a [`Writing`].
//!
//! The token is looked up in what this node has applied; one that it does not know may have been made
//! a moment ago through another node, so it is looked up again in a linearizable view before it is
//! refused. Reads check it again in the view that they answer from, writes in apply: a revoked token
//! sees and changes nothing, even through a node that lags.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, Request, Uri, header};
use bytes::Bytes;
use regent_raft::{Proposed, ReadError, View};
use regent_state::operation::Asked;
use regent_state::record::Role;
use regent_state::{Caller, Idempotency, Operation, Outcome, Rejection, Request as Proposal, State};
use regent_types::{AgentId, Code, Principal, Revision, TokenId, UserName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::body;
use super::idempotency;
use super::problem::{Failure, Result, not_serving};
use super::query::{Consistency, Read};
use crate::ids::secret_hash;
use crate::service::{Service, ServiceError};

/// The header that StreamSpace's agents send their key in.
const AGENT_KEY_HEADER: &str = "x-agent-api-key";
/// How long a stale read with `min_index` waits for this node to catch up, before the cluster is asked.
const LAG_PATIENCE: Duration = Duration::from_secs(2);
/// Longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 512;

/// A caller whose token is good.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// The token used.
    pub(crate) token: TokenId,
    /// For whom it speaks.
    pub(crate) principal: Principal,
    /// What they may do.
    pub(crate) role: Role,
}

impl Identity {
    /// Finds out who calls.
    pub(crate) async fn of(service: &Service, headers: &HeaderMap) -> Result<Self> {
        let hash = secret_hash(&presented(headers)?);
        let now = service.node().cluster_now();
        let mut found = find(&service.node().view().state, &hash, now);
        if found.is_none() {
            let view = service.read().await?;
            initialised(&view.state)?;
            found = find(&view.state, &hash, now);
        }
        let unknown = || Failure::new(Code::Unauthenticated, "the token is unknown, expired or revoked");
        let identity = found.ok_or_else(unknown)?;
        service.rates().admit(&identity)?;
        Ok(identity)
    }

    /// 403 below this role. Agents are below users.
    pub(super) fn require(&self, role: Role, what: &str) -> Result<()> {
        if self.role >= role {
            Ok(())
        } else {
            Err(Failure::forbidden(format!(
                "{what} needs the role {}",
                role.as_str()
            )))
        }
    }

    /// The user that calls; 403 for an agent.
    pub(super) fn user(&self) -> Result<&UserName> {
        match &self.principal {
            Principal::User(name) => Ok(name),
            Principal::Agent(_) => Err(Failure::forbidden("an agent's token cannot do this")),
        }
    }

    /// Whether it is this user.
    pub(super) fn is_user(&self, name: &UserName) -> bool {
        matches!(&self.principal, Principal::User(user) if user == name)
    }

    /// Whether it is this agent.
    pub(super) fn is_agent(&self, id: &AgentId) -> bool {
        matches!(&self.principal, Principal::Agent(agent) if agent == id)
    }

    /// The same caller as a later state knows it; 401 when its token is gone by then.
    pub(super) fn again(&self, state: &State, now: u64) -> Result<Self> {
        let (principal, role) = state.principal_of(&self.token, now).ok_or_else(|| {
            Failure::new(Code::Unauthenticated, "the token has expired or was revoked").at(state.revision())
        })?;
        Ok(Self {
            token: self.token.clone(),
            principal,
            role,
        })
    }
}

/// Before the cluster has an administrator it knows no token and no user at all: whoever asks may ask again.
pub(super) fn initialised(state: &State) -> Result<()> {
    if state.cluster_id().is_none() {
        return Err(not_serving("the cluster is not initialised yet"));
    }
    Ok(())
}

fn find(state: &State, hash: &[u8; 32], now: u64) -> Option<Identity> {
    let token = state.token_by_hash(hash)?.id.clone();
    let (principal, role) = state.principal_of(&token, now)?;
    Some(Identity {
        token,
        principal,
        role,
    })
}

/// The token that comes with a request.
pub(super) fn presented(headers: &HeaderMap) -> Result<String> {
    let missing = || {
        Failure::new(
            Code::Unauthenticated,
            "a token is needed: Authorization: Bearer TOKEN",
        )
    };
    let given = match headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let text = value.to_str().map_err(|_| missing())?;
            let (scheme, token) = text.split_once(' ').ok_or_else(missing)?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then(|| token.trim())
                .ok_or_else(missing)?
        }
        None => headers
            .get(AGENT_KEY_HEADER)
            .ok_or_else(missing)?
            .to_str()
            .map_err(|_| missing())?,
    };
    if given.is_empty() || given.len() > MAX_TOKEN_BYTES {
        return Err(missing());
    }
    Ok(given.to_owned())
}

impl FromRequestParts<Service> for Identity {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self> {
        Self::of(service, &parts.headers).await
    }
}

/// A call that reads.
pub(super) struct Reading {
    service: Service,
    caller: Identity,
}

/// What a read answers from.
pub(super) struct Snapshot {
    /// The state.
    pub(super) view: Arc<View>,
    /// The caller as this state knows it.
    pub(super) caller: Identity,
    /// Whether the leader may be asked for what is not replicated.
    pub(super) ask_leader: bool,
}

impl FromRequestParts<Service> for Reading {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self> {
        let caller = Identity::of(service, &parts.headers).await?;
        Ok(Self {
            service: service.clone(),
            caller,
        })
    }
}

impl Reading {
    /// Who calls, as this node knows them.
    pub(super) fn caller(&self) -> &Identity {
        &self.caller
    }

    /// Writes down what is asked, before it is done: see [`Writing::note`].
    pub(super) async fn note(&self, asked: Asked) -> Result<()> {
        note(&self.service, &self.caller, asked).await
    }

    /// The view that the caller asked for.
    pub(super) async fn view(&self, read: Read) -> Result<Snapshot> {
        let node = self.service.node();
        // A stale answer may be old, but never wrong: not from a state that differs from the majority's.
        if let Some(why) = node.out_of_service() {
            return Err(not_serving(why));
        }
        let fresh = match read.consistency {
            Consistency::Linearizable => Some(self.service.read().await?),
            Consistency::Stale => None,
        };
        let mut view = fresh.unwrap_or_else(|| node.view());
        if let Some(index) = read.min_index.filter(|index| *index > view.revision) {
            view = self.at_least(index, read.consistency).await?;
        }
        let caller = self.caller.again(&view.state, node.cluster_now())?;
        Ok(Snapshot {
            view,
            caller,
            ask_leader: read.consistency == Consistency::Linearizable,
        })
    }

    /// A view of at least this revision. Waits for a node that lags; a revision that the cluster does
    /// not have is not waited for: it is of another cluster, or was never given out.
    async fn at_least(&self, index: Revision, consistency: Consistency) -> Result<Arc<View>> {
        if consistency == Consistency::Stale {
            match self
                .service
                .node()
                .wait_for(index, Instant::now() + LAG_PATIENCE)
                .await
            {
                Err(ReadError::Timeout) => {}
                waited => return Ok(waited?),
            }
        }
        let view = self.service.read().await?;
        if view.revision < index {
            let message = format!("the cluster is at {} only", view.revision);
            return Err(Failure::field("min_index", message).at(view.revision));
        }
        Ok(view)
    }

    /// The node.
    pub(super) fn service(&self) -> &Service {
        &self.service
    }
}

impl Snapshot {
    /// The state.
    pub(super) fn state(&self) -> &State {
        &self.view.state
    }

    /// The revision it is of.
    pub(super) fn revision(&self) -> Revision {
        self.view.revision
    }
}

/// A call that writes, with its body unparsed.
pub(super) struct Writing {
    /// The node.
    pub(super) service: Service,
    /// Who calls, as this node knows them; apply decides.
    pub(super) caller: Identity,
    headers: HeaderMap,
    body: Bytes,
    pub(super) idempotency: Option<Idempotency>,
}

impl FromRequest<Service> for Writing {
    type Rejection = Failure;

    async fn from_request(request: Request<Body>, service: &Service) -> Result<Self> {
        // Who calls first: a body of a megabyte is not read for somebody unknown.
        let caller = Identity::of(service, request.headers()).await?;
        let headers = request.headers().clone();
        let (method, uri): (Method, Uri) = (request.method().clone(), request.uri().clone());
        let body = body::read(request).await?;
        let idempotency = if method == Method::POST {
            idempotency::of(&headers, &caller.principal, &uri, &body)?
        } else {
            None // PUT, PATCH and DELETE are idempotent or guarded by If-Match as they are
        };
        Ok(Self {
            service: service.clone(),
            caller,
            headers,
            body,
            idempotency,
        })
    }
}

impl Writing {
    /// The body.
    pub(super) fn json<T: Serialize + DeserializeOwned>(&self) -> Result<T> {
        body::parse(&self.headers, &self.body)
    }

    /// The body, or the default when there is none.
    pub(super) fn json_or_default<T: Serialize + DeserializeOwned + Default>(&self) -> Result<T> {
        body::parse_optional(&self.headers, &self.body)
    }

    /// The revision that `If-Match` names; `None` when it is absent or `*`.
    pub(super) fn if_match(&self) -> Result<Option<Revision>> {
        revision_of(&self.headers)
    }

    /// Writes in the caller's name and gives the outcome with its revision and whether it is the
    /// recorded one of an earlier request.
    pub(super) async fn propose(&self, operation: Operation) -> Result<Done> {
        let (rejection, revision) = match self.try_propose(operation).await? {
            Ok(done) => return Ok(done),
            Err(rejected) => rejected,
        };
        Err(Failure::from(rejection).at(revision))
    }

    /// Writes down what is asked, before it is done. Older members cannot read that; then the log of this node has it.
    pub(super) async fn note(&self, asked: Asked) -> Result<()> {
        note(&self.service, &self.caller, asked).await
    }

    /// The same for a caller that can make something of a rejection.
    pub(super) async fn try_propose(
        &self,
        operation: Operation,
    ) -> Result<std::result::Result<Done, (Rejection, Revision)>> {
        let request = Proposal {
            caller: Caller::Token(self.caller.token.clone()),
            idempotency: self.idempotency.clone(),
            operation,
        };
        Ok(Done::of(self.service.propose(request).await?))
    }
}

/// See [`Writing::note`].
async fn note(service: &Service, caller: &Identity, asked: Asked) -> Result<()> {
    tracing::info!(by = %caller.principal, ?asked, "asked");
    let proposal = Proposal {
        caller: Caller::Token(caller.token.clone()),
        idempotency: None,
        operation: Operation::Asked(asked),
    };
    match service.propose(proposal).await {
        Ok(proposed) => {
            let done =
                Done::of(proposed).map_err(|(rejection, revision)| Failure::from(rejection).at(revision))?;
            debug_assert!(matches!(done.outcome, Outcome::Done));
            Ok(())
        }
        Err(ServiceError::Level) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A write that was done.
pub(super) struct Done {
    /// At which revision.
    pub(super) revision: Revision,
    /// What came of it.
    pub(super) outcome: Outcome,
    /// Whether an earlier request with the same idempotency key did it.
    pub(super) replayed: bool,
}

impl Done {
    /// A rejection comes with its revision.
    pub(super) fn of(proposed: Proposed) -> std::result::Result<Self, (Rejection, Revision)> {
        let revision = proposed.revision;
        match proposed.applied {
            Ok(Outcome::Replayed(outcome)) => Ok(Self {
                revision,
                outcome: *outcome,
                replayed: true,
            }),
            Ok(outcome) => Ok(Self {
                revision,
                outcome,
                replayed: false,
            }),
            Err(rejection) => Err((rejection, revision)),
        }
    }

    /// For an outcome that the operation never has.
    pub(super) fn unexpected(&self) -> Failure {
        tracing::error!(outcome = ?self.outcome, revision = self.revision.0, "unexpected outcome");
        Failure::internal("the operation was done, but its outcome is not of the expected kind")
            .at(self.revision)
    }
}

/// The revision that `If-Match` names; `None` when it is absent or `*`.
pub(super) fn revision_of(headers: &HeaderMap) -> Result<Option<Revision>> {
    let Some(value) = headers.get(header::IF_MATCH) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let tag = text.strip_prefix("W/").unwrap_or(text);
    let tag = tag
        .strip_prefix('"')
        .and_then(|tag| tag.strip_suffix('"'))
        .unwrap_or(tag);
    tag.parse().map(Some).map_err(|_| {
        Failure::field(
            "If-Match",
            "must be the ETag of an earlier answer, such as \"42\", or *",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn with(name: &'static str, value: &str) -> Result<String> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        presented(&headers)
    }

    #[test]
    fn tokens_come_as_bearer_or_as_an_agents_key() {
        assert_eq!(with("authorization", "Bearer abc").unwrap(), "abc");
        assert_eq!(with("authorization", "bearer  abc ").unwrap(), "abc");
        assert_eq!(with("x-agent-api-key", "abc").unwrap(), "abc");
        for bad in ["", "Bearer", "Bearer ", "Basic YTpi", "abc"] {
            assert!(with("authorization", bad).is_err(), "{bad:?} was taken");
        }
        assert!(presented(&HeaderMap::new()).is_err());
    }
}
