//! The steps of a story.
//!
//! A line is `[as=WHO] [key=K] [body=B] WORD ARGUMENT... NAME=VALUE...`; `as=` is `node` (the
//! cluster itself, as by default for what gateways and reconcilers do) or the id of a token; without
//! it the admin acts. `user alice` also makes the token `alice`, `agent dev` the token `agent-dev`.
//! A value that is not given is taken from the state: `sent c1` is sent with its run, its next
//! attempt and the leading epoch. Texts with spaces are written with `_`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use regent_state::operation::{
    AdmitMember, AgentConnected, Asked, Campaign, CreateCommand, CreateSession, CreateToken, InitCluster,
    PatchSession, RegisterAgent, ReportSession, Reported, ReportedSession, SessionOperation,
};
use regent_state::record::{
    Capacity, JoinScope, Labels, Placement, Quota, Role, Scheduling, Subject, WaitsAt,
};
use regent_state::{Caller, Idempotency, Leadership, Operation, Overdue};
use regent_types::{
    AgentId, CandidateId, ClusterId, CommandId, Epoch, LeaseName, NodeId, ReplicaName, Revision, SessionName,
    TemplateName, Token, TokenId, UserName,
};

use super::show;
use super::world::World;

/// A line taken apart.
struct Step<'a> {
    line: &'a str,
    word: &'a str,
    words: Vec<&'a str>,
    values: BTreeMap<&'a str, &'a str>,
}

impl<'a> Step<'a> {
    fn parse(line: &'a str) -> Self {
        let (values, mut words): (Vec<_>, Vec<_>) =
            line.split_whitespace().partition(|part| part.contains('='));
        assert!(!words.is_empty(), "a step needs a word: {line}");
        let word = words.remove(0);
        let values = values
            .into_iter()
            .filter_map(|part| part.split_once('='))
            .collect();
        Self {
            line,
            word,
            words,
            values,
        }
    }

    fn arg(&self, n: usize) -> &'a str {
        self.words
            .get(n)
            .unwrap_or_else(|| panic!("argument {} is missing: {}", n + 1, self.line))
    }

    fn flag(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    fn text(&self, name: &str, default: &str) -> String {
        self.values
            .get(name)
            .copied()
            .unwrap_or(default)
            .replace('_', " ")
    }

    fn raw(&self, name: &str) -> Option<&'a str> {
        self.values.get(name).copied()
    }

    /// A number: `12`, `2k`, `3s`, `5m`, `2h`, `512Mi`, `2Gi`; times are in milliseconds.
    fn number(&self, name: &str) -> Option<u64> {
        self.raw(name).map(number)
    }
}

fn number(text: &str) -> u64 {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match &text[digits.len()..] {
        "" | "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        unit => panic!("unknown unit {unit:?} in {text:?}"),
    };
    digits
        .parse::<u64>()
        .unwrap_or_else(|_| panic!("not a number: {text:?}"))
        * factor
}

fn session(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

fn agent(text: &str) -> AgentId {
    AgentId::new(text).unwrap()
}

fn command(text: &str) -> CommandId {
    CommandId::new(text).unwrap()
}

fn user(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

fn token(text: &str) -> TokenId {
    TokenId::new(text).unwrap()
}

/// `k:v,k:v`.
fn labels(text: Option<&str>) -> Labels {
    let pairs = text
        .unwrap_or_default()
        .split(',')
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once(':').unwrap())
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect()
}

/// A secret's hash, made from the token's id.
pub fn hash(id: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    for (at, byte) in id.bytes().enumerate() {
        hash[at % 32] ^= byte.rotate_left(u32::try_from(at / 32).unwrap());
    }
    hash
}

fn short_hash(text: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&hash(text)[..16]);
    short
}

fn reported(state: &str) -> Reported {
    match state {
        "starting" => Reported::Starting,
        "running" => Reported::Running,
        "hibernated" => Reported::Hibernated,
        "exited" => Reported::Exited,
        "failed" => Reported::Failed,
        other => panic!("unknown report {other:?}"),
    }
}

