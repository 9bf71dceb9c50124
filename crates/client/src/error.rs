//! What can come of a call.

use regent_types::{Code, Problem};

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane answered with a problem document.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// No server could be reached, or none answered in time.
    #[error("no server answered ({}){}", servers.join(", "), if *maybe_done { "; it may be done or not" } else { "" })]
    Unreachable {
        /// All that were asked.
        servers: Vec<String>,
        /// Whether a server may have taken the request before the connection failed.
        maybe_done: bool,
        /// What went wrong with the last one.
        #[source]
        source: reqwest::Error,
    },
    /// Something answered, but not as a Regent node does: a proxy, or a wrong URL.
    #[error("{server} does not answer like a Regent node: status {status}: {body}")]
    NotRegent {
        /// The server.
        server: String,
        /// Its HTTP status.
        status: u16,
        /// The start of what it said.
        body: String,
    },
    /// The answer's body is not what it should be; it may be a newer version's.
    #[error("the answer of {server} cannot be read")]
    BadAnswer {
        /// The server.
        server: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The URL of a server, the token or a name cannot be used.
    #[error("{0}")]
    Configuration(String),
}

impl Error {
    /// Why TLS failed, in words for the person who has to mend it; `None` when that is not what went wrong.
    pub fn tls_failure(&self) -> Option<String> {
        let first: &(dyn std::error::Error + 'static) = self;
        std::iter::successors(Some(first), |error| error.source())
            .find_map(|cause| regent_tls::explain(cause.downcast_ref::<std::io::Error>()?))
    }

    /// Whether the same call may succeed later without anything else being changed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Problem(problem) => match problem.code {
                Code::Busy
                | Code::NoLeader
                | Code::NoQuorum
                | Code::NoAgentsAvailable
                | Code::NotServing
                | Code::LeasesHeldBack
                | Code::OutcomeUnknown => true,
                Code::InvalidRequest
                | Code::Unauthenticated
                | Code::Forbidden
                | Code::QuotaExceeded
                | Code::RouteNotFound
                | Code::SessionNotFound
                | Code::AgentNotFound
                | Code::CommandNotFound
                | Code::LeaseNotFound
                | Code::TemplateNotFound
                | Code::UserNotFound
                | Code::TokenNotFound
                | Code::MemberNotFound
                | Code::MethodNotAllowed
                | Code::WrongState
                | Code::AlreadyExists
                | Code::LeaseHeld
                | Code::LeaseLost
                | Code::Gone
                | Code::Changed
                | Code::TooLarge
                | Code::UnsupportedMediaType
                | Code::IdempotencyKeyReused
                | Code::Internal => false,
            },
            Self::Unreachable { .. } => true,
            Self::NotRegent { status, .. } => *status >= 500,
            Self::BadAnswer { .. } | Self::Configuration(_) => false,
        }
    }

    /// Whether the call may have been done although it did not succeed.
    pub fn is_in_doubt(&self) -> bool {
        match self {
            Self::Problem(problem) => problem.code == Code::OutcomeUnknown,
            Self::Unreachable { maybe_done, .. } => *maybe_done,
            // Something stands between that may have passed it on; what was done has no readable answer.
            Self::NotRegent { .. } | Self::BadAnswer { .. } => true,
            Self::Configuration(_) => false,
        }
    }

    /// The code of the problem, where the control plane gave one.
    pub fn code(&self) -> Option<Code> {
        self.problem().map(|problem| problem.code)
    }

    /// The problem document, where the control plane gave one.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            Self::Unreachable { .. }
            | Self::NotRegent { .. }
            | Self::BadAnswer { .. }
            | Self::Configuration(_) => None,
        }
    }
}
