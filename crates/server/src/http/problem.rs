//! Errors on their way out: every one becomes a [`Problem`] with a stable code.
//!
//! A [`Failure`] carries the document unrendered in the answer's extensions; `observe` renders it, since
//! only there the id of the request is known. So no error can leave without one.
//!
//! Invariant: 503 is said only of what certainly did not happen, 504 of what may have.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use regent_raft::{ProposeError, ReadError};
use regent_state::{Noun, Rejection};
use regent_types::problem::cut;
use regent_types::{Code, NodeId, Problem, Revision, Time};
use serde_json::json;

use crate::service::ServiceError;

/// Seconds after which a caller may try again when a leader is missing: elections take less.
const RETRY_AFTER_ELECTION: u64 = 1;
/// Seconds after which a caller may try again when a majority is missing: somebody has to act.
const RETRY_AFTER_QUORUM: u64 = 2;
/// Seconds after which a caller may try again when a queue was full.
const RETRY_AFTER_BUSY: u64 = 1;
/// Seconds after which a caller may try again when no agent had room, or one's queue was full.
const RETRY_AFTER_AGENTS: u64 = 5;

/// Most bytes of each text of a refusal: it quotes what it refuses, which may be a whole body.
const MAX_TEXT: usize = 1_000;

/// A request that was not done, or may not have been.
#[derive(Debug)]
pub(crate) struct Failure {
    problem: Box<Problem>,
    retry_after: Option<u64>,
    revision: Option<Revision>,
}

/// The result of a handler.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// What went wrong.
    pub(super) fn code(&self) -> Code {
        self.problem.code
    }

    /// A problem of this code.
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Self {
        Problem::new(code, detail).into()
    }

    /// 400, naming one field of the body or parameter of the query or path.
    pub(crate) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        let (field, message) = (field.into(), message.into());
        Problem::new(Code::InvalidRequest, format!("{field}: {message}"))
            .field(field, message)
            .into()
    }

    /// 403.
    pub(crate) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(Code::Forbidden, detail)
    }

    /// 404 for a record.
    pub(crate) fn not_found(noun: Noun, name: impl std::fmt::Display) -> Self {
        Self::new(
            not_found_code(noun),
            format!("{} {name} does not exist", noun_word(noun)),
        )
    }

    /// 500: a fault of our own, which has been logged where it was found.
    pub(crate) fn internal(detail: impl Into<String>) -> Self {
        Self::new(Code::Internal, detail)
    }

    /// 429.
    pub(crate) fn busy(detail: impl Into<String>, retry_after_seconds: u64) -> Self {
        let mut failure = Self::new(Code::Busy, detail);
        failure.retry_after = Some(retry_after_seconds.max(1));
        failure
    }

    /// What is answered.
    pub(super) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The revision that decided it, for `X-Regent-Index`.
    pub(crate) fn at(mut self, revision: Revision) -> Self {
        self.revision = Some(revision);
        self
    }
}

impl From<Problem> for Failure {
    fn from(mut problem: Problem) -> Self {
        cut(&mut problem.detail, MAX_TEXT);
        for error in &mut problem.fields {
            cut(&mut error.field, MAX_TEXT);
            cut(&mut error.message, MAX_TEXT);
        }
        Self {
            problem: Box::new(problem),
            retry_after: None,
            revision: None,
        }
    }
}

/// What `observe` renders once it knows the id of the request.
#[derive(Clone)]
pub(super) struct Unrendered(pub(super) Box<Problem>);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.problem.code == Code::Unauthenticated {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(revision) = self.revision {
            super::reply::set_index(&mut response, revision);
        }
        response.extensions_mut().insert(Unrendered(self.problem));
        response
    }
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        let text = rejection.to_string();
        let problem = match rejection {
            Rejection::Unauthenticated => Problem::new(Code::Unauthenticated, text),
            Rejection::Forbidden(why) => Problem::new(Code::Forbidden, why),
            Rejection::NotFound { noun, name } => return Self::not_found(noun, name),
            Rejection::AlreadyExists { noun, name } => Problem::new(
                Code::AlreadyExists,
                format!("{} {name} exists already", noun_word(noun)),
            ),
            Rejection::WrongState(why) => Problem::new(Code::WrongState, why),
            Rejection::Changed { expected, current } => Problem::new(Code::Changed, text)
                .with("expected", expected)
                .with("current", current),
            Rejection::Invalid { field, message } => return Self::field(field, message),
            Rejection::QuotaExceeded(why) => Problem::new(Code::QuotaExceeded, why),
            Rejection::NoAgents(agents) => {
                let detail = if agents.is_empty() {
                    "no agent is registered".to_owned()
                } else {
                    "no agent can take the session now; `agents` says why, agent by agent".to_owned()
                };
                let reasons: Vec<_> = agents
                    .into_iter()
                    .map(|(id, reason)| json!({ "agentId": id, "reason": reason }))
                    .collect();
                let mut failure: Self = Problem::new(Code::NoAgentsAvailable, detail)
                    .with("agents", reasons)
                    .into();
                failure.retry_after = Some(RETRY_AFTER_AGENTS);
                return failure;
            }
            Rejection::LeaseHeld { holder, token } => Problem::new(Code::LeaseHeld, text)
                .with("holder", holder)
                .with("token", token.0),
            Rejection::LeaseLost => Problem::new(Code::LeaseLost, text),
            Rejection::Busy(why) => return Self::busy(why, RETRY_AFTER_AGENTS),
            Rejection::LeasesHeldBack { until, for_ms } => {
                let until = Time(until).to_string();
                let mut failure: Self = Problem::new(Code::LeasesHeldBack, text)
                    .with("until", until)
                    .into();
                failure.retry_after = Some(for_ms.div_ceil(1_000).max(1));
                return failure;
            }
            Rejection::IdempotencyKeyReused => Problem::new(Code::IdempotencyKeyReused, text),
            // The rest answers gateways and reconcilers; a REST call meets it only by a fault of ours.
            Rejection::Superseded
            | Rejection::WrongLeadership
            | Rejection::Identity(_)
            | Rejection::NameTaken(_) => Problem::new(Code::WrongState, text),
        };
        problem.into()
    }
}