/// Does one line; gives what it shows.
pub fn run(world: &mut World, line: &str) -> String {
    let step = Step::parse(line);
    if let Some(text) = control(world, &step) {
        return text;
    }
    let (operation, by_node) = operation(world, &step);
    world.caller = match step.raw("as") {
        Some("node") => Caller::Node(NodeId(1)),
        Some(id) => Caller::Token(token(id)),
        None if by_node => Caller::Node(NodeId(1)),
        None => Caller::Token(token("admin")),
    };
    world.idempotency = step.raw("key").map(|key| Idempotency {
        key: short_hash(key),
        body: short_hash(step.raw("body").unwrap_or("body")),
    });
    let mut text = world.apply(operation);
    world.idempotency = None;
    match step.word {
        "user" => text += &make_token(world, step.arg(0), Subject::User(user(step.arg(0)))),
        "agent" if step.raw("as").is_none() => {
            let id = format!("agent-{}", step.arg(0));
            text += &make_token(world, &id, Subject::Agent(agent(step.arg(0))));
        }
        _ => {}
    }
    text
}

fn make_token(world: &mut World, id: &str, subject: Subject) -> String {
    if world.state.token(&token(id)).is_some() {
        return String::new();
    }
    let op = CreateToken {
        id: token(id),
        hash: hash(id),
        subject,
        description: String::new(),
        ttl_ms: None,
        login: None,
    };
    world.caller = Caller::Token(token("admin"));
    world.apply(Operation::CreateToken(op))
}

/// Steps that are no operations: the clock, and looking.
fn control(world: &mut World, step: &Step<'_>) -> Option<String> {
    let mut text = String::new();
    match step.word {
        "advance" => world.now += number(step.arg(0)),
        "leader" => {
            world.leadership = Leadership {
                term: number(step.arg(0)),
                node: NodeId(number(step.arg(1))),
            };
        }
        "snapshot" => world.take_snapshot(),
        "sessions" => world
            .state
            .sessions()
            .values()
            .for_each(|r| writeln!(text, "{}", show::session(r)).unwrap()),
        "agents" => world
            .state
            .agents()
            .values()
            .for_each(|r| writeln!(text, "{}", show::agent(r)).unwrap()),
        "commands" => world
            .state
            .commands()
            .values()
            .for_each(|r| writeln!(text, "{}", show::command(r)).unwrap()),
        "leases" => world
            .state
            .leases()
            .values()
            .for_each(|r| writeln!(text, "{}", show::lease(r)).unwrap()),
        "candidates" => world
            .state
            .candidates()
            .for_each(|r| writeln!(text, "{}", show::candidate(r)).unwrap()),
        "tokens" => world
            .state
            .tokens()
            .values()
            .for_each(|r| writeln!(text, "token {}", r.id).unwrap()),
        "users" => {
            world
                .state
                .users()
                .values()
                .for_each(|r| writeln!(text, "user {} {}", r.name, r.role.as_str()).unwrap());
        }
        "waiting" => {
            world
                .state
                .waiting_sessions()
                .for_each(|r| writeln!(text, "{}", show::session(r)).unwrap());
        }
        "queue" => {
            world
                .state
                .queue(&agent(step.arg(0)))
                .for_each(|r| writeln!(text, "{}", show::command(r)).unwrap());
        }
        "deliverable" => {
            let id = agent(step.arg(0));
            for r in world.state.deliverable(&id, world.now) {
                writeln!(text, "send {}", show::command(&r)).unwrap();
            }
            if let Some(at) = world.state.next_wakeup(&id) {
                writeln!(text, "wake at {}", show::time(at)).unwrap();
            }
        }
        "due" => {
            let (s, now, all) = (&world.state, world.now, usize::MAX);
            for overdue in s.overdue(now, all) {
                match overdue {
                    Overdue::Session { name, .. } => writeln!(text, "overdue: session {name}").unwrap(),
                    Overdue::Command { id, .. } => writeln!(text, "overdue: command {id}").unwrap(),
                }
            }
            s.drain_due(now, all)
                .iter()
                .for_each(|r| writeln!(text, "to drain: {}", r.name).unwrap());
            s.max_duration_due(now, all)
                .iter()
                .for_each(|r| writeln!(text, "at its end: {}", r.name).unwrap());
            s.idle_candidates()
                .for_each(|r| writeln!(text, "may idle: {}", r.name).unwrap());
            let next = s.next_deadline().map_or_else(|| "none".to_owned(), show::time);
            writeln!(text, "now {}, next deadline {next}", show::time(now)).unwrap();
        }
        "kept" => {
            let s = &world.state;
            writeln!(
                text,
                "{} sessions, {} commands, {} tokens, {} keys, {} events from {}; prune: {}",
                s.sessions().len(),
                s.commands().len(),
                s.tokens().len(),
                s.idempotency_count(),
                s.events().len(),
                s.events_floor(),
                s.needs_prune(world.now)
            )
            .unwrap();
        }
        _ => return None,
    }
    Some(text)
}

