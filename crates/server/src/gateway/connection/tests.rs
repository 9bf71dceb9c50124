//! A connection without a socket: its effects are applied to a state, and time is what the test says.

use std::collections::VecDeque;

use regent_state::operation::{Campaign, CreateCommand, InitCluster, RegisterAgent};
use regent_state::record::{Capacity, WaitsAt};
use regent_state::{Caller, Leadership, Meta, Request};
use regent_types::frame::{CLOSE_SUPERSEDED, ServerFrame};
use regent_types::{ClusterId, Revision, UserName};

use regent_state::{Outcome, Rejection};
use regent_types::frame::CommandFrame;
use serde_json::Value;

mod replicas;

use super::*;
use crate::keepalive::KeepaliveError;
use crate::service::ServiceError;

const NODE: NodeId = NodeId(1);
const LEADERSHIP: Leadership = Leadership { term: 1, node: NODE };
const HEARTBEAT: u64 = 1_000;
const STALE: u64 = 4_000;
const HELLO: &str = r#"{"type":"hello","payload":{"protocol":3,"runtimeId":"r","sessions":[]}}"#;

/// The state, the clock, and what became of the effects.
struct World {
    state: State,
    now: u64,
    sent: VecDeque<String>,
    renewals: Vec<(LeaseName, Token, Option<u64>)>,
    closed: Option<(u16, String)>,
    pings: u32,
    taken: Vec<LeaseName>,
}

impl World {
    fn new() -> Self {
        let state = State::new();
        let mut world = Self {
            state,
            now: 1_000_000,
            sent: VecDeque::new(),
            renewals: vec![],
            closed: None,
            pings: 0,
            taken: vec![],
        };
        let admin = UserName::new("admin").unwrap();
        let token = Some((TokenId::new("t").unwrap(), [1; 32]));
        let cluster_id = ClusterId::new("c").unwrap();
        let init = InitCluster {
            cluster_id,
            feature_level: 1,
            admin,
            password_hash: None,
            token,
        };
        world.own(Operation::InitCluster(init)).unwrap();
        let register = RegisterAgent {
            id: agent(),
            platform: "process".to_owned(),
            region: String::new(),
            capacity: Capacity {
                max_sessions: Some(10),
                cpu: Some(8_000),
                memory: None,
            },
            labels: std::collections::BTreeMap::new(),
            metadata: "{}".to_owned(),
        };
        world.admin(Operation::RegisterAgent(register)).unwrap();
        world
    }

    fn apply(&mut self, caller: Caller, operation: Operation) -> Result<Outcome, Rejection> {
        let revision = Revision(self.state.revision().0 + 1);
        let meta = Meta {
            revision,
            leadership: LEADERSHIP,
            at: self.now,
        };
        self.state.apply(
            &meta,
            &Request {
                caller,
                idempotency: None,
                operation,
            },
        )
    }

    fn own(&mut self, operation: Operation) -> Result<Outcome, Rejection> {
        self.apply(Caller::Node(NODE), operation)
    }

    fn admin(&mut self, operation: Operation) -> Result<Outcome, Rejection> {
        self.apply(Caller::Token(TokenId::new("t").unwrap()), operation)
    }

    fn connection(&self) -> Connection {
        self.connection_of("")
    }

    fn connection_of(&self, replica: &str) -> Connection {
        Connection::new(self.identity(replica), self.now)
    }

    fn identity(&self, replica: &str) -> Identity {
        Identity {
            agent: agent(),
            replica: ReplicaName::new(replica).unwrap(),
            token: TokenId::new("t").unwrap(),
            node: NODE,
            heartbeat_ms: HEARTBEAT,
            stale_ms: STALE,
            since: self.state.revision(),
            says_hello: false,
        }
    }

    fn join(&mut self, join: Join) -> Joined {
        let seed = CommandId::new(format!("seed-{}", self.state.revision())).expect("it is one");
        let operation = join.operation(&self.identity(""), WaitsAt { node: NODE, start: 1 }, seed);
        match self.own(operation) {
            Ok(Outcome::Connected { epoch, token }) => Joined::Yes { epoch, token },
            Ok(other) => panic!("{other:?}"),
            Err(rejection) => Joined::Refused(rejection),
        }
    }

