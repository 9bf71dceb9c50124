//! The agent's session with the control plane, told the time and frames: no socket, no clock, no sleep.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

use std::collections::BTreeMap;

use regent_agent::journal::{Outcome, RunKey};
use regent_agent::runtime::{Exit, Observed, ObservedState};
use regent_agent::session::{
    ControlSession, ENDED_KEPT, Effect, Fatal, Known, MAX_PARALLEL, MAX_QUEUED, MAX_REMEMBERED, Membership,
};
use regent_types::frame::{AgentFrame, CommandFrame, Reason, ServerFrame, Welcome};
use regent_types::session::SessionState;
use regent_types::{ClusterId, CommandId, Epoch, NodeId, SessionName, Token};
use serde_json::json;

const HEARTBEAT: u64 = 1000;

fn cluster(base: u64) -> Membership {
    Membership {
        cluster_id: ClusterId::new("c-1").unwrap(),
        base,
        origin: None,
    }
}

fn welcome(cluster: &Membership) -> ServerFrame {
    ServerFrame::Welcome(Welcome {
        cluster_id: cluster.cluster_id.clone(),
        base: cluster.base,
        epoch: Epoch(5),
        token: Some(Token(5)),
        heartbeat_ms: HEARTBEAT,
        stale_ms: 4 * HEARTBEAT,
        protocol: 3,
        node: NodeId(1),
        features: Vec::new(),
        former_cluster_ids: Vec::new(),
    })
}

fn command(id: &str, run: u32, action: &str, session: &str, token: u64) -> CommandFrame {
    CommandFrame {
        command_id: CommandId::new(id).unwrap(),
        run,
        action: action.to_owned(),
        payload: json!({ "sessionId": session, "generation": 1 }),
        token: Token(token),
        attempt: 1,
        deadline: None,
    }
}

fn start(id: &str, session: &str) -> CommandFrame {
    command(id, 1, "start_session", session, 5)
}

fn done() -> Outcome {
    Outcome::Completed {
        result: json!({ "url": "http://x" }),
    }
}

fn key(command: &CommandFrame) -> RunKey {
    RunKey {
        command: command.command_id.clone(),
        run: command.run,
    }
}

fn observed(session: &str, state: ObservedState) -> Observed {
    Observed {
        session: SessionName::new(session).unwrap(),
        generation: 1,
        token: Token(5),
        state,
        pid: None,
        port: None,
        url: None,
        started_at_ms: None,
        metadata: BTreeMap::new(),
    }
}

/// Effects in short words, heartbeats and pings left out.
fn effects(session: &mut ControlSession) -> Vec<String> {
    let mut words = Vec::new();
    while let Some(effect) = session.next_effect() {
        words.push(match effect {
            Effect::Send(frame) => match *frame {
                AgentFrame::Heartbeat(_) => continue,
                AgentFrame::Hello(hello) => format!("hello {}", hello.sessions.len()),
                AgentFrame::Ack(ack) => format!("ack {}.{}", ack.command_id, ack.run.unwrap()),
                AgentFrame::Complete(c) => {
                    format!("complete {}.{} {}", c.command_id, c.run.unwrap(), c.result["url"])
                }
                AgentFrame::Failed(f) => format!(
                    "failed {}.{} {} {}",
                    f.command_id,
                    f.run.unwrap(),
                    f.retryable,
                    f.error
                ),
                AgentFrame::Status(s) => format!("status {} {} {}", s.session_id, s.state, s.reason),
                other => format!("{other:?}"),
            },
            Effect::Ping => continue,
            Effect::Remember(membership) => format!("remember {}", membership.base),
            Effect::Begin(command) => format!("begin {}.{}", command.command_id, command.run),
            Effect::TakeOver(token) => format!("take over {token}"),
            Effect::Forget(key) => format!("forget {}", key.command),
            Effect::Remove(session) => format!("remove {}", session.session),
            Effect::Reconnect(reason) => format!("reconnect: {reason}"),
            Effect::End(fatal) => format!("end: {fatal}"),
        });
    }
    words
}

fn connect(session: &mut ControlSession, now: u64) {
    session.connected(now, &[]);
    session.frame(now, welcome(&cluster(0)));
    effects(session);
}

fn up() -> ControlSession {
    let mut session = ControlSession::new(Known::default());
    connect(&mut session, 0);
    session
}

/// A second start of `regent dev` on the same folder after -9, or a reboot: every session came back as
/// failed, since its exit without a record was told as one of its own.
/// The time of the next heartbeat overflowed: a panic, or without the check heartbeats without a pause.
#[test]
fn a_welcome_with_an_endless_heartbeat_interval_is_no_overflow() {
    let mut session = ControlSession::new(Known::default());
    session.connected(1_000, &[]);
    let ServerFrame::Welcome(mut frame) = welcome(&cluster(0)) else {
        unreachable!("a welcome is one")
    };
    frame.heartbeat_ms = u64::MAX;
    session.frame(1_000, ServerFrame::Welcome(frame));
    assert!(session.is_up());
    assert_eq!(session.next_tick(), Some(1_000 + 3_600_000));
}

