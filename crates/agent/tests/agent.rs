//! A whole agent against a gateway in this process: real sockets, a runtime that runs nothing.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

mod gateway;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::ws::Message;
use gateway::{FakeRuntime, Gateway, TOKEN, within};
use regent_agent::journal::{Intent, Journal, RunKey};
use regent_agent::runtime::{Exit, ObservedState, RuntimeEvent};
use regent_agent::session::Fatal;
use regent_agent::{Error, Options, run};
use regent_types::frame::AgentFrame;
use regent_types::{AgentId, CommandId, SessionName, Token};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

struct Agent {
    runtime: Arc<FakeRuntime>,
    data: TempDir,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), Error>>,
}

fn options(servers: &[&str], data: &TempDir) -> Options {
    let servers = servers.iter().map(ToString::to_string).collect();
    Options::new(
        AgentId::new("dev").unwrap(),
        servers,
        TOKEN.to_owned(),
        data.path(),
    )
}

fn start_with(options: Options, data: TempDir, runtime: Arc<FakeRuntime>) -> Agent {
    let shutdown = CancellationToken::new();
    Agent {
        running: tokio::spawn(run(options, runtime.clone(), shutdown.clone())),
        runtime,
        data,
        shutdown,
    }
}

fn start(servers: &[&str]) -> Agent {
    let data = tempfile::tempdir().unwrap();
    start_with(options(servers, &data), data, FakeRuntime::new())
}

impl Agent {
    async fn ended(self) -> Result<(), Error> {
        within("the agent's end", self.running).await.unwrap()
    }
}