    /// Does what the connection asks for, until it asks for nothing more.
    fn settle(&mut self, connection: &mut Connection) {
        loop {
            connection.on_state(&self.state, self.now, self.now, Time(self.now));
            let effects = connection.take_effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Join(join) => {
                        let joined = self.join(join);
                        connection.joined(joined, self.now, Time(self.now), &self.state);
                    }
                    Effect::Report { subject, operation } => {
                        let decided = Ok(self.own(operation));
                        connection.reported(&subject, decided);
                    }
                    Effect::Hand {
                        id,
                        run,
                        attempt,
                        epoch,
                    } => {
                        let applied = self.own(Operation::CommandSent {
                            id: id.clone(),
                            run,
                            epoch,
                            attempt,
                        });
                        let decided = Ok((self.state.revision(), applied));
                        connection.handed(
                            (id, run, attempt, epoch),
                            decided,
                            (&self.state, self.now, Time(self.now)),
                        );
                    }
                    Effect::Campaign {
                        name,
                        candidate,
                        ttl_ms,
                        resume,
                        epoch,
                    } => {
                        let replica = connection.replica().clone();
                        let campaign = Operation::Campaign(Campaign {
                            name: name.clone(),
                            candidate,
                            holder: "h".into(),
                            ttl_ms,
                            at: WaitsAt { node: NODE, start: 1 },
                            connection: epoch.map(|epoch| (replica, epoch)),
                            resume,
                        });
                        let applied = match epoch {
                            Some(_) => self.own(campaign),
                            None => self.admin(campaign),
                        };
                        let decided = Ok((self.state.revision(), applied));
                        connection.campaigned(name, decided, self.now, Time(self.now));
                    }
                    Effect::Taken(name) => self.taken.push(name),
                    Effect::Release { name, token, own } => {
                        let release = Operation::ReleaseLease { name, token };
                        let released = if own {
                            self.own(release)
                        } else {
                            self.admin(release)
                        };
                        released.unwrap();
                    }
                    Effect::Renew { name, token, seq } => self.renewals.push((name, token, seq)),
                    Effect::Send(text) => self.sent.push_back(text),
                    Effect::Ping => self.pings += 1,
                    Effect::Close { code, reason } => self.closed = Some((code, reason)),
                }
            }
        }
    }

    fn text(&mut self, connection: &mut Connection, text: &str) {
        connection.on_text(text, self.now, Time(self.now), &self.state);
        self.settle(connection);
    }

    /// Lets time pass in steps of the connection's own timers.
    fn pass(&mut self, connection: &mut Connection, ms: u64) {
        let until = self.now + ms;
        while let Some(at) = connection.next_time().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            connection.on_time(self.now, Time(self.now));
            self.settle(connection);
        }
        self.now = until;
    }

    fn frame(&mut self) -> ServerFrame {
        let text = self.sent.pop_front().expect("a frame was sent");
        ServerFrame::parse(&text).unwrap().unwrap()
    }

    fn command(&mut self) -> CommandFrame {
        match self.frame() {
            ServerFrame::Command(command) => command,
            other => panic!("{other:?}"),
        }
    }

    fn queue(&mut self, id: &str) {
        let id = CommandId::new(id).unwrap();
        let command = CreateCommand {
            id,
            agent: agent(),
            session: None,
            action: "note".into(),
            payload: "{\"n\":1}".into(),
            expires_ms: None,
        };
        self.admin(Operation::CreateCommand(command)).unwrap();
    }

    fn joined(&mut self) -> Connection {
        let mut connection = self.connection();
        self.text(&mut connection, HELLO);
        assert!(matches!(self.frame(), ServerFrame::Welcome(_)));
        connection
    }

    fn status(&self, id: &str) -> &'static str {
        self.state
            .command(&CommandId::new(id).unwrap())
            .unwrap()
            .state
            .as_str()
    }
}

fn agent() -> AgentId {
    AgentId::new("a").unwrap()
}