#[test]
fn a_session_that_was_taken_along_is_missing_and_not_failed() {
    let mut session = ControlSession::new(Known::default());
    session.connected(
        0,
        &[
            observed("a", ObservedState::Exited(Exit::Unknown)),
            observed("b", ObservedState::Running),
        ],
    );
    assert_eq!(effects(&mut session), ["hello 1"]);
    session.frame(0, welcome(&cluster(0)));
    assert_eq!(
        effects(&mut session),
        ["remember 0"],
        "and no status says that it failed"
    );
}

#[test]
fn hello_comes_first_and_says_all_that_is_here_also_what_has_ended() {
    let mut session = ControlSession::new(Known::default());
    session.connected(
        0,
        &[
            observed("a", ObservedState::Running),
            observed("b", ObservedState::Hibernated),
            observed("c", ObservedState::Exited(Exit::Code(0))),
            observed("d", ObservedState::Exited(Exit::Code(3))),
        ],
    );
    let Some(Effect::Send(frame)) = session.next_effect() else {
        panic!("nothing is sent");
    };
    let AgentFrame::Hello(hello) = *frame else {
        panic!("not hello: {frame:?}");
    };
    assert_eq!(hello.protocol, 3);
    let states: Vec<_> = hello
        .sessions
        .iter()
        .map(|s| (s.state, s.reason.as_str()))
        .collect();
    assert_eq!(
        states,
        [
            (SessionState::Running, ""),
            (SessionState::Hibernated, ""),
            (SessionState::Terminated, "exited with code 0"),
            (SessionState::Failed, "exited with code 3"),
        ]
    );
    session.frame(0, ServerFrame::Command(start("early", "a")));
    assert!(
        effects(&mut session).is_empty(),
        "nothing is begun before the welcome"
    );
}

#[test]
fn a_command_is_begun_once_however_often_it_comes() {
    let mut session = up();
    let one = start("one", "a");
    for _ in 0..2 {
        session.frame(0, ServerFrame::Command(one.clone()));
    }
    assert_eq!(effects(&mut session), ["ack one.1", "begin one.1", "ack one.1"]);
    session.finished(0, &one, done());
    assert_eq!(effects(&mut session), ["complete one.1 \"http://x\""]);
    session.frame(0, ServerFrame::Command(one));
    assert_eq!(
        effects(&mut session),
        ["complete one.1 \"http://x\""],
        "the record answers"
    );
    session.frame(
        0,
        ServerFrame::Command(command("one", 2, "start_session", "a", 5)),
    );
    assert_eq!(
        effects(&mut session),
        ["ack one.2", "begin one.2"],
        "a retry is a run of its own"
    );
}

#[test]
fn an_agent_killed_between_doing_and_reporting_reports_and_does_it_once() {
    // What the executor found: recorded before, or shown by the runtime to be done.
    let one = start("one", "a");
    let mut session = ControlSession::new(Known {
        outcomes: vec![(key(&one), done())],
        highest: Token(5),
        ..Known::default()
    });
    connect(&mut session, 0);
    session.frame(0, ServerFrame::Command(one));
    assert_eq!(effects(&mut session), ["complete one.1 \"http://x\""]);
}

#[test]
fn commands_of_one_session_are_done_in_order_and_those_of_others_beside_them() {
    let mut session = up();
    let (a1, a2, b1) = (
        start("a1", "a"),
        command("a2", 1, "stop_session", "a", 5),
        start("b1", "b"),
    );
    for command in [&a1, &a2, &b1] {
        session.frame(0, ServerFrame::Command(command.clone()));
    }
    assert_eq!(
        effects(&mut session),
        ["ack a1.1", "begin a1.1", "ack a2.1", "ack b1.1", "begin b1.1"]
    );
    session.finished(0, &b1, done());
    assert_eq!(effects(&mut session).len(), 1, "a2 still waits for a1");
    session.finished(0, &a1, done());
    assert_eq!(
        effects(&mut session),
        ["complete a1.1 \"http://x\"", "begin a2.1"]
    );
}