fn word(frame: &AgentFrame) -> String {
    match frame {
        AgentFrame::Ack(ack) => format!("ack {}", ack.command_id),
        AgentFrame::Complete(complete) => format!("complete {}", complete.command_id),
        AgentFrame::Failed(failed) => format!("failed {} {}", failed.command_id, failed.retryable),
        AgentFrame::Status(status) => format!("status {} {}", status.session_id, status.state),
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn it_registers_says_hello_and_does_what_it_is_told() {
    let mut node = Gateway::start().await;
    let agent = start(&[&node.url]);
    let (mut link, hello) = node.welcomed(0).await;
    assert_eq!(node.registrations.load(Ordering::SeqCst), 1);
    assert_eq!(link.query, "agent_id=dev");
    assert_eq!(
        (hello.protocol, hello.runtime_id.as_str(), hello.sessions.len()),
        (3, "fake:1", 0)
    );
    link.command("one", "start_session", "a", 5);
    assert_eq!(word(&link.answer().await), "ack one");
    let AgentFrame::Complete(complete) = link.answer().await else {
        panic!("not completed");
    };
    assert_eq!(complete.result["url"], "http://a/");
    assert_eq!(complete.result["metadata"]["pid"], 7);
    for (action, expected) in [
        ("hibernate_session", "complete"),
        ("wake_session", "complete"),
        ("stop_session", "complete"),
    ] {
        link.command(action, action, "a", 5);
        assert_eq!(word(&link.outcome().await), format!("{expected} {action}"));
    }
    link.command("dance", "dance", "a", 5);
    assert_eq!(word(&link.outcome().await), "failed dance false");
    assert!(agent.runtime.names().is_empty());
}

#[tokio::test]
async fn a_slow_start_blocks_neither_heartbeats_nor_other_commands_fault_15() {
    let mut node = Gateway::start().await;
    let agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    link.command("slow", "start_session", "slow-1", 5);
    assert_eq!(word(&link.answer().await), "ack slow");
    link.command("stop", "stop_session", "slow-1", 5);
    link.command("quick", "start_session", "b", 5);
    assert_eq!(word(&link.outcome().await), "complete quick");
    for _ in 0..3 {
        assert!(matches!(link.next().await, AgentFrame::Heartbeat(_)));
    }
    agent.runtime.permits.add_permits(1);
    assert_eq!(word(&link.outcome().await), "complete slow");
    assert_eq!(
        word(&link.outcome().await),
        "complete stop",
        "in order for one session"
    );
}

#[tokio::test]
async fn a_lost_connection_is_made_again_at_the_next_node_and_nothing_is_done_twice() {
    let (mut one, mut two) = (Gateway::start().await, Gateway::start().await);
    let agent = start(&[&one.url, &two.url]);
    let (first, second) = tokio::select! {
        (link, _) = one.welcomed(0) => (link, &mut two),
        (link, _) = two.welcomed(0) => (link, &mut one),
    };
    let mut link = first;
    link.command("slow", "start_session", "slow-1", 5);
    assert_eq!(word(&link.answer().await), "ack slow");
    drop(link);
    // The command ends while nobody is there to be told; writing works on the new connection (fault 7).
    agent.runtime.permits.add_permits(1);
    let (mut link, _) = second.welcomed(0).await;
    link.command("slow", "start_session", "slow-1", 5);
    assert_eq!(word(&link.outcome().await), "complete slow");
    assert_eq!(agent.runtime.starts.load(Ordering::SeqCst), 1);
    let registrations = one.registrations.load(Ordering::SeqCst) + two.registrations.load(Ordering::SeqCst);
    assert_eq!(registrations, 1, "a reconnect is no reason to write to the log");
}

#[tokio::test]
async fn each_message_is_one_frame_fault_6() {
    let mut node = Gateway::start().await;
    let _agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    for n in 0..40 {
        link.command(&format!("c{n}"), "start_session", &format!("s{n}"), 5);
    }
    // `Link::next` fails on a message that is not exactly one frame.
    let mut completed = BTreeSet::new();
    while completed.len() < 40 {
        completed.insert(word(&link.outcome().await));
    }
}

#[tokio::test]
async fn what_is_not_understood_is_ignored() {
    let mut node = Gateway::start().await;
    let _agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    for text in [
        "",
        "{",
        "[]",
        "{\"type\":\"later\"}",
        "{\"type\":\"command\",\"payload\":{}}",
    ] {
        link.send_text(text);
    }
    link.command("one", "start_session", "a", 5);
    assert_eq!(word(&link.outcome().await), "complete one");
}

#[tokio::test]
async fn a_panic_in_a_runtime_fails_the_command_and_no_more() {
    let mut node = Gateway::start().await;
    let _agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    link.command("one", "start_session", "panic-1", 5);
    assert_eq!(word(&link.outcome().await), "failed one true");
    link.command("two", "stop_session", "panic-1", 5);
    assert_eq!(word(&link.outcome().await), "complete two");
}

#[tokio::test]
async fn killed_between_doing_and_recording_it_does_it_once_and_reports_it() {
    let mut node = Gateway::start().await;
    let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
    // As an agent leaves it that was killed right after the runtime had started the session.
    let key = RunKey {
        command: CommandId::new("one").unwrap(),
        run: 1,
    };
    let intent = Intent {
        session: Some(SessionName::new("a").unwrap()),
        generation: 1,
        action: "start_session".to_owned(),
        token: Token(5),
        begun_at_ms: u64::MAX / 2,
    };
    Journal::open(data.path()).unwrap().begin(&key, intent).unwrap();
    runtime.put("a", ObservedState::Running);

    let agent = start_with(options(&[&node.url], &data), data, runtime);
    let (mut link, hello) = node.welcomed(0).await;
    assert_eq!(hello.sessions.len(), 1, "the session is adopted");
    link.command("one", "start_session", "a", 5);
    assert_eq!(word(&link.outcome().await), "complete one");
    assert_eq!(agent.runtime.starts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_older_token_is_refused_also_by_the_next_process() {
    let mut node = Gateway::start().await;
    let agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    link.command("new", "start_session", "a", 9);
    assert_eq!(word(&link.outcome().await), "complete new");
    agent.shutdown.cancel();
    let (data, runtime) = (agent.data, agent.runtime);
    within("the agent's end", agent.running).await.unwrap().unwrap();

    let agent = start_with(options(&[&node.url], &data), data, runtime);
    let (mut link, _) = node.welcomed(0).await;
    link.command("old", "stop_session", "a", 8);
    assert_eq!(word(&link.outcome().await), "failed old false");
    assert_eq!(agent.runtime.names(), ["a"]);
}

#[tokio::test]
async fn an_older_base_is_refused_also_by_the_next_process() {
    let mut node = Gateway::start().await;
    let agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(8).await;
    assert!(matches!(link.next().await, AgentFrame::Heartbeat(_)));
    agent.shutdown.cancel();
    let data = agent.data;
    within("the agent's end", agent.running).await.unwrap().unwrap();

    let _agent = start_with(options(&[&node.url], &data), data, FakeRuntime::new());
    let (link, _) = node.welcomed(7).await;
    link.command("one", "start_session", "a", 5);
    let (mut link, _) = node.welcomed(8).await;
    link.command("one", "start_session", "a", 5);
    assert_eq!(word(&link.outcome().await), "complete one");
}

#[tokio::test]
async fn who_is_superseded_ends_by_frame_and_by_close_code() {
    for by_frame in [true, false] {
        let mut node = Gateway::start().await;
        let data = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::new();
        runtime.put("a", ObservedState::Running);
        // Its sessions belong to who took over, also in `dev`.
        let options = Options {
            stop_sessions_on_exit: true,
            ..options(&[&node.url], &data)
        };
        let agent = start_with(options, data, runtime.clone());
        let (link, _) = node.welcomed(0).await;
        if by_frame {
            link.send(&json!({ "type": "superseded", "payload": { "reason": "epoch 9" } }));
        } else {
            link.close(4001);
        }
        let ended = agent.ended().await;
        assert!(
            matches!(ended, Err(Error::Fatal(Fatal::Superseded { .. }))),
            "{ended:?}"
        );
        assert_eq!(runtime.names(), ["a"]);
    }
}

#[tokio::test]
async fn exits_are_told_with_the_code() {
    let mut node = Gateway::start().await;
    let agent = start(&[&node.url]);
    let (mut link, _) = node.welcomed(0).await;
    assert!(matches!(link.next().await, AgentFrame::Heartbeat(_)));
    for (session, exit, state) in [("a", Exit::Code(0), "terminated"), ("b", Exit::Code(3), "failed")] {
        let exited = RuntimeEvent::Exited {
            session: SessionName::new(session).unwrap(),
            generation: 1,
            token: Token(5),
            exit,
        };
        agent.runtime.events.send(exited).unwrap();
        let AgentFrame::Status(status) = link.outcome().await else {
            panic!("no status");
        };
        assert_eq!((status.state.as_str(), status.generation), (state, Some(1)));
        assert!(status.reason.contains("code"), "{}", status.reason);
    }
    // Events that were lost are made up for by what is there.
    agent.runtime.put("c", ObservedState::Exited(Exit::Signal(9)));
    agent.runtime.events.send(RuntimeEvent::Lagged).unwrap();
    assert_eq!(word(&link.outcome().await), "status c failed");
}

#[tokio::test]
async fn it_says_goodbye_and_its_sessions_stay_unless_they_are_to_end_with_it() {
    for stop_sessions_on_exit in [false, true] {
        let mut node = Gateway::start().await;
        let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
        runtime.put("a", ObservedState::Running);
        let options = Options {
            stop_sessions_on_exit,
            ..options(&[&node.url], &data)
        };
        let agent = start_with(options, data, runtime.clone());
        let (mut link, _) = node.welcomed(0).await;
        agent.shutdown.cancel();
        let goodbye = loop {
            match link.message().await {
                Some(Message::Text(_)) => {}
                other => break other,
            }
        };
        assert!(matches!(goodbye, Some(Message::Close(Some(frame))) if frame.code == 1000));
        agent.ended().await.unwrap();
        assert_eq!(runtime.names().is_empty(), stop_sessions_on_exit);
    }
}

#[tokio::test]
async fn a_token_that_is_never_taken_is_an_error() {
    let node = Gateway::start().await;
    let data = tempfile::tempdir().unwrap();
    let options = Options {
        token: "wrong".to_owned(),
        ..options(&[&node.url], &data)
    };
    let ended = start_with(options, data, FakeRuntime::new()).ended().await;
    assert!(
        matches!(&ended, Err(Error::Refused(why)) if why.contains("unknown token")),
        "{ended:?}"
    );
}
