//! An attempt to connect, and why it came to nothing.

use futures::future::BoxFuture;
use regent_client::Error as ClientError;
use regent_types::ClusterId;

use crate::connection::{Connection, DialError};
use crate::runtime::{Observed, RuntimeError};

/// An attempt under way.
pub(crate) type Attempt = BoxFuture<'static, Result<Attempted, AttemptError>>;

/// An attempt that succeeded.
pub(crate) struct Attempted {
    pub(crate) connection: Connection,
    /// All that the runtime has.
    pub(crate) found: Vec<Observed>,
    /// The cluster, if it had to be asked for.
    pub(crate) cluster: Option<ClusterId>,
}

/// Why an attempt to connect came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttemptError {
    /// Registration failed.
    #[error("not registered: {}", in_words(.0))]
    Register(#[source] ClientError),
    /// Which cluster it is, and so which sessions are meant, is not known.
    #[error("the cluster is not known: {}", in_words(.0))]
    Cluster(#[source] ClientError),
    /// The node is not part of a cluster yet.
    #[error("the node is not part of a cluster yet")]
    Forming,
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
            Self::Register(error) | Self::Cluster(error) => {
                error.problem().is_some_and(|p| matches!(p.status, 401 | 403))
            }
            Self::Dial(DialError::Refused { status, .. }) => matches!(status.as_u16(), 401 | 403),
            Self::Dial(DialError::TimedOut | DialError::Failed(_) | DialError::Unusable(_))
            | Self::Forming
            | Self::Runtime(_) => false,
        }
    }
}

/// The error, and why TLS failed if it did: an agent whose CA is another tries for ever.
fn in_words(error: &ClientError) -> String {
    match error.tls_failure() {
        Some(why) => format!("{error}: {why}"),
        None => error.to_string(),
    }
}
