//! How outcomes, events and records look in a story: one line each.

use regent_state::record::{
    Agent, Candidate, Capacity, Command, CommandState, Lease, Member, Quota, Scheduling, Session, Subject,
    Usage,
};
use regent_state::{Applied, Event, EventRecord, Outcome, Rejection};

use super::world::BEGIN;

pub fn applied(applied: &Applied) -> String {
    match applied {
        Ok(outcome) => format!("ok {}", self::outcome(outcome)),
        Err(rejection) => format!("rejected {}", self::rejection(rejection)),
    }
}

fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done => "done".to_owned(),
        Outcome::Session(r) => session(r),
        Outcome::SessionAction { session: r, command } => match command {
            Some(command) => format!("{}; by {command}", session(r)),
            None => session(r),
        },
        Outcome::Agent { agent: r, created } => format!("{}{}", if *created { "new " } else { "" }, agent(r)),
        Outcome::Connected { epoch, token } => match token {
            Some(token) => format!("connected, epoch {epoch}, leads under token {token}"),
            None => format!("connected, epoch {epoch}, stands by"),
        },
        Outcome::Command(r) => command(r),
        Outcome::Lease(r) => lease(r),
        Outcome::Template { template, created } => {
            format!("{}template {}", if *created { "new " } else { "" }, template.name)
        }
        Outcome::User(r) => format!("user {}", r.name),
        Outcome::ApiToken(r) => format!("token {}", r.id),
        Outcome::Count(n) => format!("{n} changed"),
        Outcome::Stale => "stale".to_owned(),
        Outcome::Queued(r) => candidate(r),
        Outcome::Member(r) => member(r),
        Outcome::Replayed(inner) => format!("replayed: {}", self::outcome(inner)),
    }
}

fn rejection(rejection: &Rejection) -> String {
    let kind = format!("{rejection:?}");
    let kind = kind
        .split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default();
    match rejection {
        Rejection::NoAgents(reasons) => {
            let reasons: Vec<_> = reasons
                .iter()
                .map(|(agent, why)| format!("{agent}: {why}"))
                .collect();
            format!("{kind}: {}", reasons.join("; "))
        }
        other => format!("{kind}: {other}"),
    }
}

pub fn event(event: &Event) -> String {
    let record = match &event.record {
        EventRecord::Session(r) => session(r),
        EventRecord::Agent(r) => agent(r),
        EventRecord::Command(r) => command(r),
        EventRecord::Lease(r) => lease(r),
        EventRecord::Template(r) => format!("template {}", r.name),
        EventRecord::User(r) => {
            format!(
                "user {} {} quota {} used {}",
                r.name,
                r.role.as_str(),
                quota(r.quota),
                usage(r.used)
            )
        }
        EventRecord::ApiToken(r) => match &r.subject {
            Subject::User(name) => format!("token {} of user {name}", r.id),
            Subject::Agent(id) => format!("token {} of agent {id}", r.id),
            Subject::Join(scope) => format!("token {} to join as {scope}", r.id),
        },
        EventRecord::Candidate(r) => candidate(r),
        EventRecord::Member(r) => member(r),
        EventRecord::Cluster(id) => format!("cluster {id}"),
        EventRecord::Restored(r) => format!("cluster {} from {:?}", r.cluster, r.from),
    };
    format!("{} by {}: {record}", event.name(), event.by)
}

pub fn member(r: &Member) -> String {
    let mut text = format!("member {} at {} and {}", r.id, r.peer, r.http);
    if let Some(at) = r.removed_at {
        text += &format!(", removed at {}", time(at));
    }
    text
}

pub fn session(r: &Session) -> String {
    let mut text = format!("session {} {}", r.name, r.state.as_str());
    match &r.agent {
        Some(agent) => text += &format!(" on {agent}, generation {}", r.generation),
        None => text += " on no agent",
    }
    if let Some(at) = r.deadline {
        text += &format!(", until {}", time(at));
    }
    if let Some(url) = &r.url {
        text += &format!(", at {url}");
    }
    if !r.reason.is_empty() {
        text += &format!(" ({})", r.reason);
    }
    text
}

