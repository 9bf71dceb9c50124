//! What the engine's errors mean to the agent.

use bollard::errors::Error;
use regent_agent::runtime::RuntimeError;

/// The engine's status code, if it answered with one.
pub(crate) fn status(error: &Error) -> Option<u16> {
    match error {
        Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// There is no such thing.
pub(crate) fn is_missing(error: &Error) -> bool {
    status(error) == Some(404)
}

/// It is in use, or there is one already.
pub(crate) fn is_conflict(error: &Error) -> bool {
    status(error) == Some(409)
}

/// It is as it should be already.
pub(crate) fn is_unchanged(error: &Error) -> bool {
    status(error) == Some(304)
}

/// The engine's own words, without what the client adds.
pub(crate) fn words(error: &Error) -> String {
    match error {
        Error::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        Error::DockerStreamError { error } => error.trim().to_owned(),
        // The client's own words name its parts, and say the cause twice.
        other => match other.to_string() {
            text if text.contains("(Connect)") => "the Docker engine cannot be reached".to_owned(),
            text => text,
        },
    }
}

/// An error of the engine while this was being done.
pub(crate) fn engine(what: impl Into<String>) -> impl FnOnce(Error) -> RuntimeError {
    let what = what.into();
    move |source| RuntimeError::Engine {
        what,
        // 400 says that the request is wrong, and it would be wrong again. All else may pass: the engine comes back,
        // a disk gets room.
        retryable: status(&source) != Some(400),
        source: words(&source).into(),
    }
}