fn unavailable() -> KeepaliveError {
    KeepaliveError::Unavailable(ServiceError::Read(regent_raft::ReadError::Timeout))
}

#[test]
fn hello_is_welcomed_with_the_epoch_of_the_applied_connection() {
    let mut world = World::new();
    let mut connection = world.connection();
    world.text(&mut connection, HELLO);
    let ServerFrame::Welcome(welcome) = world.frame() else {
        panic!("no welcome")
    };
    let record = world.state.agent(&agent()).unwrap().leading().unwrap().clone();
    assert_eq!(welcome.epoch, record.epoch);
    assert_eq!(welcome.token.map(|token| token.0), Some(record.epoch.0));
    assert_eq!((welcome.heartbeat_ms, welcome.stale_ms), (HEARTBEAT, STALE));
    assert_eq!(connection.epoch_to_leave(), Some(record.epoch));
}

/// The network, or a node that stands still, can hold a `hello` back for as long as the agent needs to connect elsewhere.
#[test]
fn a_hello_that_comes_late_does_not_supersede_a_newer_connection() {
    let mut world = World::new();
    let mut late = world.connection();
    let newer = world.joined();
    world.text(&mut late, HELLO);
    assert_eq!(
        world.closed.take().map(|(code, _)| code),
        Some(CLOSE_TRY_LATER),
        "an agent that is still there connects again"
    );
    assert_eq!(late.epoch_to_leave(), None);
    let leading = world.state.agent(&agent()).unwrap().leading().unwrap().epoch;
    assert_eq!(newer.epoch_to_leave(), Some(leading));
}

/// A frozen agent, or a slow network: what it would be sent as one of StreamSpace's it could not read.
#[test]
fn an_agent_that_has_said_what_it_speaks_is_waited_for() {
    let mut world = World::new();
    let says_hello = || Identity {
        says_hello: true,
        ..world.identity("")
    };
    let (mut slow, mut silent, mut wrong) = (
        Connection::new(says_hello(), world.now),
        Connection::new(says_hello(), world.now),
        Connection::new(says_hello(), world.now),
    );
    world.pass(&mut slow, HELLO_WITHIN_MS + 500);
    world.text(&mut slow, HELLO);
    assert!(matches!(world.frame(), ServerFrame::Welcome(_)));

    world.pass(&mut silent, STALE + 500);
    assert_eq!(world.closed.take().map(|(code, _)| code), Some(CLOSE_TRY_LATER));

    world.text(&mut wrong, r#"{"type":"of a later protocol","payload":{}}"#);
    assert!(world.closed.is_none(), "unknown types are ignored");
    world.text(&mut wrong, r#"{"type":"heartbeat","payload":{}}"#);
    let (code, reason) = world.closed.take().unwrap();
    assert!(code == CLOSE_POLICY && reason.contains("hello"), "{reason}");
}

/// It was kept whatever its length: a megabyte in the agent's record, in its events and in the refusal of the next one.
#[test]
fn a_runtime_id_that_is_too_long_to_be_kept_is_refused() {
    let mut world = World::new();
    let mut connection = world.connection();
    let hello = HELLO.replace("\"r\"", &format!("{:?}", "r".repeat(1_000)));
    world.text(&mut connection, &hello);
    assert!(
        world
            .closed
            .as_ref()
            .is_some_and(|(code, reason)| *code == CLOSE_POLICY && reason.contains("runtimeId"))
    );
    assert_eq!(world.state.agent(&agent()).unwrap().runtime_id, "");
}

/// What an agent sends deeper than it can be shown in a list is kept as a note: one such result broke every list of
/// commands.
#[test]
fn a_result_that_is_nested_too_deeply_is_kept_as_a_note() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    world.settle(&mut connection);
    let deep = format!("{}{}", "[".repeat(120), "]".repeat(120));
    let frame = format!(
        r#"{{"type":"complete","payload":{{"commandId":"c1","run":1,"result":{{"metadata":{{"a":{deep}}}}}}}}}"#
    );
    world.text(
        &mut connection,
        r#"{"type":"ack","payload":{"commandId":"c1","run":1}}"#,
    );
    world.text(&mut connection, &frame);
    let command = world
        .state
        .command(&CommandId::new("c1").unwrap())
        .unwrap()
        .clone();
    let regent_state::record::CommandState::Completed { result, .. } = &command.state else {
        panic!("{:?}", command.state)
    };
    assert!(result.contains("omitted"), "{result}");
}

#[test]
fn a_command_is_sent_once_per_connection_and_only_after_it_was_applied() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    connection.on_state(&world.state, world.now, world.now, Time(0));
    connection.on_state(&world.state, world.now, world.now, Time(0));
    let effects = connection.take_effects();
    assert!(
        matches!(&effects[..], [Effect::Hand { attempt: 1, .. }]),
        "{effects:?}"
    );
    let Some(Effect::Hand {
        id,
        run,
        attempt,
        epoch,
    }) = effects.into_iter().next()
    else {
        panic!()
    };
    let operation = Operation::CommandSent {
        id: id.clone(),
        run,
        epoch,
        attempt,
    };
    world.own(operation.clone()).unwrap();
    // The answer was lost and the proposal repeated: the second one finds it done already.
    let again = world.own(operation);
    assert!(matches!(again, Ok(Outcome::Stale)), "{again:?}");
    let decided = Ok((world.state.revision(), again));
    connection.handed(
        (id, run, attempt, epoch),
        decided,
        (&world.state, world.now, Time(0)),
    );
    world.settle(&mut connection);
    let command = world.command();
    assert_eq!(
        (command.run, command.attempt, command.payload),
        (1, 1, serde_json::json!({"n": 1}))
    );
    world.settle(&mut connection);
    assert!(world.sent.is_empty());
}