/// The operation of a step, and whether the cluster itself does it.
fn operation(world: &World, step: &Step<'_>) -> (Operation, bool) {
    let state = &world.state;
    let leading = |id: &AgentId| {
        let connection = state.agent(id).and_then(|a| match step.raw("replica") {
            Some(replica) => a.connections.get(&ReplicaName::new(replica).unwrap()),
            None => a.leading(),
        });
        step.number("epoch")
            .or(connection.map(|c| c.epoch.0))
            .map_or(Epoch(0), Epoch)
    };
    let run = step.number("run").map(|run| u32::try_from(run).unwrap());
    let action = || SessionOperation {
        name: session(step.arg(0)),
        command: command(
            step.raw("command")
                .unwrap_or_else(|| panic!("command= is missing: {}", step.line)),
        ),
        reason: step.text("reason", ""),
        if_match: step.number("if-match").map(Revision),
    };
    let agent_of = |id: &CommandId| match step.raw("agent") {
        Some(id) => agent(id),
        None => state
            .command(id)
            .map_or_else(|| agent("nobody"), |c| c.agent.clone()),
    };
    match step.word {
        "init" => {
            let op = InitCluster {
                cluster_id: ClusterId::new(step.raw("cluster").unwrap_or("c1")).unwrap(),
                feature_level: step
                    .number("level")
                    .map_or(2, |level| u32::try_from(level).unwrap()),
                admin: user("admin"),
                password_hash: None,
                token: Some((token("admin"), hash("admin"))),
            };
            (Operation::InitCluster(op), true)
        }
        "user" => {
            let role = match step.raw("role").unwrap_or("user") {
                "user" => Role::User,
                "operator" => Role::Operator,
                "admin" => Role::Admin,
                "agent" => Role::Agent,
                other => panic!("unknown role {other:?}"),
            };
            let op = Operation::CreateUser {
                name: user(step.arg(0)),
                password_hash: "hash-1".to_owned(),
                role,
                quota: quota(step),
            };
            (op, false)
        }
        "delete-user" => (
            Operation::DeleteUser {
                name: user(step.arg(0)),
            },
            false,
        ),
        "password" => {
            let op = Operation::SetPassword {
                name: user(step.arg(0)),
                password_hash: step.arg(1).to_owned(),
            };
            (op, false)
        }
        "quota" => (
            Operation::SetQuota {
                name: user(step.arg(0)),
                quota: quota(step),
            },
            false,
        ),
        "admit" => {
            let op = AdmitMember {
                id: NodeId(number(step.arg(0))),
                incarnation: short_hash(step.raw("folder").unwrap_or(step.arg(0))),
                peer: step.text("peer", "peer:1"),
                http: step.text("http", "http://node:1"),
                token: step.raw("token").map(hash),
            };
            (Operation::AdmitMember(op), true)
        }
        "moved" => {
            let op = Operation::MemberMoved {
                id: NodeId(number(step.arg(0))),
                peer: step.text("peer", "peer:1"),
                http: step.text("http", "http://node:1"),
            };
            (op, true)
        }
        "remove-member" => {
            let op = Operation::RemoveMember {
                id: NodeId(number(step.arg(0))),
                reason: step.text("reason", ""),
            };
            (op, false)
        }
        "enrol" => {
            let token = CreateToken {
                id: token(step.arg(0)),
                hash: hash(step.arg(0)),
                subject: Subject::Agent(agent(step.raw("agent").unwrap_or("dev"))),
                description: String::new(),
                ttl_ms: None,
                login: None,
            };
            let join = hash(step.raw("token").unwrap_or("none"));
            (Operation::EnrolAgent { join, token }, true)
        }
        "asked" => {
            let asked = match (step.raw("transfer"), step.raw("promote")) {
                (Some("any"), None) => Asked::Transfer(None),
                (Some(to), None) => Asked::Transfer(Some(NodeId(number(to)))),
                (None, Some(id)) => Asked::Promote(NodeId(number(id))),
                _ => Asked::Backup,
            };
            (Operation::Asked(asked), false)
        }
        "raise-level" => {
            let level = step.arg(0).parse().unwrap();
            (Operation::RaiseFeatureLevel { level }, true)
        }
        "token" => {
            let subject = match (step.raw("user"), step.raw("agent"), step.raw("join")) {
                (Some(name), None, None) => Subject::User(user(name)),
                (None, Some(id), None) => Subject::Agent(agent(id)),
                (None, None, Some("node")) => Subject::Join(JoinScope::Node),
                (None, None, Some(pattern)) => Subject::Join(JoinScope::Agent(pattern.to_owned())),
                _ => panic!("one of user=, agent= and join=: {}", step.line),
            };
            let op = CreateToken {
                id: token(step.arg(0)),
                hash: hash(step.arg(0)),
                subject,
                description: String::new(),
                ttl_ms: step.number("ttl"),
                login: step.raw("login").map(str::to_owned),
            };
            let by_node = op.login.is_some();
            (Operation::CreateToken(op), by_node)
        }
        "revoke" => (
            Operation::DeleteToken {
                id: token(step.arg(0)),
            },
            false,
        ),
        "template" => {
            let op = Operation::PutTemplate {
                name: TemplateName::new(step.arg(0)).unwrap(),
                manifest: step.text("manifest", "{}"),
                cpu: step.number("cpu").unwrap_or(100),
                memory: step.number("memory").unwrap_or(1 << 20),
                create_only: step.flag("create-only"),
                if_match: step.number("if-match").map(Revision),
            };
            (op, false)
        }
        "delete-template" => (
            Operation::DeleteTemplate {
                name: TemplateName::new(step.arg(0)).unwrap(),
            },
            false,
        ),
        "agent" => {
            let op = RegisterAgent {
                id: agent(step.arg(0)),
                platform: step.raw("platform").unwrap_or("process").to_owned(),
                region: step.raw("region").unwrap_or_default().to_owned(),
                capacity: capacity(step),
                labels: labels(step.raw("labels")),
                metadata: match step.raw("runs") {
                    Some(runs) => format!(r#"{{"runs":["{}"]}}"#, runs.replace(',', r#"",""#)),
                    None => "{}".to_owned(),
                },
            };
            (Operation::RegisterAgent(op), false)
        }
        "delete-agent" => (
            Operation::DeleteAgent {
                id: agent(step.arg(0)),
                force: step.flag("force"),
            },
            false,
        ),
        "cordon" | "uncordon" | "drain" => {
            let scheduling = match step.word {
                "cordon" => Scheduling::Cordoned,
                "uncordon" => Scheduling::Eligible,
                _ => Scheduling::Draining { deadline: None },
            };
            let op = Operation::SetScheduling {
                id: agent(step.arg(0)),
                scheduling,
                deadline_ms: step.number("deadline"),
            };
            (op, false)
        }
        "connect" => {
            let id = step.arg(0);
            let sessions = match step.raw("sessions") {
                None | Some("unknown") => None,
                Some(list) => Some(
                    list.split(',')
                        .filter(|one| !one.is_empty())
                        .map(reported_session)
                        .collect(),
                ),
            };
            let default_token = format!("agent-{id}");
            let op = AgentConnected {
                agent: agent(id),
                replica: ReplicaName::new(step.raw("replica").unwrap_or_default()).unwrap(),
                node: NodeId(step.number("node").unwrap_or(1)),
                token: token(step.raw("token").unwrap_or(&default_token)),
                protocol: step.number("protocol").map_or(3, |p| u32::try_from(p).unwrap()),
                stale_ms: step.number("stale").unwrap_or(4_000),
                runtime_id: step.raw("runtime").unwrap_or_default().to_owned(),
                sessions,
                command_seed: command(
                    &step
                        .raw("seed")
                        .map_or_else(|| format!("r{}", state.revision()), str::to_owned),
                ),
            };
            let since = step.raw("since").map(|since| match since {
                "current" => state.revision(),
                since => Revision(number(since)),
            });
            let operation = if op.replica.as_str().is_empty() {
                match since {
                    None => Operation::AgentConnected(op),
                    Some(since) => Operation::ConnectedSince {
                        since,
                        connected: op,
                        replica: None,
                    },
                }
            } else {
                let held = || {
                    state
                        .lease(&LeaseName::of_agent(&agent(id)))
                        .map(|lease| lease.token)
                };
                let holds = match step.raw("holds") {
                    Some("current") => held(),
                    Some(token) => Some(Token(number(token))),
                    None => None,
                };
                let at = waits_at(step);
                match since {
                    None => Operation::ReplicaConnected {
                        connected: op,
                        holds,
                        at,
                    },
                    Some(since) => Operation::ConnectedSince {
                        since,
                        connected: op,
                        replica: Some((holds, at)),
                    },
                }
            };
            (operation, true)
        }
        "disconnect" => {
            let id = agent(step.arg(0));
            let op = Operation::AgentDisconnected {
                replica: ReplicaName::new(step.raw("replica").unwrap_or_default()).unwrap(),
                epoch: leading(&id),
                reason: step.text("reason", "connection lost"),
                agent: id,
            };
            (op, true)
        }
        "capacity" => {
            let id = agent(step.arg(0));
            (
                Operation::AgentCapacity {
                    epoch: leading(&id),
                    agent: id,
                    capacity: capacity(step),
                },
                true,
            )
        }
        "create" => {
            let op = CreateSession {
                name: session(step.arg(0)),
                command: command(
                    step.raw("command")
                        .unwrap_or_else(|| panic!("command=: {}", step.line)),
                ),
                user: user(step.raw("user").unwrap_or("admin")),
                template: TemplateName::new(step.raw("template").unwrap_or("demo")).unwrap(),
                cpu: step.number("cpu"),
                memory: step.number("memory"),
                persistent_home: false,
                idle_timeout: step.number("idle"),
                max_duration: step.number("max"),
                tags: step
                    .raw("tags")
                    .map_or_else(|| [].into(), |t| t.split(',').map(str::to_owned).collect()),
                placement: Placement {
                    platform: step.raw("platform").map(str::to_owned),
                    region: step.raw("region").map(str::to_owned),
                    labels: labels(step.raw("labels")),
                },
                queue: step.flag("queue"),
            };
            (Operation::CreateSession(op), false)
        }
        "patch" => {
            let limit = |name: &str| match step.raw(name) {
                None => None,
                Some("none") => Some(None),
                Some(value) => Some(Some(number(value))),
            };
            let op = PatchSession {
                name: session(step.arg(0)),
                if_match: step.number("if-match").map(Revision),
                tags: step
                    .raw("tags")
                    .map(|t| t.split(',').map(str::to_owned).collect()),
                idle_timeout: limit("idle"),
                max_duration: limit("max"),
            };
            (Operation::PatchSession(op), false)
        }
        "stop" => (Operation::StopSession(action()), false),
        "hibernate" => (Operation::HibernateSession(action()), false),
        "wake" => (Operation::WakeSession(action()), false),
        "place" => {
            let pairs = step.words.iter().map(|pair| pair.split_once(':').unwrap());
            (
                Operation::PlaceQueued(pairs.map(|(name, id)| (session(name), command(id))).collect()),
                true,
            )
        }
        "session-overdue" => {
            let name = session(step.arg(0));
            let changed = step.number("changed").map(Revision);
            let changed = changed
                .or_else(|| state.session(&name).map(|s| s.changed))
                .unwrap_or_default();
            let op = Operation::SessionOverdue {
                changed,
                command: command(
                    step.raw("command")
                        .unwrap_or_else(|| panic!("command=: {}", step.line)),
                ),
                name,
            };
            (op, true)
        }
        "report" => {
            let id = agent(step.arg(0));
            let op = ReportSession {
                epoch: leading(&id),
                agent: id,
                session: ReportedSession {
                    name: session(step.arg(1)),
                    state: reported(step.arg(2)),
                    generation: step.number("generation"),
                    reason: step.text("reason", ""),
                    url: step.raw("url").map(str::to_owned),
                    metadata: step.text("metadata", ""),
                },
            };
            (Operation::ReportSession(op), true)
        }
        "command" => {
            let op = CreateCommand {
                id: command(step.arg(0)),
                agent: agent(step.raw("agent").unwrap_or("dev")),
                session: step.raw("session").map(session),
                action: step.raw("action").unwrap_or("custom").to_owned(),
                payload: step.text("payload", "{}"),
                expires_ms: step.number("expires"),
            };
            (Operation::CreateCommand(op), false)
        }
        "sent" => {
            let id = command(step.arg(0));
            let known = state.command(&id);
            let attempt = step.number("attempt").map(|n| u32::try_from(n).unwrap());
            let op = Operation::CommandSent {
                run: run.or_else(|| known.map(|c| c.run)).unwrap_or(1),
                epoch: leading(&agent_of(&id)),
                attempt: attempt.unwrap_or_else(|| known.map_or(1, |c| c.attempts + 1)),
                id,
            };
            (op, true)
        }
        "ack" => {
            let id = command(step.arg(0));
            let by = agent_of(&id);
            (
                Operation::CommandAcked {
                    id,
                    run,
                    epoch: leading(&by),
                    agent: by,
                },
                true,
            )
        }
        "complete" => {
            let id = command(step.arg(0));
            let by = agent_of(&id);
            let op = Operation::CommandCompleted {
                id,
                run,
                epoch: leading(&by),
                agent: by,
                result: step.text("result", "{}"),
                url: step.raw("url").map(str::to_owned),
                metadata: step.raw("metadata").map(str::to_owned),
            };
            (op, true)
        }
        "fail" => {
            let id = command(step.arg(0));
            let by = agent_of(&id);
            let op = Operation::CommandFailed {
                id,
                run,
                epoch: leading(&by),
                agent: by,
                error: step.text("error", "broken"),
                retryable: step.flag("retryable"),
            };
            (op, true)
        }
        "overdue" => {
            let id = command(step.arg(0));
            let changed = step.number("changed").map(Revision);
            let changed = changed
                .or_else(|| state.command(&id).map(|c| c.changed))
                .unwrap_or_default();
            (Operation::CommandOverdue { id, changed }, true)
        }
        "cancel" => (
            Operation::CancelCommand {
                id: command(step.arg(0)),
            },
            false,
        ),
        "retry" => (
            Operation::RetryCommand {
                id: command(step.arg(0)),
            },
            false,
        ),
        "acquire" => {
            let op = Operation::AcquireLease {
                name: LeaseName::new(step.arg(0)).unwrap(),
                holder: step.text("holder", "somebody"),
                ttl_ms: step.number("ttl").unwrap_or(5_000),
            };
            (op, false)
        }
        "release" => (
            Operation::ReleaseLease {
                name: lease(step),
                token: lease_token(world, step),
            },
            false,
        ),
        "force-release" => (
            Operation::ForceReleaseLease {
                name: lease(step),
                reason: step.text("reason", ""),
            },
            false,
        ),
        "expire" => {
            let leadership = decided_by(world, step);
            let leases = vec![(lease(step), lease_token(world, step))];
            (Operation::ExpireLeases { leadership, leases }, true)
        }
        "end" => {
            let leases = step.words.iter().map(|name| LeaseName::new(name).unwrap());
            let leases = leases.filter_map(|name| Some((name.clone(), state.lease(&name)?.token)));
            let lapsed = step.raw("lapsed").into_iter().flat_map(|list| list.split(','));
            let lapsed = lapsed.map(|one| {
                let (name, place) = one.rsplit_once('@').unwrap();
                let (name, place) = (LeaseName::new(name).unwrap(), Revision(number(place)));
                let there = state.candidate_at(&name, place).map(|candidate| candidate.at);
                let at = WaitsAt {
                    node: step
                        .number("node")
                        .map_or(there.map_or(NodeId(1), |at| at.node), NodeId),
                    start: there.map_or(1, |at| at.start),
                };
                (name, place, at)
            });
            let op = Operation::EndLeases {
                leadership: decided_by(world, step),
                leases: leases.collect(),
                lapsed: lapsed.collect(),
            };
            (op, true)
        }
        "campaign" => {
            let name = lease(step);
            let connection = step.raw("replica").map(|replica| {
                let replica = ReplicaName::new(replica).unwrap();
                let connected = name.agent().and_then(|id| state.agent(&id).cloned());
                let current = connected.and_then(|a| a.connections.get(&replica).map(|c| c.epoch));
                let epoch = step.number("epoch").map(Epoch).or(current).unwrap_or_default();
                (replica, epoch)
            });
            let by_node = connection.is_some();
            let candidate = step.raw("candidate").or(step.raw("replica")).unwrap_or("someone");
            let op = Campaign {
                name,
                candidate: CandidateId::new(candidate).unwrap(),
                holder: step.text("holder", candidate),
                ttl_ms: step.number("ttl").unwrap_or(5_000),
                at: waits_at(step),
                connection,
                resume: step.number("resume").map(Token),
            };
            (Operation::Campaign(op), by_node)
        }
        "withdraw" => {
            let op = Operation::Withdraw {
                name: lease(step),
                candidate: CandidateId::new(step.raw("candidate").unwrap_or("someone")).unwrap(),
                at: waits_at(step),
            };
            (op, false)
        }
        "abandon" => {
            let op = Operation::ReleaseAbandoned {
                name: lease(step),
                token: lease_token(world, step),
                agent: agent(step.raw("agent").unwrap_or("dev")),
                replica: ReplicaName::new(step.raw("replica").unwrap_or_default()).unwrap(),
                epoch: Epoch(step.number("epoch").unwrap_or_default()),
            };
            (op, true)
        }
        "prune" => (Operation::Prune, true),
        other => panic!("unknown step {other:?} in {:?}", step.line),
    }
}

/// The leadership that decided it, as `TERM/NODE`; the one that is when it is not given.
fn decided_by(world: &World, step: &Step<'_>) -> Leadership {
    match step.raw("leadership").and_then(|text| text.split_once('/')) {
        Some((term, node)) => Leadership {
            term: number(term),
            node: NodeId(number(node)),
        },
        None => world.leadership,
    }
}

fn waits_at(step: &Step<'_>) -> WaitsAt {
    WaitsAt {
        node: NodeId(step.number("node").unwrap_or(1)),
        start: step.number("start").unwrap_or(1),
    }
}

fn lease(step: &Step<'_>) -> LeaseName {
    LeaseName::new(step.arg(0)).unwrap()
}

fn lease_token(world: &World, step: &Step<'_>) -> Token {
    let held = || world.state.lease(&lease(step)).map(|lease| lease.token);
    step.number("token").map(Token).or_else(held).unwrap_or_default()
}

fn capacity(step: &Step<'_>) -> Capacity {
    Capacity {
        max_sessions: step.number("sessions").map(|n| u32::try_from(n).unwrap()),
        cpu: step.number("cpu"),
        memory: step.number("memory"),
    }
}

fn quota(step: &Step<'_>) -> Quota {
    Quota {
        sessions: step.number("sessions").map(|n| u32::try_from(n).unwrap()),
        cpu: step.number("cpu"),
        memory: step.number("memory"),
    }
}

/// `name:running`, `name:running:2` with a generation.
fn reported_session(text: &str) -> ReportedSession {
    let mut parts = text.split(':');
    ReportedSession {
        name: session(parts.next().unwrap()),
        state: reported(parts.next().unwrap()),
        generation: parts.next().map(number),
        reason: String::new(),
        url: None,
        metadata: String::new(),
    }
}