impl From<ProposeError> for Failure {
    fn from(error: ProposeError) -> Self {
        let text = error.to_string();
        match error {
            ProposeError::NoLeader { reachable } => no_leader(text, &reachable),
            ProposeError::NoQuorum { reachable } => no_quorum(text, &reachable),
            ProposeError::Busy => Self::busy(text, RETRY_AFTER_BUSY),
            ProposeError::TooLarge { .. } => Self::new(Code::TooLarge, text),
            ProposeError::OutcomeUnknown => Self::new(
                Code::OutcomeUnknown,
                "the write was handed over and no answer came: it may be done or not; repeat it with the same \
                 Idempotency-Key",
            ),
            ProposeError::Stopped(_) => not_serving(text),
        }
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        let text = error.to_string();
        match error {
            ReadError::NoLeader { reachable } => no_leader(text, &reachable),
            ReadError::NoQuorum { reachable } => no_quorum(text, &reachable),
            ReadError::Busy => Self::busy(text, RETRY_AFTER_BUSY),
            ReadError::Timeout | ReadError::Stopped(_) => not_serving(text),
        }
    }
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Propose(error) => error.into(),
            ServiceError::Read(error) => error.into(),
            ServiceError::Level => Self::new(Code::WrongState, error.to_string()),
        }
    }
}

/// 503 of a node that does not serve, or not yet.
pub(super) fn not_serving(detail: impl Into<String>) -> Failure {
    let mut failure = Failure::new(Code::NotServing, detail);
    failure.retry_after = Some(RETRY_AFTER_ELECTION);
    failure
}

fn no_leader(detail: String, reachable: &[NodeId]) -> Failure {
    let mut failure: Failure = Problem::new(Code::NoLeader, detail)
        .with("reachable", ids(reachable))
        .into();
    failure.retry_after = Some(RETRY_AFTER_ELECTION);
    failure
}

fn no_quorum(detail: String, reachable: &[NodeId]) -> Failure {
    let mut failure: Failure = Problem::new(Code::NoQuorum, detail)
        .with("reachable", ids(reachable))
        .into();
    failure.retry_after = Some(RETRY_AFTER_QUORUM);
    failure
}

fn ids(nodes: &[NodeId]) -> Vec<u64> {
    nodes.iter().map(|node| node.0).collect()
}

fn not_found_code(noun: Noun) -> Code {
    match noun {
        Noun::Session => Code::SessionNotFound,
        Noun::Agent => Code::AgentNotFound,
        Noun::Command => Code::CommandNotFound,
        Noun::Lease => Code::LeaseNotFound,
        Noun::Template => Code::TemplateNotFound,
        Noun::User => Code::UserNotFound,
        Noun::Token => Code::TokenNotFound,
        Noun::Member => Code::MemberNotFound,
    }
}

fn noun_word(noun: Noun) -> &'static str {
    match noun {
        Noun::Session => "session",
        Noun::Agent => "agent",
        Noun::Command => "command",
        Noun::Lease => "lease",
        Noun::Template => "template",
        Noun::User => "user",
        Noun::Token => "token",
        Noun::Member => "member",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_types::{AgentId, Token};

    fn document(failure: Failure) -> (Response, Problem) {
        let response = failure.into_response();
        let problem = response
            .extensions()
            .get::<Unrendered>()
            .unwrap()
            .0
            .as_ref()
            .clone();
        (response, problem)
    }

    #[test]
    fn a_refused_placement_says_why_agent_by_agent() {
        let dev = AgentId::new("dev").unwrap();
        let (response, problem) = document(Rejection::NoAgents(vec![(dev, "offline".to_owned())]).into());
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
        assert_eq!(
            problem.extra["agents"],
            json!([{ "agentId": "dev", "reason": "offline" }])
        );
    }

    #[test]
    fn a_held_lease_names_holder_and_token() {
        let (response, problem) = document(
            Rejection::LeaseHeld {
                holder: "h".to_owned(),
                token: Token(7),
            }
            .into(),
        );
        assert_eq!(response.status(), 409);
        assert_eq!(
            (&problem.extra["holder"], &problem.extra["token"]),
            (&json!("h"), &json!(7))
        );
    }

    #[test]
    fn only_an_unknown_outcome_is_504() {
        let reachable = vec![NodeId(1)];
        for (error, status) in [
            (
                ProposeError::NoLeader {
                    reachable: reachable.clone(),
                },
                503,
            ),
            (ProposeError::NoQuorum { reachable }, 503),
            (ProposeError::Busy, 429),
            (ProposeError::OutcomeUnknown, 504),
            (ProposeError::Stopped("x".to_owned()), 503),
        ] {
            let unknown = error.is_unknown();
            let (response, _) = document(error.into());
            assert_eq!(response.status(), status);
            assert_eq!(unknown, status == 504);
        }
    }
}
