//! Records as the API shows them. What is not replicated (activity, heartbeats, remaining time) comes
//! beside the record and is `None` where nobody was asked.

use std::collections::BTreeSet;
use std::sync::Arc;

use regent_state::event::EventRecord;
use regent_state::record;
use regent_state::{Event, EventId, EventKind, State};
use regent_types::agent::{Agent, AgentReplica, AgentStatus, Allocated, Capacity, SchedulingState};
use regent_types::auth::{ApiToken, Quota, Role, User};
use regent_types::command::{Command, CommandStatus};
use regent_types::duration::Span;
use regent_types::lease::{Lease, LeaseCandidate};
use regent_types::session::{Resources, Session, SessionState, SessionStatus};
use regent_types::template::{Manifest, Template};
use regent_types::{Cpu, LeaseName, Memory, Time};
use serde_json::{Value, json};

/// A session; `last_activity` in Unix milliseconds.
pub(super) fn session(record: &record::Session, last_activity: Option<u64>) -> Session {
    let state = session_state(record.state);
    Session {
        name: record.name.clone(),
        user: record.user.clone(),
        template: record.template.clone(),
        state,
        reason: record.reason.clone(),
        agent_id: record.agent.clone(),
        resources: Resources {
            memory: Some(Memory(record.memory)),
            cpu: Some(Cpu(record.cpu)),
        },
        persistent_home: record.persistent_home,
        idle_timeout: record.idle_timeout.map(Span),
        max_session_duration: record.max_duration.map(Span),
        tags: record.tags.to_vec(),
        created_at: Time(record.created_at),
        updated_at: Time(record.updated_at),
        status: SessionStatus {
            phase: state.phase().to_owned(),
            url: record.url.clone(),
            message: record.reason.clone(),
            last_activity: last_activity.map(Time),
        },
        metadata: object(&record.metadata),
        generation: record.generation,
    }
}

pub(super) fn session_state(state: record::SessionState) -> SessionState {
    match state {
        record::SessionState::Pending => SessionState::Pending,
        record::SessionState::Starting => SessionState::Starting,
        record::SessionState::Running => SessionState::Running,
        record::SessionState::Hibernating => SessionState::Hibernating,
        record::SessionState::Hibernated => SessionState::Hibernated,
        record::SessionState::Waking => SessionState::Waking,
        record::SessionState::Terminating => SessionState::Terminating,
        record::SessionState::Terminated => SessionState::Terminated,
        record::SessionState::Failed => SessionState::Failed,
        record::SessionState::Lost => SessionState::Lost,
    }
}

/// An agent; `last_heartbeat` in Unix milliseconds. The state is asked for the sessions on it.
pub(super) fn agent(record: &record::Agent, state: &State, last_heartbeat: Option<u64>) -> Agent {
    let active = state
        .sessions_of_agent(&record.id)
        .filter(|session| !session.state.is_final() && session.state != record::SessionState::Hibernated)
        .count();
    let leading = record.leading();
    Agent {
        agent_id: record.id.clone(),
        platform: record.platform.clone(),
        region: record.region.clone(),
        status: if record.is_online() {
            AgentStatus::Online
        } else {
            AgentStatus::Offline
        },
        scheduling: match record.scheduling {
            record::Scheduling::Eligible => SchedulingState::Eligible,
            record::Scheduling::Cordoned => SchedulingState::Cordoned,
            record::Scheduling::Draining { .. } => SchedulingState::Draining,
        },
        capacity: Capacity {
            max_sessions: record.capacity.max_sessions,
            cpu: record.capacity.cpu.map(Cpu),
            memory: record.capacity.memory.map(Memory),
        },
        allocated: allocated(record.allocated),
        active_sessions: u32::try_from(active).unwrap_or(u32::MAX),
        labels: record.labels.clone(),
        metadata: object(&record.metadata),
        node: leading.map(|connection| connection.node),
        epoch: leading.map(|connection| connection.epoch),
        token: record.leader.as_ref().map(|(_, token)| *token),
        last_heartbeat: last_heartbeat.map(Time),
        connected_at: leading.map(|connection| Time(connection.connected_at)),
        replicas: record
            .connections
            .iter()
            .map(|(name, connection)| AgentReplica {
                name: name.clone(),
                node: connection.node,
                leader: record.leader.as_ref().is_some_and(|(leader, _)| leader == name),
            })
            .collect(),
    }
}

fn allocated(usage: record::Usage) -> Allocated {
    Allocated {
        sessions: usage.sessions,
        cpu: Cpu(usage.cpu),
        memory: Memory(usage.memory),
    }
}

