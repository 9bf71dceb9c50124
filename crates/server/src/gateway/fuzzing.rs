//! A conversation with an agent, as [`crate::fuzzing`] offers it: the connection's core over a state of its own, told
//! whatever text frames there are. What the core asks for is applied, so that decoder, conversion and state machine
//! are all behind it.

use std::collections::BTreeMap;

use regent_state::operation::{Campaign, CreateCommand, InitCluster, RegisterAgent};
use regent_state::record::{Capacity, CommandState, WaitsAt};
use regent_state::{Caller, Leadership, Meta, Operation, Outcome, Rejection, Request, State};
use regent_types::frame::{MAX_FRAME, ServerFrame};
use regent_types::{AgentId, ClusterId, CommandId, NodeId, ReplicaName, Revision, Time, TokenId, UserName};

use super::connection::{Connection, Effect, Identity, Join, Joined};

const NODE: NodeId = NodeId(1);
/// Frames of one conversation.
const MAX_FRAMES: usize = 64;

/// Frames by lines; a byte before the first says whether it is a replica's connection.
pub fn agent_frames(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else {
        return;
    };
    let mut stage = Stage::new();
    let replica = if kind % 2 == 1 { "r1" } else { "" };
    let mut connection = Connection::new(stage.identity(replica), stage.now);
    for line in rest.split(|byte| *byte == b'\n').take(MAX_FRAMES) {
        let Ok(text) = std::str::from_utf8(line) else {
            connection.on_binary(stage.now);
            continue;
        };
        if text.len() > MAX_FRAME || stage.closed || !connection.wants_frames() {
            break;
        }
        connection.on_text(text, stage.now, Time(stage.now), &stage.state);
        stage.settle(&mut connection);
        stage.now += 500;
        connection.on_time(stage.now, Time(stage.now));
        stage.settle(&mut connection);
    }
    if let Err(error) = stage.state.check() {
        panic!("the state contradicts itself: {error}");
    }
}

/// Conversations to begin with.
#[must_use]
pub fn conversation() -> Vec<Vec<u8>> {
    let current = [
        r#"{"type":"hello","timestamp":1700000000,"payload":{"protocol":3,"features":["x"],"runtimeId":"r","sessions":[{"sessionId":"alice-demo-1","state":"running","generation":1,"token":3,"url":"http://a"}],"leases":[{"name":"jobs","token":5,"releaseOnDisconnect":{"graceMs":100}}]}}"#,
        r#"{"type":"heartbeat","timestamp":"2026-01-01T00:00:00Z","payload":{"status":"ok","activeSessions":1,"capacity":{"maxSessions":5,"cpu":"64 cores","memory":"128GB"}}}"#,
        r#"{"type":"ack","payload":{"commandId":"note-1","run":1}}"#,
        r#"{"type":"progress","payload":{"commandId":"note-1","message":"half","percent":50.5}}"#,
        r#"{"type":"complete","payload":{"commandId":"note-1","run":1,"result":{"url":"http://a","metadata":{"pid":"7"}}}}"#,
        r#"{"type":"failed","payload":{"commandId":"note-2","error":"no","retryable":true}}"#,
        r#"{"type":"status","payload":{"sessionId":"alice-demo-1","state":"Running","reason":"r","generation":1,"metadata":{"a":1}}}"#,
        r#"{"type":"lease_campaign","payload":{"name":"jobs","ttlMs":5000,"token":5,"releaseOnDisconnect":{"graceMs":100}}}"#,
        r#"{"type":"lease_keepalive","payload":{"name":"jobs","token":5,"seq":9}}"#,
        r#"{"type":"lease_release","payload":{"name":"jobs","token":5}}"#,
        r#"{"type":"unknown","payload":[]}"#,
        r#"{"type":"pong"}"#,
    ];
    let v2 = [
        r#"{"type":"heartbeat","timestamp":1700000000000,"status":"online","activeSessions":2}"#,
        r#"{"type":"ack","commandId":"note-1"}"#,
        r#"{"type":"command_error","payload":{"commandId":"note-1","error":"already exists"}}"#,
        r#"{"type":"status","payload":{"sessionId":"alice-demo-1","state":"hibernated","platformMetadata":{"a":1}}}"#,
    ];
    vec![
        [b"\0".to_vec(), current.join("\n").into_bytes()].concat(),
        [b"\x01".to_vec(), current.join("\n").into_bytes()].concat(),
        [b"\0".to_vec(), v2.join("\n").into_bytes()].concat(),
    ]
}

struct Stage {
    state: State,
    now: u64,
    closed: bool,
}

impl Stage {
    /// A cluster with one agent and two commands for it.
    fn new() -> Self {
        let mut stage = Self {
            state: State::new(),
            now: 1_000_000,
            closed: false,
        };
        let init = Operation::InitCluster(InitCluster {
            cluster_id: ClusterId::new("c").expect("it is one"),
            feature_level: 1,
            admin: UserName::new("admin").expect("it is one"),
            password_hash: None,
            token: Some((token(), [1; 32])),
        });
        stage.own(init).expect("an empty state takes it");
        let register = RegisterAgent {
            id: agent(),
            platform: "process".to_owned(),
            region: String::new(),
            capacity: Capacity {
                max_sessions: Some(10),
                cpu: Some(8_000),
                memory: None,
            },
            labels: BTreeMap::new(),
            metadata: "{}".to_owned(),
        };
        stage
            .admin(Operation::RegisterAgent(register))
            .expect("an admin may");
        for id in ["note-1", "note-2"] {
            let command = CreateCommand {
                id: CommandId::new(id).expect("it is one"),
                agent: agent(),
                session: None,
                action: "note".to_owned(),
                payload: r#"{"n":1}"#.to_owned(),
                expires_ms: None,
            };
            stage
                .admin(Operation::CreateCommand(command))
                .expect("there is room");
        }
        stage
    }

