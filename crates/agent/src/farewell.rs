//! Ends all sessions with the agent, in `dev`, where they do not outlive it.

use std::time::Duration;

use futures::StreamExt as _;
use regent_types::Token;

use crate::runtime::{Runtime, SessionRef, Stop};

/// Sessions that end with the agent get this long before they are forced.
const EXIT_GRACE: Duration = Duration::from_secs(2);
/// And this long in all.
pub(crate) const WITHIN: Duration = Duration::from_secs(8);
/// So many of them are ended side by side.
const EXIT_PARALLEL: usize = 64;

/// Ends all sessions, in `dev`, where they end with their agent.
pub async fn stop_sessions(runtime: &dyn Runtime, token: Token) {
    let found = match runtime.list().await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "the sessions are not known and stay");
            return;
        }
    };
    futures::stream::iter(found)
        .for_each_concurrent(EXIT_PARALLEL, |one| async move {
            let session = SessionRef {
                token: token.max(one.token),
                session: one.session,
                generation: one.generation,
            };
            if let Err(error) = runtime.stop(&session, Stop::within(EXIT_GRACE)).await {
                tracing::warn!(session = %session.session, %error, "a session did not end with the agent");
            }
        })
        .await;
}