#[test]
fn a_hand_over_that_failed_is_tried_again_a_little_later() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    connection.on_state(&world.state, world.now, world.now, Time(0));
    let Some(Effect::Hand {
        id,
        run,
        attempt,
        epoch,
    }) = connection.take_effects().pop()
    else {
        panic!()
    };
    connection.handed(
        (id, run, attempt, epoch),
        Err("no leader".into()),
        (&world.state, world.now, Time(0)),
    );
    world.pass(&mut connection, commands::RETRY_MS);
    assert_eq!(world.command().command_id.as_str(), "c1");
}

/// A follower hears of its own proposal before it has applied it.
#[test]
fn a_command_is_not_handed_over_again_by_a_node_that_has_not_applied_it_yet() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    let behind = world.state.clone();
    connection.on_state(&behind, world.now, world.now, Time(0));
    let Some(Effect::Hand {
        id,
        run,
        attempt,
        epoch,
    }) = connection.take_effects().pop()
    else {
        panic!()
    };
    let applied = world.own(Operation::CommandSent {
        id: id.clone(),
        run,
        epoch,
        attempt,
    });
    let decided = Ok((world.state.revision(), applied));
    connection.handed((id, run, attempt, epoch), decided, (&behind, world.now, Time(0)));
    assert!(matches!(&connection.take_effects()[..], [Effect::Send(_)]));
    connection.on_state(&behind, world.now, world.now, Time(0));
    assert!(connection.take_effects().is_empty());
    world.settle(&mut connection);
    assert!(world.sent.is_empty());
}

#[test]
fn a_refused_hand_over_rests_before_it_is_tried_again() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    connection.on_state(&world.state, world.now, world.now, Time(0));
    let Some(Effect::Hand {
        id,
        run,
        attempt,
        epoch,
    }) = connection.take_effects().pop()
    else {
        panic!()
    };
    let decided = Ok((world.state.revision(), Ok(Outcome::Stale)));
    connection.handed(
        (id, run, attempt, epoch),
        decided,
        (&world.state, world.now, Time(0)),
    );
    world.settle(&mut connection);
    assert!(world.sent.is_empty());
    world.pass(&mut connection, HEARTBEAT);
    assert_eq!(world.command().attempt, 1);
}

