//! Errors as they leave: `application/problem+json` (RFC 9457) with a stable `code`.

use serde::{Deserialize, Serialize};

/// The stable code of a problem. Programs act on this, people read `title` and `detail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// 400: the request does not say something that can be done.
    InvalidRequest,
    /// 401: no token, or one that is unknown, expired or revoked.
    Unauthenticated,
    /// 403: the caller's role does not allow it.
    Forbidden,
    /// 403: the user's quota would be exceeded.
    QuotaExceeded,
    /// 404: no such route.
    RouteNotFound,
    /// 404: no such session.
    SessionNotFound,
    /// 404: no such agent.
    AgentNotFound,
    /// 404: no such command.
    CommandNotFound,
    /// 404: no such lease, or it is free.
    LeaseNotFound,
    /// 404: no such template.
    TemplateNotFound,
    /// 404: no such user.
    UserNotFound,
    /// 404: no such API token.
    TokenNotFound,
    /// 404: no such member.
    MemberNotFound,
    /// 405: the route does not take this method.
    MethodNotAllowed,
    /// 409: the record is in a state that does not allow it.
    WrongState,
    /// 409: a record of that name exists already.
    AlreadyExists,
    /// 409: the lease is held.
    LeaseHeld,
    /// 409: the lease is not held under this token any more.
    LeaseLost,
    /// 410: what was asked for is gone: pruned, or of another cluster.
    Gone,
    /// 412: the record has changed since.
    Changed,
    /// 413: the body is too large.
    TooLarge,
    /// 415: the body is not JSON.
    UnsupportedMediaType,
    /// 422: the key was used before with another body.
    IdempotencyKeyReused,
    /// 429: a queue is full or a limit is reached; see `Retry-After`.
    Busy,
    /// 500: a fault of Regent itself.
    Internal,
    /// 503: no leader is known; certainly not done.
    NoLeader,
    /// 503: a majority of the members cannot be reached; certainly not done.
    NoQuorum,
    /// 503: no agent can take the session now; certainly not done.
    NoAgentsAvailable,
    /// 503: this node does not serve (starting, stopping, or its state differs); certainly not done.
    NotServing,
    /// 503: the cluster was restored, and somebody may still act under a lease of the one before; see `Retry-After`.
    LeasesHeldBack,
    /// 504: it may be done or not: repeat with the same `Idempotency-Key`.
    OutcomeUnknown,
}

impl Code {
    /// The HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden | Self::QuotaExceeded => 403,
            Self::RouteNotFound
            | Self::SessionNotFound
            | Self::AgentNotFound
            | Self::CommandNotFound
            | Self::LeaseNotFound
            | Self::TemplateNotFound
            | Self::UserNotFound
            | Self::TokenNotFound
            | Self::MemberNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::WrongState | Self::AlreadyExists | Self::LeaseHeld | Self::LeaseLost => 409,
            Self::Gone => 410,
            Self::Changed => 412,
            Self::TooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::IdempotencyKeyReused => 422,
            Self::Busy => 429,
            Self::Internal => 500,
            Self::NoLeader
            | Self::NoQuorum
            | Self::NoAgentsAvailable
            | Self::NotServing
            | Self::LeasesHeldBack => 503,
            Self::OutcomeUnknown => 504,
        }
    }

    /// A short title for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::InvalidRequest => "Invalid request",
            Self::Unauthenticated => "Not authenticated",
            Self::Forbidden => "Forbidden",
            Self::QuotaExceeded => "Quota exceeded",
            Self::RouteNotFound => "No such route",
            Self::SessionNotFound => "No such session",
            Self::AgentNotFound => "No such agent",
            Self::CommandNotFound => "No such command",
            Self::LeaseNotFound => "No such lease",
            Self::TemplateNotFound => "No such template",
            Self::UserNotFound => "No such user",
            Self::TokenNotFound => "No such token",
            Self::MemberNotFound => "No such member",
            Self::MethodNotAllowed => "Method not allowed",
            Self::WrongState => "Wrong state",
            Self::AlreadyExists => "Already exists",
            Self::LeaseHeld => "Lease held",
            Self::LeaseLost => "Lease lost",
            Self::Gone => "Gone",
            Self::Changed => "Changed since",
            Self::TooLarge => "Too large",
            Self::UnsupportedMediaType => "Not JSON",
            Self::IdempotencyKeyReused => "Idempotency key reused",
            Self::Busy => "Busy",
            Self::Internal => "Internal error",
            Self::NoLeader => "No leader",
            Self::NoQuorum => "No quorum",
            Self::NoAgentsAvailable => "No agents available",
            Self::NotServing => "Not serving",
            Self::LeasesHeldBack => "Leases held back",
            Self::OutcomeUnknown => "Outcome unknown",
        }
    }

    /// The code as text, as it stands in JSON.
    pub fn as_str(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(text)) => text,
            _ => unreachable!("a unit variant serialises as text"),
        }
    }
}

/// What is wrong with one field of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FieldError {
    /// The path of the field, such as `resources.cpu`.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// A problem document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// A URN for the code: `urn:regent:problem:CODE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// A short title.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was wrong and what to do.
    pub detail: String,
    /// The stable code.
    pub code: Code,
    /// The id of the request, as in `X-Request-Id`.
    #[serde(default)]
    pub request_id: String,
    /// The fields of the body that are wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldError>,
    /// More, by code: the holder and token of `lease_held`, the reasons of `no_agents_available`.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Problem {
    /// A problem with its code's title and status.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:regent:problem:{}", code.as_str()),
            title: code.title().to_owned(),
            status: code.status(),
            detail: detail.into(),
            code,
            request_id: String::new(),
            fields: Vec::new(),
            extra: serde_json::Map::new(),
        }
    }

    /// Names a wrong field.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.fields.push(FieldError {
            field: field.into(),
            message: message.into(),
        });
        self
    }

    /// Adds a member beside the standard ones.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.extra.insert(name.to_owned(), value.into());
        self
    }
}

/// Shortens a text that may quote what it complains of to `max` bytes at most, and says so.
pub fn cut(text: &mut String, max: usize) {
    const MORE: &str = " [...]";
    if text.len() > max {
        text.truncate(text.floor_char_boundary(max.saturating_sub(MORE.len())));
        text.push_str(MORE);
    }
}

/// A text in quotes, for the one who wrote it to know which is meant: cut to 80 characters, as it may be of any length.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?} [...]", &text[..end]),
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}): {}", self.title, self.code.as_str(), self.detail)?;
        for field in &self.fields {
            write!(f, "\n  {}: {}", field.field, field.message)?;
        }
        Ok(())
    }
}