#[test]
fn so_many_at_a_time_and_so_many_waiting() {
    let mut session = up();
    let commands: Vec<_> = (0..MAX_PARALLEL + MAX_QUEUED + 5)
        .map(|n| start(&format!("c{n}"), &format!("s{n}")))
        .collect();
    for command in &commands {
        session.frame(0, ServerFrame::Command(command.clone()));
    }
    let words = effects(&mut session);
    let count = |what: &str| words.iter().filter(|word| word.starts_with(what)).count();
    assert_eq!(count("begin"), MAX_PARALLEL);
    assert_eq!(
        count("ack"),
        MAX_PARALLEL + MAX_QUEUED,
        "what does not fit is left to come again"
    );
    session.finished(0, &commands[3], done());
    assert_eq!(
        effects(&mut session),
        [
            "complete c3.1 \"http://x\"".to_owned(),
            format!("begin c{MAX_PARALLEL}.1")
        ]
    );
}

#[test]
fn an_older_token_is_refused_and_a_newer_one_refuses_what_waited_under_the_old() {
    let mut session = up();
    session.frame(0, ServerFrame::Command(command("a1", 1, "start_session", "a", 5)));
    session.frame(0, ServerFrame::Command(command("a2", 1, "stop_session", "a", 5)));
    session.frame(0, ServerFrame::Command(command("b1", 1, "start_session", "b", 9)));
    effects(&mut session);
    session.frame(0, ServerFrame::Command(command("b2", 1, "start_session", "b", 8)));
    let refused = effects(&mut session);
    assert!(
        refused[0].starts_with("failed b2.1 false fencing token 8 is older than 9"),
        "{refused:?}"
    );
    session.finished(0, &command("a1", 1, "start_session", "a", 5), done());
    let words = effects(&mut session);
    assert!(
        words[1].starts_with("failed a2.1 false fencing token 5 is older than 9"),
        "{words:?}"
    );
    assert_eq!(words.len(), 2, "{words:?}");
}

#[test]
fn the_fence_of_an_earlier_process_counts() {
    let mut session = ControlSession::new(Known {
        highest: Token(7),
        ..Known::default()
    });
    connect(&mut session, 0);
    session.frame(0, ServerFrame::Command(start("one", "a")));
    let words = effects(&mut session);
    assert!(words[0].starts_with("failed one.1 false"), "{words:?}");
    assert_eq!(words.len(), 1);
}

#[test]
fn without_a_connection_nothing_is_begun_and_what_runs_is_answered_after_it() {
    let mut session = up();
    let (a1, a2) = (start("a1", "a"), command("a2", 1, "stop_session", "a", 5));
    session.frame(0, ServerFrame::Command(a1.clone()));
    session.frame(0, ServerFrame::Command(a2.clone()));
    effects(&mut session);
    session.disconnected();
    session.finished(0, &a1, done());
    assert!(
        effects(&mut session).is_empty(),
        "a2 is not begun and nothing is sent"
    );
    connect(&mut session, 10);
    session.frame(10, ServerFrame::Command(a1));
    session.frame(10, ServerFrame::Command(a2));
    assert_eq!(
        effects(&mut session),
        ["complete a1.1 \"http://x\"", "ack a2.1", "begin a2.1"]
    );
}

#[test]
fn heartbeats_leave_on_time_while_commands_run_fault_15() {
    let mut session = up();
    session.frame(0, ServerFrame::Command(start("slow", "a")));
    effects(&mut session);
    for beat in 1..=5 {
        let now = beat * HEARTBEAT;
        assert_eq!(session.next_tick(), Some(now));
        session.tick(now);
        session.heard(now);
        let Some(Effect::Send(frame)) = session.next_effect() else {
            panic!("no heartbeat at {now}");
        };
        assert!(matches!(*frame, AgentFrame::Heartbeat(_)));
        assert_eq!(session.next_effect(), Some(Effect::Ping));
    }
}

#[test]
fn a_node_that_is_silent_or_does_not_welcome_is_left() {
    let mut session = up();
    session.tick(HEARTBEAT);
    session.tick(2 * HEARTBEAT);
    effects(&mut session);
    session.tick(HEARTBEAT * 5 / 2);
    assert_eq!(
        effects(&mut session),
        ["reconnect: nothing was heard for 2500 ms"]
    );

    session.connected(10_000, &[]);
    effects(&mut session);
    let at = session.next_tick().unwrap();
    session.tick(at);
    assert_eq!(effects(&mut session), ["reconnect: no welcome in time"]);
    assert_eq!(session.next_tick(), None);
}

#[test]
fn an_older_base_of_the_same_cluster_is_refused_and_a_newer_one_remembered_first() {
    let mut session = ControlSession::new(Known {
        membership: Some(cluster(8)),
        ..Known::default()
    });
    session.connected(0, &[]);
    session.frame(0, welcome(&cluster(7)));
    let words = effects(&mut session);
    assert!(
        words[1].starts_with("reconnect: node 1 has revision base 7, older than 8"),
        "{words:?}"
    );
    assert!(!session.is_up());

    session.connected(0, &[]);
    session.frame(0, welcome(&cluster(9)));
    session.frame(0, ServerFrame::Command(start("one", "a")));
    assert_eq!(
        effects(&mut session),
        ["hello 0", "remember 9", "ack one.1", "begin one.1"]
    );
}

