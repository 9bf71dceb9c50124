//! Two connections for one agent, on two nodes: the newer wins, the older is told and closed, and nothing
//! that the older still says or does counts. (StreamSpace's fault 5: unregistering went by agent id, so an
//! old socket that closed evicted the new one.)

use futures::StreamExt as _;
use regent_client::{Client, EventFilter};
use regent_types::lease::AcquireLease;
use regent_types::session::SessionState;
use regent_types::{AgentId, LeaseName};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Dev, eventually, send, session_of, session_state};
use crate::streamspace::Streamspace;
use crate::wire::{Api, Came, Socket};

const AGENT: &str = "twice";

fn hello() -> Value {
    json!({ "type": "hello", "payload": { "protocol": 3, "features": [], "runtimeId": "one-engine", "sessions": [] } })
}

/// A cluster in which this agent is the only one, and the agent's key.
async fn cluster() -> (Dev, String) {
    let mut dev = Dev::start();
    let other = dev.agent_id();
    dev.kill_agent(0);
    dev.client().delete_agent(&other, true).await.unwrap();
    let key = dev
        .api(0)
        .agent(json!({ "agentId": AGENT, "platform": "process" }))
        .await;
    (dev, key)
}

/// Connects and says hello; gives the socket and its epoch.
async fn join(api: &Api, key: &str) -> (Socket, u64) {
    let mut socket = Socket::connect(api, &format!("agent_id={AGENT}"), key).await;
    socket.send(hello()).await;
    let welcome = socket.frame("welcome").await;
    (socket, welcome["epoch"].as_u64().unwrap())
}

/// A session that this connection runs.
async fn running(client: &Client, socket: &mut Socket) -> String {
    let session = client.create_session(&session_of("sleep")).await.unwrap();
    loop {
        let command = socket.frame("command").await;
        let (id, run) = (&command["commandId"], &command["run"]);
        socket
            .send(json!({ "type": "ack", "payload": { "commandId": id, "run": run } }))
            .await;
        socket
            .send(json!({ "type": "complete", "payload": { "commandId": id, "run": run, "result": {} } }))
            .await;
        // Others may clean up after sessions that are gone.
        if command["payload"]["sessionId"] == session.name.as_str() {
            break;
        }
    }
    session_state(client, &session.name, SessionState::Running).await;
    session.name.to_string()
}

/// The agent is online by this very connection, and was never offline since the revision.
async fn never_left(client: &Client, since: u64, epoch: u64) {
    let agent = client.agent(&AgentId::new(AGENT).unwrap()).await.unwrap();
    assert_eq!(agent.epoch.map(|epoch| epoch.0), Some(epoch), "{agent:?}");
    let marker = LeaseName::new("marker").unwrap();
    let acquire = AcquireLease {
        holder: "test".to_owned(),
        ttl_ms: 60_000,
        wait_ms: None,
    };
    client.acquire_lease(&marker, &acquire).await.unwrap();
    let filter = EventFilter {
        after: Some(format!("{since}.{}", u32::MAX)),
        kinds: Vec::new(),
    };
    let mut events = client.events(filter);
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        if event.subject == marker.as_str() {
            return;
        }
        assert!(
            event.subject != AGENT || !["agent.offline", "agent.disconnected"].contains(&event.kind.as_str()),
            "{event:?}"
        );
    }
    panic!("the events ended");
}

#[tokio::test]
async fn the_newer_connection_wins_and_the_older_is_told_and_closed() {
    let (dev, key) = cluster().await;
    let client = dev.client();
    let (mut older, first) = join(&dev.api(0), &key).await;
    let session = running(&client, &mut older).await;
    let since = client.index().await.unwrap().unwrap().0;
    let mut last = (older, first);
    for node in [1, 2, 2, 0] {
        let (newer, epoch) = join(&dev.api(node), &key).await;
        assert!(epoch > last.1, "epochs grow");
        let (mut older, _) = std::mem::replace(&mut last, (newer, epoch));
        let told = older.frame("superseded").await;
        assert!(told["reason"].as_str().unwrap().contains("took over"), "{told}");
        assert_eq!(older.closed().await.0, 4001);
    }
    let (mut newest, epoch) = last;
    // What its hello did not name is not running any more; a new one starts over the newest connection.
    let gone = eventually("the session to be over", || async {
        let session = client
            .session(&regent_types::SessionName::new(&session).unwrap())
            .await
            .ok()?;
        (session.state != SessionState::Running).then_some(session)
    })
    .await;
    assert!(!gone.reason.is_empty());
    running(&client, &mut newest).await;
    never_left(&client, since, epoch).await;
}