/// A command.
pub(super) fn command(record: &record::Command) -> Command {
    let status = command_status(&record.state);
    let (error, completed_at, result) = match &record.state {
        record::CommandState::Completed { result, at } => (None, Some(*at), json(result)),
        record::CommandState::Failed { error, at } => (Some(error.clone()), Some(*at), Value::Null),
        record::CommandState::Cancelled { reason, at } => (
            (!reason.is_empty()).then(|| reason.clone()),
            Some(*at),
            Value::Null,
        ),
        record::CommandState::Expired { at } => (None, Some(*at), Value::Null),
        _ => (None, None, Value::Null),
    };
    // While another attempt follows, why the last one failed is worth knowing; a success has no error.
    let error = match status {
        CommandStatus::Completed => None,
        _ => error.or_else(|| record.last_error.clone()),
    };
    Command {
        command_id: record.id.clone(),
        agent_id: record.agent.clone(),
        session_id: record.session.clone(),
        action: record.action.as_str().to_owned(),
        payload: json(&record.payload),
        status,
        run: record.run,
        attempts: record.attempts,
        error,
        created_at: Time(record.created_at),
        sent_at: record.sent_at.map(Time),
        acknowledged_at: record.acknowledged_at.map(Time),
        completed_at: completed_at.map(Time),
        result,
    }
}

/// A command's status; filters of lists go by it too.
pub(super) fn command_status(state: &record::CommandState) -> CommandStatus {
    match state {
        record::CommandState::Pending { .. } => CommandStatus::Pending,
        record::CommandState::Sent { .. } => CommandStatus::Sent,
        record::CommandState::Acknowledged { .. } => CommandStatus::Acknowledged,
        record::CommandState::Completed { .. } => CommandStatus::Completed,
        record::CommandState::Failed { .. } => CommandStatus::Failed,
        record::CommandState::Cancelled { .. } => CommandStatus::Cancelled,
        record::CommandState::Expired { .. } => CommandStatus::Expired,
    }
}

/// A lease; `remaining_ms` by the leader's clock.
pub(super) fn lease<'a>(
    record: &record::Lease,
    remaining_ms: Option<u64>,
    queue: impl IntoIterator<Item = &'a Arc<record::Candidate>>,
) -> Lease {
    Lease {
        name: record.name.clone(),
        holder: record.holder.clone(),
        owner: record.owner.to_string(),
        token: record.token,
        ttl_ms: record.ttl_ms,
        remaining_ms,
        granted_at: Time(record.granted_at),
        candidates: queue
            .into_iter()
            .map(|candidate| lease_candidate(candidate))
            .collect(),
    }
}

/// Somebody who waits for a lease.
fn lease_candidate(record: &record::Candidate) -> LeaseCandidate {
    LeaseCandidate {
        holder: record.holder.clone(),
        owner: record.owner.to_string(),
        since: Time(record.since),
    }
}

/// A template. `None` when the manifest kept is not one, which `templates` never lets in.
pub(super) fn template(record: &record::Template) -> Option<Template> {
    let manifest: Manifest = serde_json::from_str(&record.manifest).ok()?;
    Some(Template {
        name: record.name.clone(),
        built_in: record.built_in,
        manifest,
        created_at: Time(record.created_at),
        updated_at: Time(record.updated_at),
    })
}

/// A user, without the hash of the password.
pub(super) fn user(record: &record::User) -> User {
    User {
        username: record.name.clone(),
        role: role(record.role),
        quota: Quota {
            sessions: record.quota.sessions,
            cpu: record.quota.cpu.map(Cpu),
            memory: record.quota.memory.map(Memory),
        },
        used: allocated(record.used),
        created_at: Time(record.created_at),
    }
}

pub(super) fn role(role: record::Role) -> Role {
    match role {
        record::Role::Agent => Role::Agent,
        record::Role::User => Role::User,
        record::Role::Operator => Role::Operator,
        record::Role::Admin => Role::Admin,
    }
}

/// An API token without its secret; the state is asked for the role of its user.
pub(super) fn token(record: &record::ApiToken, state: &State) -> ApiToken {
    let (user, agent_id, role) = match &record.subject {
        record::Subject::User(name) => (
            Some(name.clone()),
            None,
            state.user(name).map_or(Role::User, |user| self::role(user.role)),
        ),
        record::Subject::Agent(id) => (None, Some(id.clone()), Role::Agent),
        // What it may do is less than any role.
        record::Subject::Join(_) => (None, None, Role::Agent),
    };
    ApiToken {
        id: record.id.clone(),
        token: None,
        user,
        agent_id,
        join: match &record.subject {
            record::Subject::Join(scope) => Some(scope.to_string()),
            record::Subject::User(_) | record::Subject::Agent(_) => None,
        },
        role,
        description: record.description.clone(),
        created_at: Time(record.created_at),
        expires_at: record.expires_at.map(Time),
    }
}

