//! A whole agent against a gateway in this process: real sockets, a runtime that runs nothing.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

mod gateway;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::ws::Message;
use gateway::{FakeRuntime, Gateway, TOKEN, within};
use regent_agent::executor::Executor;
use regent_agent::fence::Fence;
use regent_agent::journal::{Intent, Journal, Outcome, RunKey};
use regent_agent::permit::Permit;
use regent_agent::runtime::{Exit, ObservedState, RuntimeEvent};
use regent_agent::session::{Fatal, key_of};
use regent_agent::{Error, Options, files, run};
use regent_client::clock::boot_ms;
use regent_types::frame::{AgentFrame, CommandFrame};
use regent_types::{AgentId, CommandId, ReplicaName, SessionName, Token};
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
        AgentFrame::LeaseRelease(lease) => format!("release {} {}", lease.name, lease.token),
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
    assert_eq!(link.query, "agent_id=dev&protocol=3");
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

/// A start of session `a` by command `one` that was begun and has no outcome.
fn cut_off_start(data: &TempDir) -> RunKey {
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
    key
}

#[tokio::test]
async fn killed_between_doing_and_recording_it_does_it_once_and_reports_it() {
    let mut node = Gateway::start().await;
    let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
    // As an agent leaves it that was killed right after the runtime had started the session.
    cut_off_start(&data);
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

fn replica_options(servers: &[&str], data: &TempDir) -> Options {
    Options {
        replica: Some(ReplicaName::new("r1").unwrap()),
        ..options(servers, data)
    }
}

fn start_replica(servers: &[&str]) -> Agent {
    let data = tempfile::tempdir().unwrap();
    start_with(replica_options(servers, &data), data, FakeRuntime::new())
}

#[tokio::test]
async fn a_replica_touches_nothing_of_the_leader_until_it_takes_over_and_then_in_order() {
    let mut node = Gateway::start().await;
    let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
    // The leader of the same data folder is doing this: its session is there, its outcome not yet.
    let key = cut_off_start(&data);
    runtime.put("a", ObservedState::Running);
    let agent = start_with(replica_options(&[&node.url], &data), data, runtime.clone());
    let (fence, journal) = (
        Fence::open(agent.data.path()).unwrap(),
        Journal::open(agent.data.path()).unwrap(),
    );
    let outcome = || journal.get(&key).unwrap().unwrap().outcome;

    let (mut link, hello) = node.campaigning().await;
    assert_eq!(link.query, "agent_id=dev&replica=r1&protocol=3");
    assert_eq!((hello.leases.len(), hello.sessions.len()), (0, 1));
    runtime.put("c", ObservedState::Running);
    link.command("early", "start_session", "b", 9);
    let seq = link.promote(9).await;
    assert_eq!(
        (fence.highest().unwrap(), outcome()),
        (Token(0), None),
        "a grant alone gives no right"
    );
    link.renew(9, seq);
    let hello = link.hello().await;
    assert_eq!(
        fence.highest().unwrap(),
        Token(9),
        "the fence is raised before hello offers the token"
    );
    assert_eq!((hello.leases[0].token, hello.sessions.len()), (Token(9), 2));
    assert!(outcome().is_some(), "what the former leader has done is recorded");
    link.welcome(0, Some(9));
    link.command("one", "start_session", "a", 9);
    assert_eq!(word(&link.outcome().await), "complete one");
    link.command("two", "start_session", "b", 9);
    assert_eq!(word(&link.outcome().await), "complete two");
    assert_eq!(
        runtime.starts.load(Ordering::SeqCst),
        1,
        "early is ignored, one was done"
    );
}

#[tokio::test]
async fn a_leader_that_ends_tells_what_it_did_gives_the_lease_back_and_only_then_leaves() {
    for busy in [false, true] {
        let mut node = Gateway::start().await;
        let agent = start_replica(&[&node.url]);
        let (mut link, _) = node.led(9).await;
        if busy {
            link.command("slow", "start_session", "slow-1", 9);
            loop {
                match link.answer().await {
                    AgentFrame::Ack(_) => break,
                    AgentFrame::LeaseKeepalive(_) => {}
                    other => panic!("not acknowledged: {other:?}"),
                }
            }
        }
        agent.shutdown.cancel();
        if busy {
            agent.runtime.permits.add_permits(1);
            assert_eq!(word(&link.outcome().await), "complete slow");
        }
        assert_eq!(word(&link.outcome().await), "release agent/dev 9");
        assert!(matches!(link.message().await, Some(Message::Close(Some(frame))) if frame.code == 1000));
        agent.ended().await.unwrap();
    }
}

#[tokio::test]
async fn a_standby_that_ends_has_nothing_to_give_back_and_ends_no_sessions() {
    let mut node = Gateway::start().await;
    let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
    runtime.put("a", ObservedState::Running);
    let options = Options {
        stop_sessions_on_exit: true,
        ..replica_options(&[&node.url], &data)
    };
    let agent = start_with(options, data, runtime.clone());
    let (mut link, _) = node.campaigning().await;
    agent.shutdown.cancel();
    loop {
        match link.message().await {
            Some(Message::Text(text)) => assert!(!text.contains("lease_release"), "{text}"),
            other => break assert!(matches!(other, Some(Message::Close(_))), "{other:?}"),
        }
    }
    agent.ended().await.unwrap();
    assert_eq!(runtime.names(), ["a"], "they are the leader's");
}

#[tokio::test]
async fn a_leader_that_loses_its_connection_leads_on_over_the_next_one() {
    let (mut one, mut two) = (Gateway::start().await, Gateway::start().await);
    let agent = start_replica(&[&one.url, &two.url]);
    let (link, other) = tokio::select! {
        (link, _) = one.led(9) => (link, &mut two),
        (link, _) = two.led(9) => (link, &mut one),
    };
    drop(link);
    let mut link = other.link().await;
    let hello = link.hello().await;
    assert_eq!(hello.leases[0].token, Token(9));
    link.welcome(0, Some(9));
    link.command("one", "start_session", "a", 9);
    assert_eq!(word(&link.outcome().await), "complete one");
    assert_eq!(agent.runtime.starts.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_replica_that_cannot_raise_the_fence_gives_the_lease_back() {
    let mut node = Gateway::start().await;
    let agent = start_replica(&[&node.url]);
    let (mut link, _) = node.campaigning().await;
    // Another replica of this host leads under a newer token.
    Fence::open(agent.data.path()).unwrap().admit(Token(12)).unwrap();
    let seq = link.promote(9).await;
    link.renew(9, seq);
    assert_eq!(word(&link.outcome().await), "release agent/dev 9");
    assert!(matches!(link.outcome().await, AgentFrame::LeaseCampaign(_)));
}

fn start_command(id: &str, session: &str, token: u64) -> CommandFrame {
    serde_json::from_value(json!({
        "commandId": id, "run": 1, "action": "start_session", "token": token, "attempt": 1, "payload": {
            "sessionId": session, "generation": 1, "user": "alice", "template": "demo",
            "templateManifest": { "metadata": { "name": "demo" }, "spec": { "command": ["true"] } } }
    }))
    .unwrap()
}

#[tokio::test]
async fn an_action_after_the_end_of_the_guard_is_refused_and_leaves_no_record() {
    let (data, runtime, permit) = (
        tempfile::tempdir().unwrap(),
        FakeRuntime::new(),
        Permit::of_replica(),
    );
    let id = AgentId::new("dev").unwrap();
    let executor = Executor::open(id, runtime.clone(), data.path(), permit.clone()).unwrap();
    let one = start_command("one", "a", 9);
    permit.set(Some((Token(9), boot_ms())));
    let refused = executor.execute(&one).await;
    assert!(
        matches!(&refused, Outcome::Failed { retryable: true, error } if error.starts_with("not begun")),
        "{refused:?}"
    );
    assert_eq!(runtime.starts.load(Ordering::SeqCst), 0);
    assert_eq!(
        Journal::open(data.path()).unwrap().get(&key_of(&one)).unwrap(),
        None
    );
    assert_eq!(
        executor.highest().unwrap(),
        Token(0),
        "nor is the fence raised for it"
    );
    permit.set(Some((Token(9), boot_ms() + 600_000)));
    assert!(matches!(executor.execute(&one).await, Outcome::Completed { .. }));
}

/// The guard may end while the intent is written: a disk can take longer than a lease.
#[tokio::test]
async fn a_guard_that_ends_while_the_intent_is_written_is_noticed_before_the_action() {
    let (data, runtime, permit) = (
        tempfile::tempdir().unwrap(),
        FakeRuntime::new(),
        Permit::of_replica(),
    );
    let id = AgentId::new("dev").unwrap();
    let executor = Executor::open(id, runtime.clone(), data.path(), permit.clone()).unwrap();
    let one = start_command("one", "a", 9);
    // Where the journal looks for an earlier intent it finds a pipe, and waits for its writer.
    let pipe = data
        .path()
        .join("journal")
        .join(format!("{}.1.json", files::folder_name("one")));
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    permit.set(Some((Token(9), boot_ms() + 600_000)));
    let executing = tokio::spawn(async move { executor.execute(&one).await });
    let opened = tokio::task::spawn_blocking(move || std::fs::OpenOptions::new().write(true).open(pipe));
    // It opens once the journal reads: the permit and the fence are passed.
    let writer = within("the journal to look", opened).await.unwrap().unwrap();
    permit.set(None);
    drop(writer);
    let refused = within("the refusal", executing).await.unwrap();
    assert!(
        matches!(&refused, Outcome::Failed { retryable: true, error } if error.starts_with("not begun")),
        "{refused:?}"
    );
    assert_eq!(runtime.starts.load(Ordering::SeqCst), 0);
}

/// Two replicas share a journal, where the first outcome stands: a failure of the old leader would have been the
/// answer for what the new one has done.
#[tokio::test]
async fn what_fails_under_a_leadership_that_is_over_is_no_outcome() {
    let (data, runtime) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
    let open = || {
        let id = AgentId::new("dev").unwrap();
        Executor::open(id, runtime.clone(), data.path(), Permit::unlimited()).unwrap()
    };
    let (old, new) = (open(), open());
    let slow = start_command("one", "slow-fail", 8);
    let executing = {
        let slow = slow.clone();
        tokio::spawn(async move { old.execute(&slow).await })
    };
    within("the old leader's start", async {
        while runtime.starts.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    new.take_over(Token(9)).await.unwrap();
    runtime.permits.add_permits(1);
    let failed = within("its end", executing).await.unwrap();
    assert!(matches!(failed, Outcome::Failed { .. }), "{failed:?}");
    let entry = Journal::open(data.path())
        .unwrap()
        .get(&key_of(&slow))
        .unwrap()
        .unwrap();
    assert_eq!(entry.outcome, None, "the newer leader is to find out");
}