#[test]
fn reports_reach_the_state_and_late_ones_change_nothing() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.queue("c1");
    world.settle(&mut connection);
    let command = world.command();
    let ids = format!(r#""commandId":"c1","run":{}"#, command.run);
    world.text(&mut connection, &format!(r#"{{"type":"ack",{ids}}}"#));
    assert_eq!(world.status("c1"), "acknowledged");
    world.text(
        &mut connection,
        &format!(r#"{{"type":"complete","payload":{{{ids},"result":{{"a":1}}}}}}"#),
    );
    assert_eq!(world.status("c1"), "completed");
    world.text(
        &mut connection,
        &format!(r#"{{"type":"failed","payload":{{{ids},"error":"late"}}}}"#),
    );
    world.text(&mut connection, &format!(r#"{{"type":"ack",{ids}}}"#));
    assert_eq!(world.status("c1"), "completed");
    assert_eq!(world.closed, None);
}

#[test]
fn streamspace_fault_5_a_newer_connection_wins_and_the_older_leaves_nothing_behind() {
    let mut world = World::new();
    let mut old = world.joined();
    let mut new = world.joined();
    world.settle(&mut old);
    assert!(matches!(world.frame(), ServerFrame::Superseded(_)));
    assert_eq!(world.closed.take().unwrap().0, CLOSE_SUPERSEDED);
    assert_eq!(old.epoch_to_leave(), None, "its disconnect would say nothing");
    // What it still says is not even proposed.
    world.queue("c1");
    world.settle(&mut new);
    world.command();
    world.text(&mut old, r#"{"type":"ack","commandId":"c1"}"#);
    assert_eq!(world.status("c1"), "sent");
    assert_eq!(
        world.state.agent(&agent()).unwrap().leading().unwrap().epoch,
        new.epoch_to_leave().unwrap()
    );
}

#[test]
fn a_heartbeat_renews_once_and_a_lost_lease_closes() {
    let mut world = World::new();
    let mut connection = world.joined();
    let heartbeat = r#"{"type":"heartbeat","payload":{"activeSessions":0}}"#;
    world.now += HEARTBEAT;
    world.text(&mut connection, heartbeat);
    world.text(&mut connection, heartbeat);
    assert_eq!(world.renewals.len(), 1, "one at a time");
    let (name, token, seq) = world.renewals.pop().unwrap();
    assert_eq!((name.as_str(), seq), ("agent/a", None));
    connection.renewed(&name, token, seq, Err(unavailable()), Time(0));
    world.settle(&mut connection);
    assert_eq!(world.closed, None, "nobody could say");
    world.now += HEARTBEAT;
    world.text(&mut connection, heartbeat);
    assert_eq!(world.renewals.len(), 1);
    connection.renewed(&name, token, seq, Err(KeepaliveError::Lost), Time(0));
    world.settle(&mut connection);
    assert_eq!(world.closed.unwrap().0, CLOSE_TRY_LATER);
    assert_eq!(connection.epoch_to_leave(), None);
}

/// An agent with much to report was taken for dead: its heartbeats waited behind the reports.
#[test]
fn whatever_an_agent_says_renews_its_lease() {
    let mut world = World::new();
    let mut connection = world.joined();
    let progress = r#"{"type":"progress","payload":{"commandId":"none","run":1,"message":"m","percent":1}}"#;
    world.text(&mut connection, progress);
    assert!(world.renewals.is_empty(), "it was granted just now");
    world.now += HEARTBEAT;
    world.text(&mut connection, progress);
    world.text(&mut connection, progress);
    assert_eq!(world.renewals.len(), 1, "once per heartbeat");
    assert_eq!(world.renewals[0].0, LeaseName::of_agent(&agent()));
}

#[test]
fn a_keepalive_is_answered_by_its_number() {
    let mut world = World::new();
    let mut connection = world.joined();
    let token = world.state.lease(&LeaseName::of_agent(&agent())).unwrap().token;
    let keepalive = |token: Token| {
        format!(r#"{{"type":"lease_keepalive","payload":{{"name":"agent/a","token":{token},"seq":7}}}}"#)
    };
    world.text(&mut connection, &keepalive(token));
    let (name, token, seq) = world.renewals.pop().unwrap();
    connection.renewed(&name, token, seq, Ok(STALE), Time(0));
    world.settle(&mut connection);
    assert!(
        matches!(world.frame(), ServerFrame::LeaseRenewed(renewed) if renewed.seq == 7 && renewed.ttl_ms == STALE)
    );
    world.text(&mut connection, &keepalive(Token(token.0 - 1)));
    assert!(matches!(world.frame(), ServerFrame::LeaseLost(_)));
    assert!(world.renewals.is_empty());
}

#[test]
fn capacity_is_written_only_when_it_differs() {
    let mut world = World::new();
    let mut connection = world.joined();
    let before = world.state.revision();
    world.text(
        &mut connection,
        r#"{"type":"heartbeat","payload":{"capacity":{"maxSessions":10,"cpu":"8"}}}"#,
    );
    assert_eq!(world.state.revision(), before);
    world.text(
        &mut connection,
        r#"{"type":"heartbeat","payload":{"capacity":{"maxSessions":3}}}"#,
    );
    assert_eq!(
        world.state.agent(&agent()).unwrap().capacity.max_sessions,
        Some(3)
    );
    assert_eq!(
        world.state.agent(&agent()).unwrap().capacity.cpu,
        Some(8_000),
        "what is not said stays"
    );
}

#[test]
fn an_agent_that_is_heard_no_more_is_let_go_and_disconnects_by_its_epoch() {
    let mut world = World::new();
    let mut connection = world.joined();
    world.pass(&mut connection, STALE - 1);
    assert_eq!(world.closed, None);
    assert_eq!(world.pings, 3, "asked for a sign of life every heartbeat");
    world.pass(&mut connection, 1);
    assert_eq!(world.closed.clone().unwrap().0, CLOSE_TRY_LATER);
    assert!(connection.epoch_to_leave().is_some());

    let mut connection = world.joined();
    world.closed = None;
    world.pass(&mut connection, STALE - 1);
    connection.on_sign_of_life(world.now);
    world.pass(&mut connection, STALE - 1);
    assert_eq!(world.closed, None, "a pong counts for the socket");
}

#[test]
fn silence_makes_it_a_streamspace_agent_with_its_own_dialect_and_patience() {
    let mut world = World::new();
    let mut connection = world.connection();
    world.pass(&mut connection, HELLO_WITHIN_MS - 1);
    assert!(world.state.agent(&agent()).unwrap().leading().is_none());
    world.pass(&mut connection, 1);
    let leading = world.state.agent(&agent()).unwrap().leading().unwrap().clone();
    assert_eq!((leading.protocol, leading.stale_ms), (2, 45_000));
    world.pass(&mut connection, HEARTBEAT);
    assert_eq!(world.sent.pop_front().unwrap(), r#"{"type":"ping","payload":{}}"#);
    assert!(world.sent.is_empty());
    world.queue("c1");
    world.settle(&mut connection);
    let command: Value = serde_json::from_str(&world.sent.pop_front().unwrap()).unwrap();
    assert_eq!(
        command,
        serde_json::json!({"type": "command", "payload": {"commandId": "c1", "action": "note", "payload": {"n": 1}}})
    );
    world.now += HEARTBEAT;
    world.text(&mut connection, r#"{"type":"ack","commandId":"c1"}"#);
    assert_eq!(world.status("c1"), "acknowledged");
    assert_eq!(world.renewals.len(), 1, "every frame is a heartbeat");
    world.sent.clear();
    world.pass(&mut connection, 44_999);
    assert_eq!(world.closed, None);
    world.pass(&mut connection, 1);
    assert!(world.closed.is_some());
}

#[test]
fn a_first_frame_that_is_no_hello_counts_and_a_late_hello_upgrades() {
    let mut world = World::new();
    let mut connection = world.connection();
    world.text(
        &mut connection,
        r#"{"type":"heartbeat","payload":{"capacity":{"maxSessions":4}}}"#,
    );
    assert_eq!(
        world.state.agent(&agent()).unwrap().capacity.max_sessions,
        Some(4)
    );
    let first = connection.epoch_to_leave().unwrap();
    world.text(&mut connection, HELLO);
    assert!(matches!(world.frame(), ServerFrame::Welcome(_)));
    let leading = world.state.agent(&agent()).unwrap().leading().unwrap().clone();
    assert_eq!(leading.protocol, 3);
    assert!(leading.epoch > first);
    assert_eq!(world.closed, None, "it did not supersede itself");
}

#[test]
fn streamspace_fault_10_a_repeated_start_that_already_exists_is_done() {
    let mut world = World::new();
    let mut connection = world.connection();
    world.text(&mut connection, r#"{"type":"pong"}"#);
    let create = regent_state::operation::CreateSession {
        name: regent_types::SessionName::new("s").unwrap(),
        command: CommandId::new("start").unwrap(),
        user: UserName::new("admin").unwrap(),
        template: regent_types::TemplateName::new("demo").unwrap(),
        cpu: None,
        memory: None,
        persistent_home: false,
        idle_timeout: None,
        max_duration: None,
        tags: [].into(),
        placement: regent_state::record::Placement::default(),
        queue: false,
    };
    world.admin(Operation::CreateSession(create)).unwrap();
    world.settle(&mut connection);
    assert_eq!(world.status("start"), "sent");
    world.text(
        &mut connection,
        r#"{"type":"failed","payload":{"commandId":"start","error":"services \"s\" already exists"}}"#,
    );
    assert_eq!(world.status("start"), "completed");
}

#[test]
fn unreadable_frames_are_ignored_until_there_are_too_many_in_a_row() {
    let mut world = World::new();
    let mut connection = world.joined();
    for _ in 0..3 {
        for _ in 1..MAX_MALFORMED {
            world.text(&mut connection, "nonsense");
        }
        world.text(&mut connection, r#"{"type":"unknown"}"#);
    }
    connection.on_binary(world.now);
    assert_eq!(world.closed, None);
    for _ in 0..MAX_MALFORMED {
        world.text(&mut connection, "nonsense");
    }
    assert_eq!(world.closed.unwrap().0, CLOSE_POLICY);
}

#[test]
fn an_agent_that_was_removed_or_whose_token_was_revoked_is_closed() {
    let mut world = World::new();
    let mut connection = world.joined();
    world
        .admin(Operation::DeleteToken {
            id: TokenId::new("t").unwrap(),
        })
        .unwrap();
    world.settle(&mut connection);
    assert_eq!(world.closed.take().unwrap().0, CLOSE_POLICY);

    let mut world = World::new();
    let mut connection = world.joined();
    world
        .admin(Operation::DeleteAgent {
            id: agent(),
            force: true,
        })
        .unwrap();
    world.settle(&mut connection);
    assert_eq!(world.closed.take().unwrap().0, CLOSE_POLICY);
}

#[test]
fn frames_are_not_read_while_too_many_reports_wait() {
    let mut world = World::new();
    let mut connection = world.joined();
    for _ in 0..256 {
        assert!(connection.wants_frames());
        connection.on_text(
            r#"{"type":"ack","commandId":"c"}"#,
            world.now,
            Time(0),
            &world.state,
        );
    }
    assert!(!connection.wants_frames());
    world.settle(&mut connection);
    assert!(connection.wants_frames());
}

#[test]
fn a_node_that_goes_away_says_so_in_either_dialect() {
    let mut world = World::new();
    let mut connection = world.joined();
    connection.let_go("bye", Time(0));
    world.settle(&mut connection);
    assert_eq!(
        (world.closed.take(), world.sent.len()),
        (Some((CLOSE_GOING_AWAY, "bye".to_owned())), 0)
    );

    let mut connection = world.connection();
    world.text(&mut connection, r#"{"type":"pong"}"#);
    connection.let_go("bye", Time(0));
    world.settle(&mut connection);
    assert_eq!(
        world.sent.pop_front().unwrap(),
        r#"{"type":"shutdown","payload":{"reason":"bye"}}"#
    );
    assert!(world.closed.is_some());
}
