//! Follows the engine's events, and what they mean for sessions.
//!
//! The engine keeps only a few events for those who come late, so after every gap what is there is compared with what
//! was known instead; nothing is lost by a gap of any length.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bollard::models::EventMessage;
use bollard::query_parameters::EventsOptionsBuilder;
use futures::StreamExt as _;
use regent_agent::runtime::{RuntimeError, RuntimeEvent};
use regent_client::backoff::FullJitter;
use regent_types::Time;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::engine::{Engine, Shared};
use crate::names;

/// The ceiling of the first wait for an engine that went away.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The ceiling of later waits: an engine that is back is noticed within a second.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How often what is there is compared with what is known although no event came: a connection over a network may be
/// dead without a word.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// What happens to containers that matters here.
const ACTIONS: [&str; 4] = ["die", "destroy", "oom", "health_status"];

/// Follows until it is stopped, or the runtime is gone.
pub(crate) async fn follow(engine: Weak<Engine>, stopped: CancellationToken) {
    let mut wait = FullJitter::new(FIRST_WAIT, LONGEST_WAIT);
    let mut was_away = false;
    loop {
        let Some(shared) = engine.upgrade() else { return };
        tokio::select! {
            () = once(&shared, &mut was_away, &mut wait) => {}
            () = stopped.cancelled() => return,
        }
        drop(shared);
        tokio::select! {
            () = tokio::time::sleep(wait.next_delay()) => {}
            () = stopped.cancelled() => return,
        }
    }
}

/// One stream of events, until it breaks.
async fn once(engine: &Shared, was_away: &mut bool, wait: &mut FullJitter) {
    let filters = std::collections::HashMap::from([
        ("type".to_owned(), vec!["container".to_owned()]),
        ("event".to_owned(), ACTIONS.map(str::to_owned).to_vec()),
        (
            "label".to_owned(),
            vec![format!("{}={}", names::AGENT, engine.options.agent)],
        ),
    ]);
    // By the engine's clock: what happens from here on is among the events, also what happens before they are asked for.
    let Some(since) = engine_time(engine).await else {
        note_away(was_away);
        return;
    };
    let options = EventsOptionsBuilder::new()
        .since(&since)
        .filters(&filters)
        .build();
    let mut events = engine.docker.events(Some(options));
    if let Err(error) = engine.compare(*was_away).await {
        tracing::warn!(%error, "what happened while the engine was away cannot be found out yet");
        return;
    }
    if std::mem::take(was_away) {
        tracing::info!("the engine is back");
    }
    wait.reset();
    let mut look = tokio::time::interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
    // Whatever cannot be looked at now is found by the comparison that comes next.
    loop {
        let looked = tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => happened(engine, event).await,
                // An engine that restarts may answer again before it is next asked. What ended by itself in the moment
                // of a mere break is started again instead of told, which is the lesser harm.
                Some(Err(error)) => {
                    tracing::warn!(%error, "the engine's events broke off");
                    note_away(was_away);
                    return;
                }
                None => {
                    note_away(was_away);
                    return;
                }
            },
            _ = look.tick() => engine.compare(false).await,
        };
        if let Err(error) = looked {
            tracing::warn!(%error, "what happened to a session cannot be found out yet");
            return;
        }
    }
}

/// The engine's time, as it wants it for events: seconds with a fraction.
async fn engine_time(engine: &Engine) -> Option<String> {
    let info = engine.docker.info().await.ok()?;
    let time: Time = info.system_time?.parse().ok()?;
    Some(format!("{}.{:03}000000", time.0 / 1000, time.0 % 1000))
}

fn note_away(was_away: &mut bool) {
    if !std::mem::replace(was_away, true) {
        tracing::warn!("the engine does not answer; sessions are looked at when it is back");
    }
}

async fn happened(engine: &Arc<Engine>, event: EventMessage) -> Result<(), RuntimeError> {
    let Some((id, labels)) = event.actor.and_then(|actor| Some((actor.id?, actor.attributes?))) else {
        return Ok(());
    };
    let Some(scope) = engine.scope() else {
        return Ok(());
    };
    let ours = labels.get(names::CLUSTER).map(String::as_str) == Some(scope.cluster.as_str());
    let Some(identity) = names::identity(&labels).filter(|_| ours) else {
        return Ok(());
    };
    let action = event.action.unwrap_or_default();
    if let Some(health) = action.strip_prefix("health_status") {
        health_changed(engine, &id, health.trim_start_matches([':', ' '])).await
    } else if action == "oom" {
        // Its end, if it ends by it, is told when it comes.
        tracing::warn!(session = %identity.session, "ran out of memory");
        Ok(())
    } else {
        engine.after_end(&id, &identity).await
    }
}

async fn health_changed(engine: &Engine, id: &str, health: &str) -> Result<(), RuntimeError> {
    let Some(scope) = engine.scope() else {
        return Ok(());
    };
    if let Some(found) = engine.inspect(&scope, id).await? {
        let last = found
            .inspected
            .state
            .as_ref()
            .and_then(|state| state.health.as_ref())
            .and_then(|health| health.log.as_ref()?.last().cloned());
        let said = last.and_then(|check| check.output).unwrap_or_default();
        let reason = match said.trim() {
            "" => format!("its health check says: {health}"),
            said => format!(
                "its health check says: {health}: {}",
                said.chars().take(200).collect::<String>()
            ),
        };
        let observed = Box::new(engine.seen(&found));
        let _ = engine.events.send(RuntimeEvent::Changed { observed, reason });
    }
    Ok(())
}