#[test]
fn another_cluster_is_not_obeyed() {
    let mut session = ControlSession::new(Known {
        membership: Some(Membership {
            cluster_id: ClusterId::new("ours").unwrap(),
            base: 0,
            origin: None,
        }),
        ..Known::default()
    });
    session.connected(0, &[observed("a", ObservedState::Running)]);
    session.frame(0, welcome(&cluster(0)));
    session.frame(
        0,
        ServerFrame::Command(command("orphan", 1, "stop_session", "a", 5)),
    );
    let words = effects(&mut session);
    assert!(
        words[1].starts_with("end: these servers are of cluster c-1"),
        "{words:?}"
    );
    assert_eq!(words.len(), 2, "{words:?}");
}

/// A cluster that was restored from ours is followed, but only forward: to a larger base, and never back.
#[test]
fn a_cluster_that_was_made_of_ours_is_followed_and_the_old_one_is_obeyed_no_more() {
    let named = |name: &str| ClusterId::new(name).unwrap();
    let old = Membership {
        cluster_id: named("old"),
        base: 5,
        origin: Some(named("first")),
    };
    let restored = |base| match welcome(&cluster(base)) {
        ServerFrame::Welcome(welcome) => ServerFrame::Welcome(Welcome {
            former_cluster_ids: vec![named("old"), named("first")],
            ..welcome
        }),
        other => other,
    };
    let known = || Known {
        membership: Some(old.clone()),
        ..Known::default()
    };
    let mut session = ControlSession::new(known());
    session.connected(0, &[]);
    session.frame(0, restored(9));
    assert_eq!(session.next_effect().map(|_| ()), Some(()), "hello");
    let followed = Membership {
        origin: Some(named("first")),
        ..cluster(9)
    };
    assert_eq!(session.next_effect(), Some(Effect::Remember(followed.clone())));
    assert!(session.is_up());

    for (membership, offered) in [(old.clone(), restored(5)), (followed, welcome(&old))] {
        let mut session = ControlSession::new(Known {
            membership: Some(membership),
            ..Known::default()
        });
        session.connected(0, &[]);
        session.frame(0, offered);
        let words = effects(&mut session);
        assert!(
            words[1].starts_with("end: these servers are of cluster"),
            "{words:?}"
        );
    }
}

#[test]
fn who_is_superseded_ends() {
    let mut session = up();
    session.frame(
        0,
        ServerFrame::Superseded(Reason {
            reason: "epoch 9 on node 2".to_owned(),
        }),
    );
    let expected = Fatal::Superseded {
        reason: "epoch 9 on node 2".to_owned(),
    };
    assert_eq!(session.next_effect(), Some(Effect::End(expected)));
}

#[test]
fn exits_are_told_also_those_that_happened_without_a_connection() {
    let name = |text: &str| SessionName::new(text).unwrap();
    let mut session = up();
    session.exited(0, &name("a"), 1, Exit::Code(0));
    assert_eq!(effects(&mut session), ["status a terminated exited with code 0"]);
    session.disconnected();
    session.exited(5, &name("b"), 1, Exit::Signal(9));
    assert!(effects(&mut session).is_empty());
    session.connected(9, &[]);
    session.frame(9, welcome(&cluster(0)));
    let words = effects(&mut session);
    assert!(
        words.contains(&"status b failed ended by signal 9".to_owned()),
        "{words:?}"
    );
}

#[test]
fn what_is_left_of_an_ended_session_goes_after_a_while_unless_it_is_started_anew() {
    let name = |text: &str| SessionName::new(text).unwrap();
    let mut session = up();
    session.exited(0, &name("a"), 1, Exit::Code(0));
    session.exited(0, &name("b"), 1, Exit::Code(0));
    let mut again = start("again", "b");
    again.payload["generation"] = json!(2);
    session.frame(0, ServerFrame::Command(again.clone()));
    session.finished(0, &again, done());
    effects(&mut session);
    let mut now = 0;
    while now < ENDED_KEPT {
        assert!(effects(&mut session).is_empty(), "removed after {now} ms");
        now += HEARTBEAT;
        session.heard(now);
        session.tick(now);
    }
    assert_eq!(effects(&mut session), ["remove a"]);
}

#[test]
fn old_outcomes_are_forgotten_oldest_first() {
    let outcomes = (0..=MAX_REMEMBERED)
        .map(|n| (key(&start(&format!("c{n}"), "a")), done()))
        .collect();
    let mut session = ControlSession::new(Known {
        outcomes,
        ..Known::default()
    });
    assert_eq!(effects(&mut session), ["forget c0"]);
}
