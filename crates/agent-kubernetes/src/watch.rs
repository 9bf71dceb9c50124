//! Watches the agent's Deployments and pods: wakes actions that wait, tells what happened without being asked for,
//! and puts on record what came of sessions that nobody waits for.
//!
//! A watch that breaks is begun again, with growing pauses, and lists first when it has missed something; what that
//! means is the mirror's to find out. Only a runtime that has acted under a token writes, and only under that
//! token: a replica that stands by looks on.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use regent_agent::runtime::{Exit, Generation, RuntimeError, RuntimeEvent, SessionRef};
use regent_types::SessionName;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::api::WATCH_SECONDS;
use crate::engine::Engine;
use crate::mirror::{Mirror, News};
use crate::names::label;
use crate::stop::SHORTEST_GRACE;

/// How often all sessions are looked at without an event: what lasts is told by this, and what could not be put on
/// record is tried again.
const REVIEW_EVERY: Duration = Duration::from_secs(1);

/// Watches until `stopped`.
pub(crate) async fn run(engine: Arc<Engine>, stopped: CancellationToken) {
    let Ok(scope) = engine.scope() else { return };
    let config = watcher::Config::default()
        .labels(&format!("{},{}", scope.selector(), label::SESSION))
        .timeout(WATCH_SECONDS);
    let mut deployments = pin!(watcher(engine.space.deployments(), config.clone()).default_backoff());
    let mut pods = pin!(watcher(engine.space.pods(), config).default_backoff());
    let mut review = interval(REVIEW_EVERY);
    review.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut mirror = Mirror::default();
    let mut records = FuturesUnordered::new();
    // One at a time for each session; there is nothing to record of more than there are.
    let mut recording = BTreeSet::new();
    loop {
        let touched = tokio::select! {
            () = stopped.cancelled() => return,
            Some(event) = deployments.next() => Some(seen(event).map_or_else(Vec::new, |event| mirror.deployment(event))),
            Some(event) = pods.next() => Some(seen(event).map_or_else(Vec::new, |event| mirror.pod(event))),
            Some(session) = records.next() => {
                recording.remove(&session);
                continue;
            }
            _ = review.tick() => None,
        };
        for session in touched.iter().flatten() {
            engine.touch(session);
        }
        let begun = |session: &SessionName, generation| engine.has_begun(session, generation);
        for news in mirror.review(touched, Instant::now(), &engine.space.namespace, begun) {
            let to_record = match news {
                News::RecordEnd(session, generation) | News::RecordUp(session, generation) => {
                    Some((session, generation))
                }
                News::Tell(event) => {
                    let ended = ended_by_itself(&event);
                    engine.tell(event);
                    ended
                }
            };
            if let Some((session, generation)) = to_record
                && let Some(token) = engine.acts_under()
                && recording.insert(session.clone())
            {
                let session = SessionRef {
                    session,
                    generation,
                    token,
                };
                records.push(record(&engine, session));
            }
        }
    }
}

/// The session that an event says has ended, unless it is gone altogether.
fn ended_by_itself(event: &RuntimeEvent) -> Option<(SessionName, Generation)> {
    match event {
        RuntimeEvent::Exited {
            session,
            generation,
            exit,
            ..
        } => {
            tracing::info!(%session, generation, %exit, "session ended");
            (*exit != Exit::Removed).then(|| (session.clone(), *generation))
        }
        RuntimeEvent::Changed { .. }
        | RuntimeEvent::Progress { .. }
        | RuntimeEvent::Lagged
        | RuntimeEvent::Restarted { .. } => None,
    }
}

/// An event, or nothing: what is wrong passes, or an administrator must mend it, and the watch goes on either way.
fn seen<K>(event: Result<Event<K>, watcher::Error>) -> Option<Event<K>> {
    event
        .inspect_err(|error| tracing::warn!(%error, "the watch is interrupted"))
        .ok()
}

/// Puts on record what a session came to. If that is its end, has what Kubernetes began of it again end soon.
async fn record(engine: &Engine, session: SessionRef) -> SessionName {
    let recorded = engine.record_end(&session.session, session.generation, session.token);
    let done = match recorded.await {
        Ok(true) => engine.await_rest(&session, SHORTEST_GRACE).await,
        Ok(false) => engine.record_up(&session).await,
        Err(error) => Err(error),
    };
    let session = session.session;
    match done {
        Ok(()) => {}
        // Its new leader does it.
        Err(RuntimeError::Fence(error)) => {
            tracing::debug!(%session, %error, "not ours to put on record");
        }
        Err(error) => tracing::warn!(%session, %error, "not on record yet, or its pod is not gone"),
    }
    session
}
