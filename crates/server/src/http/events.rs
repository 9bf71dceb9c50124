//! `/events`: what changed, in the order of the log, as server-sent events.
//!
//! An event's id is a place in the log, so a watcher that lost its node goes on at any other one with
//! the last id that it saw. Events are kept for a while only: a watcher that comes too late, or reads
//! too slowly, is told so (410, or a last event `gone`) and must read the records anew. It never misses
//! any in silence.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use regent_state::event::EventRecord;
use regent_state::record::{Role, Subject};
use regent_state::{EventId, State};
use regent_types::{Code, LeaseName, Revision};
use serde::Deserialize;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use utoipa::IntoParams;

use super::caller::{Identity, Reading};
use super::commands;
use super::openapi::EventProblems;
use super::problem::{Failure, Result};
use super::query::{Consistency, Query, Read};
use super::{reply, view};
use crate::service::Service;

/// Streams that one node serves at once.
const MAX_STREAMS: usize = 1_024;
static STREAMS: Semaphore = Semaphore::const_new(MAX_STREAMS);
/// Events rendered at a time, and events that wait for a slow reader.
const BATCH: usize = 64;
/// A reader that takes nothing for so long is closed.
const SLOW_AFTER: Duration = Duration::from_secs(30);
/// A comment is sent this often, so that proxies do not close a silent stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How often the caller's token is looked at again while nothing happens.
const RECHECK: Duration = Duration::from_secs(5);

const NOUNS: [&str; 8] = [
    "session", "agent", "command", "lease", "template", "user", "token", "member",
];

/// Query of `GET /events`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WatchEvents {
    /// Begin after the event of this id (`REVISION.N`); with what happens from now on when absent.
    after: Option<String>,
    /// Only these, by comma: nouns (`session`) or whole kinds (`session.running`).
    kinds: Option<String>,
    /// `linearizable` (default) or `stale`: whether "now", and whether `after` can be, is asked of the cluster.
    #[serde(default)]
    #[param(inline)]
    consistency: Consistency,
    /// See at least this revision.
    #[param(value_type = Option<u64>)]
    min_index: Option<Revision>,
}

/// Streams events. Callers see those of records that they may see.
#[utoipa::path(get, path = "/api/v1/events", tag = "events",
    params(WatchEvents, ("Last-Event-ID" = Option<String>, Header, description = "Like `after`, and before it")),
    responses((status = 200, description = "A stream of events; each `data` is an Event",
        body = regent_types::event::Event, content_type = "text/event-stream"), EventProblems))]
pub(super) async fn watch(
    reading: Reading,
    headers: HeaderMap,
    Query(query): Query<WatchEvents>,
) -> Result<Response> {
    let kinds = query.kinds.as_deref().map(parse_kinds).transpose()?;
    let after = match last_event_id(&headers) {
        Some(id) => Some(("Last-Event-ID", id)),
        None => query.after.as_deref().map(|id| ("after", id)),
    };
    let read = Read {
        consistency: query.consistency,
        min_index: query.min_index,
    };
    stream_after(reading, after, read, Selection::Kinds(kinds)).await
}

/// Streams what happens to one lease, with what it is at first.
pub(super) async fn of_lease(
    reading: Reading,
    name: LeaseName,
    headers: &HeaderMap,
    read: Read,
) -> Result<Response> {
    if let Some(agent) = name.agent() {
        let caller = reading.caller();
        if caller.role < Role::Operator && !caller.is_agent(&agent) {
            return Err(Failure::forbidden(format!(
                "{name} is for that agent and operators"
            )));
        }
    }
    let after = last_event_id(headers).map(|id| ("Last-Event-ID", id));
    stream_after(reading, after, read, Selection::Lease(name)).await
}

pub(super) fn last_event_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get("last-event-id")?.to_str().unwrap_or("?");
    (!id.is_empty()).then_some(id)
}