/// How the cluster came out of another one's state.
fn restored(record: &record::Restored) -> Value {
    let held_back = (record.no_lease_before > 0).then_some(Time(record.no_lease_before));
    json!({
        "clusterId": record.cluster,
        "formerClusterIds": record.from,
        "at": Time(record.at),
        "revision": record.revision,
        "stateRevision": record.state_revision,
        "noLeaseBefore": held_back,
    })
}

/// A member as the table of members has it.
fn member(record: &record::Member) -> Value {
    json!({
        "id": record.id,
        "peer": record.peer,
        "http": record.http,
        "removed": !record.is_live(),
    })
}

/// An event, the same whatever state a node has reached.
pub(super) fn event(id: EventId, event: &Event, state: &State) -> regent_types::event::Event {
    let record = match &event.record {
        _ if is_gone(event.kind) => Value::Null,
        EventRecord::Session(record) => value(&session(record, None)),
        EventRecord::Agent(record) => without("activeSessions", value(&agent(record, state, None))),
        EventRecord::Command(record) => value(&command(record)),
        // The same on every node: who waits is told by events of its own.
        EventRecord::Lease(record) => value(&lease(record, None, [])),
        EventRecord::Candidate(record) => value(&lease_candidate(record)),
        EventRecord::Template(record) => value(&template(record)),
        EventRecord::User(record) => value(&user(record)),
        EventRecord::ApiToken(record) => without("role", value(&token(record, state))),
        EventRecord::Member(record) => value(&member(record)),
        EventRecord::Restored(record) => restored(record),
        EventRecord::Cluster(id) => serde_json::json!({ "clusterId": id }),
    };
    regent_types::event::Event {
        by: event.who().to_owned(),
        reason: event.why().map(str::to_owned),
        id: id.to_string(),
        revision: id.0,
        time: Time(event.at),
        kind: event.name(),
        subject: event.subject().into_owned(),
        record,
    }
}

/// A record without a field that is looked up in whatever state a node has reached: an event says the same on every
/// node. What it depends on has events of its own.
fn without(field: &str, mut record: Value) -> Value {
    if let Some(record) = record.as_object_mut() {
        record.remove(field);
    }
    record
}

/// What a lease is, as the first event of a stream about it.
pub(super) fn lease_state(id: EventId, name: &LeaseName, state: &State) -> regent_types::event::Event {
    regent_types::event::Event {
        by: "system".to_owned(),
        reason: None,
        id: id.to_string(),
        revision: id.0,
        time: Time(state.now()),
        kind: "lease.state".to_owned(),
        subject: name.to_string(),
        record: state.lease(name).map_or(Value::Null, |record| {
            value(&lease(record, None, state.queue_of(name)))
        }),
    }
}

/// Reads `REVISION.N`.
pub(super) fn parse_event_id(text: &str) -> Option<EventId> {
    let (revision, n) = text.split_once('.')?;
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    (digits(revision) && digits(n)).then_some(())?;
    Some(EventId(revision.parse().ok()?, n.parse().ok()?))
}

/// Every kind of event.
const KINDS: [EventKind; 35] = [
    EventKind::SessionCreated,
    EventKind::SessionUpdated,
    EventKind::SessionState,
    EventKind::SessionDeleted,
    EventKind::AgentRegistered,
    EventKind::AgentUpdated,
    EventKind::AgentOnline,
    EventKind::AgentOffline,
    EventKind::AgentConnected,
    EventKind::AgentDisconnected,
    EventKind::AgentScheduling,
    EventKind::AgentDeleted,
    EventKind::CommandCreated,
    EventKind::CommandStatus,
    EventKind::CommandDeleted,
    EventKind::LeaseGranted,
    EventKind::LeaseReleased,
    EventKind::LeaseExpired,
    EventKind::LeaseForceReleased,
    EventKind::TemplateApplied,
    EventKind::TemplateDeleted,
    EventKind::UserCreated,
    EventKind::UserUpdated,
    EventKind::UserDeleted,
    EventKind::TokenCreated,
    EventKind::TokenDeleted,
    EventKind::LeaseQueued,
    EventKind::LeaseLeft,
    EventKind::MemberAdded,
    EventKind::MemberUpdated,
    EventKind::MemberRemoved,
    EventKind::ClusterRestored,
    EventKind::ClusterTransferRequested,
    EventKind::ClusterBackupRequested,
    EventKind::MemberPromotionRequested,
];