    fn apply(&mut self, caller: Caller, operation: Operation) -> Result<Outcome, Rejection> {
        let meta = Meta {
            revision: Revision(self.state.revision().0 + 1),
            leadership: Leadership { term: 1, node: NODE },
            at: self.now,
        };
        let request = Request {
            caller,
            idempotency: None,
            operation,
        };
        // As it goes through the log.
        let request = Request::decode(&request.encode()).expect("what was encoded decodes");
        self.state.apply(&meta, &request)
    }

    fn own(&mut self, operation: Operation) -> Result<Outcome, Rejection> {
        self.apply(Caller::Node(NODE), operation)
    }

    fn admin(&mut self, operation: Operation) -> Result<Outcome, Rejection> {
        self.apply(Caller::Token(token()), operation)
    }

    fn identity(&self, replica: &str) -> Identity {
        Identity {
            agent: agent(),
            replica: ReplicaName::new(replica).expect("it is a name"),
            token: token(),
            node: NODE,
            heartbeat_ms: 1_000,
            stale_ms: 4_000,
            since: self.state.revision(),
            says_hello: false,
        }
    }

    fn join(&mut self, join: Join) -> Joined {
        let seed = CommandId::new(format!("seed-{}", self.state.revision())).expect("it is one");
        let operation = join.operation(&self.identity(""), WaitsAt { node: NODE, start: 1 }, seed);
        match self.own(operation) {
            Ok(Outcome::Connected { epoch, token }) => Joined::Yes { epoch, token },
            Ok(other) => Joined::Unavailable(format!("{other:?}")),
            Err(rejection) => Joined::Refused(rejection),
        }
    }

    /// Does what the connection asks for, until it asks for nothing more.
    fn settle(&mut self, connection: &mut Connection) {
        // Bounded: a core that never comes to rest is a fault.
        for _ in 0..1_000 {
            connection.on_state(&self.state, self.now, self.now, Time(self.now));
            let effects = connection.take_effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                self.perform(connection, effect);
            }
        }
        panic!("the connection asks for ever");
    }

    fn perform(&mut self, connection: &mut Connection, effect: Effect) {
        let (now, wall) = (self.now, Time(self.now));
        match effect {
            Effect::Join(join) => {
                let joined = self.join(join);
                connection.joined(joined, now, wall, &self.state);
            }
            Effect::Report { subject, operation } => {
                let applied = self.own(operation);
                self.kept();
                connection.reported(&subject, Ok(applied));
            }
            Effect::Hand {
                id,
                run,
                attempt,
                epoch,
            } => {
                let sent = Operation::CommandSent {
                    id: id.clone(),
                    run,
                    epoch,
                    attempt,
                };
                let applied = self.own(sent);
                let decided = Ok((self.state.revision(), applied));
                connection.handed((id, run, attempt, epoch), decided, (&self.state, now, wall));
            }
            Effect::Campaign {
                name,
                candidate,
                ttl_ms,
                resume,
                epoch,
            } => {
                let campaign = Operation::Campaign(Campaign {
                    name: name.clone(),
                    candidate,
                    holder: "h".to_owned(),
                    ttl_ms,
                    at: WaitsAt { node: NODE, start: 1 },
                    connection: epoch.map(|epoch| (connection.replica().clone(), epoch)),
                    resume,
                });
                let applied = match epoch {
                    Some(_) => self.own(campaign),
                    None => self.admin(campaign),
                };
                let decided = Ok((self.state.revision(), applied));
                connection.campaigned(name, decided, now, wall);
            }
            Effect::Release { name, token, own } => {
                let release = Operation::ReleaseLease { name, token };
                // Whether it was still held is for the state to say.
                let _ = if own {
                    self.own(release)
                } else {
                    self.admin(release)
                };
            }
            Effect::Renew { name, token, seq } => {
                connection.renewed(&name, token, seq, Ok(5_000), wall);
            }
            Effect::Send(text) => {
                // Commands for StreamSpace's agents have less in them than ours read.
                let read = if text.contains("\"timestamp\"") {
                    ServerFrame::parse(&text).is_ok_and(|frame| frame.is_some())
                } else {
                    serde_json::from_str::<serde_json::Value>(&text).is_ok()
                };
                assert!(read, "an agent cannot read {text}");
            }
            Effect::Taken(_) | Effect::Ping => {}
            Effect::Close { reason, .. } => {
                assert!(reason.len() < 16 << 10, "a reason has {} bytes", reason.len());
                self.closed = true;
            }
        }
    }

    /// What agents say is kept, and shown to whoever asks.
    fn kept(&self) {
        for command in self.state.commands().values() {
            if let CommandState::Completed { result, .. } = &command.state {
                crate::http::fuzzing::kept(result);
            }
        }
        for session in self.state.sessions().values() {
            crate::http::fuzzing::kept(&session.metadata);
        }
    }
}

fn agent() -> AgentId {
    AgentId::new("a").expect("it is one")
}

fn token() -> TokenId {
    TokenId::new("t").expect("it is one")
}