/// Streams events after the one that `after` names, with the field that names it; else from now on.
async fn stream_after(
    reading: Reading,
    after: Option<(&str, &str)>,
    read: Read,
    selection: Selection,
) -> Result<Response> {
    let after = after
        .map(|(field, id)| {
            view::parse_event_id(id)
                .ok_or_else(|| Failure::field(field, "must be the id of an event, such as 42.0"))
        })
        .transpose()?;
    let permit = STREAMS
        .try_acquire()
        .map_err(|_| Failure::busy("too many event streams", 5))?;
    let snapshot = reading.view(read).await?;
    let (sender, receiver) = mpsc::channel(BATCH);
    let position = match after {
        None => {
            let now = EventId(snapshot.revision(), u32::MAX);
            if let Selection::Lease(name) = &selection {
                let first = view::lease_state(now, name, snapshot.state());
                let data = serde_json::to_string(&first).unwrap_or_default();
                // The channel is empty and has room.
                let _ = sender.try_send(Ok(Event::default().id(first.id).data(data)));
            }
            now
        }
        Some(id) => {
            if is_pruned(snapshot.state().events_floor(), id) {
                return Err(gone("events after it have been pruned").at(snapshot.revision()));
            }
            if read.consistency == Consistency::Linearizable && id.0 > snapshot.revision() {
                return Err(
                    gone("it is of another cluster: this one has not come that far").at(snapshot.revision())
                );
            }
            id
        }
    };
    let revision = snapshot.revision();
    let watcher = Watcher {
        service: reading.service().clone(),
        caller: snapshot.caller,
        selection,
        position,
        sender,
        _permit: permit,
    };
    tokio::spawn(watcher.run());
    let events = stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    reply::set_index(&mut response, revision);
    Ok(response)
}

fn gone(why: &str) -> Failure {
    Failure::new(
        Code::Gone,
        format!("cannot go on after that event: {why}; read the records anew"),
    )
}

/// Whether events after this one may be missing.
fn is_pruned(floor: EventId, seen: EventId) -> bool {
    // Clients go on "after all of revision R" with the largest number, so the next id may be of R + 1.
    seen.next() < floor
}

pub(super) fn parse_kinds(text: &str) -> Result<BTreeSet<String>> {
    let known = view::all_kinds();
    let kinds: BTreeSet<String> = text.split(',').map(|kind| kind.trim().to_owned()).collect();
    for kind in &kinds {
        if !NOUNS.contains(&kind.as_str()) && !known.contains(kind) {
            let known: Vec<_> = NOUNS
                .iter()
                .copied()
                .chain(known.iter().map(String::as_str))
                .collect();
            return Err(Failure::field(
                "kinds",
                format!("{kind:?} is none of {}", known.join(", ")),
            ));
        }
    }
    Ok(kinds)
}

/// Which events a stream has.
enum Selection {
    /// Those of these nouns and kinds, or all, of records that the caller may see.
    Kinds(Option<BTreeSet<String>>),
    /// Those about one lease. Who may acquire it is told who holds it anyway.
    Lease(LeaseName),
}

struct Watcher {
    service: Service,
    caller: Identity,
    selection: Selection,
    /// The last event that was looked at.
    position: EventId,
    sender: mpsc::Sender<Result<Event, Infallible>>,
    _permit: SemaphorePermit<'static>,
}

/// What there is to send.
enum Batch {
    Events(Vec<Event>),
    /// Nothing more yet.
    Waiting,
    /// What comes next was pruned before this reader took it.
    Pruned,
    /// The caller's token is no longer good.
    Revoked,
}

impl Watcher {
    async fn run(mut self) {
        let gauge = metrics::gauge!("regent_event_streams");
        gauge.increment(1.0);
        self.feed().await;
        gauge.decrement(1.0);
    }

    async fn feed(&mut self) {
        let mut applied = self.service.node().applied();
        loop {
            applied.borrow_and_update();
            if self.service.node().out_of_service().is_some() {
                return; // the watcher goes on at another node
            }
            match self.batch() {
                Batch::Events(events) => {
                    for event in events {
                        if self.sender.send_timeout(Ok(event), SLOW_AFTER).await.is_err() {
                            if !self.sender.is_closed() {
                                metrics::counter!("regent_event_streams_slow_total").increment(1);
                                tracing::debug!(caller = %self.caller.principal, "slow reader of events closed");
                            }
                            return;
                        }
                    }
                }
                Batch::Waiting => tokio::select! {
                    changed = applied.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(RECHECK) => {}
                    () = self.service.stopping().cancelled() => return,
                    () = self.sender.closed() => return,
                },
                Batch::Pruned => {
                    metrics::counter!("regent_event_streams_slow_total").increment(1);
                    let last = Event::default()
                        .event("gone")
                        .data("events were pruned before they were read");
                    let _ = self.sender.send_timeout(Ok(last), SLOW_AFTER).await;
                    return;
                }
                Batch::Revoked => return,
            }
        }
    }