/// Every text that an event's kind can have.
pub(super) fn all_kinds() -> BTreeSet<String> {
    const STATUSES: [&str; 7] = [
        "pending",
        "sent",
        "acknowledged",
        "completed",
        "failed",
        "cancelled",
        "expired",
    ];
    let plain = KINDS
        .iter()
        .filter(|kind| !matches!(kind, EventKind::SessionState | EventKind::CommandStatus));
    plain
        .map(|kind| kind.as_str().to_owned())
        .chain(
            SessionState::ALL
                .iter()
                .map(|state| format!("session.{}", state.as_str())),
        )
        .chain(STATUSES.iter().map(|status| format!("command.{status}")))
        .collect()
}

fn is_gone(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::SessionDeleted
            | EventKind::AgentDeleted
            | EventKind::CommandDeleted
            | EventKind::LeaseReleased
            | EventKind::LeaseExpired
            | EventKind::LeaseForceReleased
            | EventKind::TemplateDeleted
            | EventKind::UserDeleted
            | EventKind::TokenDeleted
    )
}

/// JSON that is kept as text; what an agent sent is never trusted to be any.
fn json(text: &str) -> Value {
    if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(text).unwrap_or(Value::Null)
    }
}

/// The same, where readers expect an object.
fn object(text: &str) -> Value {
    match json(text) {
        Value::Null => Value::Object(serde_json::Map::new()),
        value => value,
    }
}

fn value<T: serde::Serialize>(record: &T) -> Value {
    serde_json::to_value(record).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;
    use regent_types::{AgentId, CommandId, Revision};

    fn a_command(state: record::CommandState, last_error: Option<&str>) -> record::Command {
        record::Command {
            id: CommandId::new("cmd-1").unwrap(),
            seq: (Revision(1), 0),
            agent: AgentId::new("dev").unwrap(),
            session: None,
            generation: 0,
            action: record::Action::Custom("ping".to_owned()),
            payload: String::new(),
            state,
            run: 1,
            attempts: 0,
            unanswered: 0,
            automatic_runs: 0,
            last_error: last_error.map(str::to_owned),
            expires_at: None,
            created_at: 0,
            sent_at: None,
            acknowledged_at: None,
            changed: Revision(1),
        }
    }

    /// Fault 2 of StreamSpace: a missing error message broke loading every pending command.
    #[test]
    fn a_pending_command_has_a_null_error() {
        let shown = command(&a_command(record::CommandState::Pending { not_before: 0 }, None));
        let shown = serde_json::to_value(&shown).unwrap();
        assert!(shown["error"].is_null() && shown.as_object().unwrap().contains_key("error"));
        assert_eq!(shown["status"], "pending");
    }

    #[test]
    fn a_command_that_succeeded_after_a_failure_shows_no_error() {
        let done = record::CommandState::Completed {
            result: "{\"a\":1}".to_owned(),
            at: 5,
        };
        let shown = command(&a_command(done, Some("first run failed")));
        assert_eq!((shown.error, shown.completed_at), (None, Some(Time(5))));
        assert_eq!(shown.result["a"], 1);
        let again = command(&a_command(
            record::CommandState::Pending { not_before: 0 },
            Some("first run failed"),
        ));
        assert_eq!(again.error.as_deref(), Some("first run failed"));
    }

    #[test]
    fn json_that_an_agent_broke_is_shown_as_null() {
        let done = record::CommandState::Completed {
            result: "{broken".to_owned(),
            at: 5,
        };
        assert_eq!(command(&a_command(done, None)).result, Value::Null);
        assert_eq!(object(""), serde_json::json!({}));
    }

    #[test]
    fn event_ids_are_read_back_and_nothing_else_is() {
        let id = EventId(Revision(12), 3);
        assert_eq!(parse_event_id(&id.to_string()), Some(id));
        for bad in [
            "",
            "1",
            "1.",
            ".1",
            "a.b",
            "-1.0",
            "+1.0",
            "1.0.0",
            "1.4294967296",
            "99999999999999999999.0",
        ] {
            assert_eq!(parse_event_id(bad), None, "{bad:?} was taken");
        }
    }
}