#[tokio::test]
async fn late_reports_of_the_older_connection_change_nothing() {
    let (dev, key) = cluster().await;
    let client = dev.client();
    let leader = dev.leader().await;
    let (frozen, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (mut older, _) = join(&dev.api(frozen), &key).await;
    let session = running(&client, &mut older).await;
    // Its node hears what it says only after the newer one is there.
    send(dev.file.nodes[frozen].pid, Signal::STOP);
    let client = dev.client_of(leader);
    let mut newer = Socket::connect(&dev.api(other), &format!("agent_id={AGENT}"), &key).await;
    let runs = json!([{ "sessionId": session, "state": "running", "generation": 1, "token": 0 }]);
    let hello = json!({ "protocol": 3, "runtimeId": "one-engine", "sessions": runs });
    newer.send(json!({ "type": "hello", "payload": hello })).await;
    let epoch = newer.frame("welcome").await["epoch"].as_u64().unwrap();
    let since = client.index().await.unwrap().unwrap().0;
    older.send(json!({ "type": "status", "payload": { "sessionId": session, "state": "failed", "reason": "late" } })).await;
    older
        .send(json!({ "type": "heartbeat", "payload": { "capacity": { "maxSessions": 1 } } }))
        .await;
    send(dev.file.nodes[frozen].pid, Signal::CONT);
    older.frame("superseded").await;
    assert_eq!(older.closed().await.0, 4001);
    let name = regent_types::SessionName::new(&session).unwrap();
    let found = dev.client_of(frozen).session(&name).await.unwrap();
    assert_eq!(found.state, SessionState::Running, "{}", found.reason);
    let agent = dev
        .client_of(frozen)
        .agent(&AgentId::new(AGENT).unwrap())
        .await
        .unwrap();
    assert_eq!(agent.capacity.max_sessions, None);
    never_left(&client, since, epoch).await;
}

#[tokio::test]
async fn a_late_disconnect_of_the_older_connection_changes_nothing() {
    let (dev, key) = cluster().await;
    let leader = dev.leader().await;
    let (frozen, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (older, _) = join(&dev.api(frozen), &key).await;
    send(dev.file.nodes[frozen].pid, Signal::STOP);
    // Its socket is gone, but its node learns so only after the newer one is there.
    drop(older);
    let (mut newer, epoch) = join(&dev.api(other), &key).await;
    let client = dev.client_of(leader);
    let since = client.index().await.unwrap().unwrap().0;
    send(dev.file.nodes[frozen].pid, Signal::CONT);
    let api = dev.api(frozen);
    eventually("the old node to have let go of it", || async {
        (api.metric("regent_agent_connections", "").await == 0).then_some(())
    })
    .await;
    never_left(&client, since, epoch).await;
    running(&client, &mut newer).await;
}

#[tokio::test]
async fn an_older_connection_of_a_streamspace_agent_is_closed_without_a_frame_that_it_cannot_read() {
    let dev = Dev::start();
    let mut older = Streamspace::start(&dev.api(0), AGENT).await;
    dev.agent_online(&older.id).await;
    let key = older.key.clone();
    let _newer = Streamspace::connect(&dev.api(1), AGENT, &key).await;
    match older.next().await {
        Came::Closed(code, reason) => assert_eq!(code, 4001, "{reason}"),
        Came::Frame(frame) => panic!("it was sent {frame}"),
    }
    let agent = dev.agent_online(&older.id).await;
    assert_eq!(agent.node, Some(dev.file.nodes[1].id));
}