    /// Looks at the next events. Renders them at once, so that no view is held while a reader is slow.
    fn batch(&mut self) -> Batch {
        let node = self.service.node();
        let view = node.view();
        let Ok(caller) = self.caller.again(&view.state, node.cluster_now()) else {
            return Batch::Revoked;
        };
        self.caller = caller;
        if is_pruned(view.state.events_floor(), self.position) {
            return Batch::Pruned;
        }
        let (mut seen, mut events) = (false, Vec::new());
        for (id, event) in view.state.events().from(self.position.next()).take(BATCH) {
            seen = true;
            self.position = *id;
            if self.wants(event, &view.state) {
                let shown = view::event(*id, event, &view.state);
                let data = serde_json::to_string(&shown).unwrap_or_default();
                events.push(Event::default().id(shown.id).data(data));
            }
        }
        if seen {
            Batch::Events(events)
        } else {
            Batch::Waiting
        }
    }

    fn wants(&self, event: &regent_state::Event, state: &State) -> bool {
        match &self.selection {
            Selection::Kinds(kinds) => {
                let kind = event.name();
                let noun = kind.split('.').next().unwrap_or_default();
                kinds
                    .as_ref()
                    .is_none_or(|kinds| kinds.contains(&kind) || kinds.contains(noun))
                    && may_see(&self.caller, state, &event.record)
            }
            Selection::Lease(name) => match &event.record {
                EventRecord::Lease(lease) => lease.name == *name,
                EventRecord::Candidate(candidate) => candidate.lease == *name,
                _ => false,
            },
        }
    }
}

fn may_see(caller: &Identity, state: &State, record: &EventRecord) -> bool {
    let operator = caller.role >= Role::Operator;
    match record {
        EventRecord::Session(session) => {
            operator
                || caller.is_user(&session.user)
                || session.agent.as_ref().is_some_and(|agent| caller.is_agent(agent))
        }
        EventRecord::Agent(agent) => operator || caller.is_agent(&agent.id),
        EventRecord::Command(command) => commands::may_see(caller, state, command),
        EventRecord::Lease(lease) => operator || lease.owner == caller.principal,
        EventRecord::Candidate(candidate) => operator || candidate.owner == caller.principal,
        EventRecord::Template(_) => true,
        EventRecord::User(user) => caller.role == Role::Admin || caller.is_user(&user.name),
        EventRecord::Member(_) | EventRecord::Restored(_) | EventRecord::Cluster(_) => operator,
        EventRecord::ApiToken(token) => {
            caller.role == Role::Admin
                || match &token.subject {
                    Subject::User(name) => caller.is_user(name),
                    Subject::Agent(id) => caller.is_agent(id),
                    Subject::Join(_) => operator,
                }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_nouns_or_whole_kinds() {
        assert_eq!(parse_kinds("session,agent.offline").unwrap().len(), 2);
        assert!(parse_kinds("session.running,command.completed,lease.expired").is_ok());
        for bad in [
            "",
            "sessions",
            "session.",
            "session.state",
            "agent.running",
            "session,,agent",
        ] {
            assert!(parse_kinds(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_watcher_at_the_floor_misses_nothing_and_one_before_it_does() {
        let id = |revision: u64, n: u32| EventId(Revision(revision), n);
        assert!(!is_pruned(id(0, 0), id(0, 0)), "nothing was ever pruned");
        assert!(
            !is_pruned(id(10, 2), id(10, 1)),
            "the floor itself is what comes next"
        );
        assert!(
            !is_pruned(id(11, 0), id(10, u32::MAX)),
            "all of revision 10 was seen"
        );
        assert!(is_pruned(id(10, 2), id(10, 0)));
        assert!(is_pruned(id(11, 1), id(10, u32::MAX)));
        assert!(
            !is_pruned(id(11, 0), id(u64::MAX, u32::MAX)),
            "the largest id does not overflow"
        );
    }
}
