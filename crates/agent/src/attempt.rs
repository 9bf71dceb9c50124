//! An attempt to connect, and why it came to nothing.

use futures::future::BoxFuture;
use regent_client::Error as ClientError;

use crate::connection::{Connection, DialError};
use crate::runtime::{Observed, RuntimeError};

/// An attempt under way: a connection, and all that the runtime has.
pub(crate) type Attempt = BoxFuture<'static, Result<(Connection, Vec<Observed>), AttemptError>>;

/// Why an attempt to connect came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttemptError {
    /// Registration failed.
    #[error("not registered: {0}")]
    Register(#[source] ClientError),
    /// What runs here is not known.
    #[error("the runtime does not answer: {0}")]
    Runtime(#[source] RuntimeError),
    /// The node was not reached, or refuses.
    #[error("not connected: {0}")]
    Dial(#[source] DialError),
}

impl AttemptError {
    /// Whether the control plane does not take the token.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Register(error) => error.problem().is_some_and(|p| matches!(p.status, 401 | 403)),
            Self::Dial(DialError::Refused { status, .. }) => matches!(status.as_u16(), 401 | 403),
            Self::Dial(DialError::TimedOut | DialError::Failed(_) | DialError::Unusable(_))
            | Self::Runtime(_) => false,
        }
    }
}