pub fn agent(r: &Agent) -> String {
    let mut text = format!("agent {}", r.id);
    if r.is_online() {
        let connections: Vec<_> = r
            .connections
            .iter()
            .map(|(name, c)| format!("{name:?} epoch {} node {}", c.epoch, c.node))
            .collect();
        text += &format!(" online [{}]", connections.join(", "));
    } else {
        text += &format!(" offline ({})", r.offline_reason);
    }
    if let Some((replica, token)) = &r.leader {
        text += &format!(" led by {replica:?} under {token}");
    }
    match r.scheduling {
        Scheduling::Eligible => {}
        Scheduling::Cordoned => text += " cordoned",
        Scheduling::Draining { deadline: None } => text += " draining",
        Scheduling::Draining { deadline: Some(at) } => text += &format!(" draining until {}", time(at)),
    }
    text + &format!(" has {} of {}", usage(r.allocated), capacity(r.capacity))
}

pub fn command(r: &Command) -> String {
    let mut text = format!("command {} {}", r.id, r.action.as_str());
    if let Some(session) = &r.session {
        text += &format!(" {session} generation {}", r.generation);
    }
    text += &format!(" for {} {}", r.agent, r.state.as_str());
    match &r.state {
        CommandState::Pending { not_before } if *not_before > r.created_at => {
            text += &format!(", not before {}", time(*not_before));
        }
        CommandState::Sent { epoch, deadline, .. } if epoch.0 == 0 => {
            text += &format!(", again from {}", time(*deadline));
        }
        CommandState::Sent { epoch, deadline, .. } | CommandState::Acknowledged { epoch, deadline, .. } => {
            text += &format!(" under epoch {epoch}, until {}", time(*deadline));
        }
        CommandState::Completed { result, .. } => text += &format!(" {result}"),
        CommandState::Failed { error, .. } => text += &format!(" ({error})"),
        CommandState::Cancelled { reason, .. } => text += &format!(" ({reason})"),
        CommandState::Pending { .. } | CommandState::Expired { .. } => {}
    }
    if (r.run, r.attempts) != (1, 0) {
        text += &format!(", run {} attempt {}", r.run, r.attempts);
    }
    if let Some(error) = &r.last_error {
        text += &format!(", last error {error:?}");
    }
    text
}

pub fn lease(r: &Lease) -> String {
    format!(
        "lease {} held by {:?} ({}) under {} for {} ms",
        r.name, r.holder, r.owner, r.token, r.ttl_ms
    )
}

pub fn candidate(r: &Candidate) -> String {
    let over = match &r.connection {
        Some((replica, epoch)) => format!(" over {replica:?} epoch {epoch}"),
        None => String::new(),
    };
    format!(
        "{:?} ({}) waits for {} at {} since {}{over}, on node {}",
        r.holder, r.owner, r.lease, r.place, r.id, r.at.node
    )
}

fn usage(r: Usage) -> String {
    format!("{}/{}m/{}", r.sessions, r.cpu, r.memory)
}

fn capacity(r: Capacity) -> String {
    limits(r.max_sessions, r.cpu, r.memory)
}

fn quota(r: Quota) -> String {
    limits(r.sessions, r.cpu, r.memory)
}

fn limits(sessions: Option<u32>, cpu: Option<u64>, memory: Option<u64>) -> String {
    let show = |n: Option<u64>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    format!(
        "{}/{}m/{}",
        show(sessions.map(u64::from)),
        show(cpu),
        show(memory)
    )
}

/// `+12.5s` since the story began.
pub fn time(at: u64) -> String {
    let Some(since) = at.checked_sub(BEGIN) else {
        return at.to_string();
    };
    if since.is_multiple_of(1000) {
        format!("+{}s", since / 1000)
    } else {
        format!("+{}.{:03}s", since / 1000, since % 1000)
    }
}
