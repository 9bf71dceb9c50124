//! StreamSpace's own agents are served as they are: they speak nothing but v2.

use std::time::Duration;

use regent_types::agent::AgentStatus;
use regent_types::session::{Session, SessionState};
use regent_types::{AgentId, SessionName};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Dev, eventually, send, session_state};
use crate::streamspace::Streamspace;
use crate::wire::{Api, Came};

/// What StreamSpace's users applied; the agent needs the whole of it.
fn firefox() -> Value {
    json!({
        "apiVersion": "stream.space/v1alpha1", "kind": "Template",
        "metadata": { "name": "firefox-browser" },
        "spec": {
            "displayName": "Firefox", "baseImage": "lscr.io/linuxserver/firefox:latest",
            "ports": [{ "name": "vnc", "containerPort": 3000, "protocol": "TCP" }],
            "env": [{ "name": "PUID", "value": "1000" }],
            "volumeMounts": [{ "name": "home", "mountPath": "/config" }],
            "defaultResources": { "memory": "2Gi", "cpu": "1000m" },
            "vnc": { "enabled": true, "port": 3000, "protocol": "vnc" },
        },
    })
}

async fn create(api: &Api) -> Session {
    let body = json!({
        "template": "firefox-browser", "resources": { "memory": "1Gi" }, "persistentHome": true,
        "idleTimeout": "30m", "tags": ["a"], "placement": { "platform": "kubernetes" },
    });
    serde_json::from_value(api.post("sessions", body).await.ok(202)).unwrap()
}

#[tokio::test]
async fn a_streamspace_agent_is_served_for_the_whole_life_of_a_session() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    api.post("templates", firefox()).await.ok(201);
    let mut agent = Streamspace::start(&dev.api(1), "k8s").await;
    let seen = dev.agent_online(&agent.id).await;
    assert_eq!(seen.capacity.cpu.map(|cpu| cpu.0), Some(64_000));
    assert_eq!(seen.capacity.memory.map(|memory| memory.0), Some(256 << 30));

    // Start: the manifest as an object, memory and cpu flat beside it.
    let session = create(&api).await;
    assert_eq!(session.agent_id, Some(agent.id.clone()));
    let start = agent.told_to("start_session").await;
    assert_eq!(start.session(), session.name.as_str());
    let payload = &start.payload;
    assert_eq!(payload["user"], "admin");
    assert_eq!(payload["template"], "firefox-browser");
    assert_eq!(
        (&payload["memory"], &payload["cpu"]),
        (&json!("1Gi"), &json!("1"))
    );
    assert_eq!(
        (&payload["persistentHome"], &payload["tags"]),
        (&json!(true), &json!(["a"]))
    );
    assert_eq!(payload["idleTimeout"], "30m");
    let manifest = &payload["templateManifest"];
    assert_eq!(manifest["metadata"]["name"], "firefox-browser");
    assert_eq!(
        manifest["spec"]["baseImage"],
        "lscr.io/linuxserver/firefox:latest"
    );
    assert_eq!(manifest["spec"]["ports"][0]["containerPort"], 3000);
    assert_eq!(
        manifest["spec"]["env"][0],
        json!({ "name": "PUID", "value": "1000" })
    );
    assert_eq!(manifest["kind"], "Template");
    session_state(&client, &session.name, SessionState::Starting).await;
    agent.complete(&start).await;
    agent.status(session.name.as_str(), "running").await;
    let running = session_state(&client, &session.name, SessionState::Running).await;
    assert_eq!(running.status.phase, "Running");
    eventually("the pod in the session's metadata", || async {
        let session = client.session(&session.name).await.ok()?;
        (session.metadata["podIP"] == "10.0.0.1").then_some(())
    })
    .await;

    // Sleep and wake.
    let path = format!("sessions/{}", session.name);
    api.put(&format!("{path}/hibernate"), json!({})).await.ok(202);
    let hibernate = agent.told_to("hibernate_session").await;
    assert_eq!(hibernate.session(), session.name.as_str());
    session_state(&client, &session.name, SessionState::Hibernating).await;
    agent.complete(&hibernate).await;
    session_state(&client, &session.name, SessionState::Hibernated).await;
    api.put(&format!("{path}/wake"), json!({})).await.ok(202);
    let wake = agent.told_to("wake_session").await;
    agent.complete(&wake).await;
    session_state(&client, &session.name, SessionState::Running).await;

    // Stop: a persistent home stays.
    let stopped = api.delete(&path).await.ok(202);
    let stop = agent.told_to("stop_session").await;
    assert_eq!(stopped["commandId"], stop.id.as_str());
    assert_eq!(stop.payload["deletePVC"], false);
    agent.complete(&stop).await;
    session_state(&client, &session.name, SessionState::Terminated).await;
}

#[tokio::test]
async fn a_streamspace_agent_is_pinged_and_may_stamp_its_frames_as_it_likes() {
    let dev = Dev::start();
    let mut agent = Streamspace::start(&dev.api(0), "k8s").await;
    dev.agent_online(&agent.id).await;
    for timestamp in [
        json!(1_767_225_600),
        json!(1_767_225_600_000_u64),
        json!("2026-01-01T00:00:00+02:00"),
        Value::Null,
    ] {
        agent.heartbeat(timestamp, 3).await;
    }
    // Fields beside the type, no payload, types of its streams.
    agent
        .say(json!({ "type": "heartbeat", "status": "online", "activeSessions": 1 }))
        .await;
    agent
        .say(json!({ "type": "vnc_ready", "payload": { "sessionId": "x", "vncPort": 5900 } }))
        .await;
    agent
        .say(json!({ "type": "vnc_data", "sessionId": "x", "data": "aGVsbG8=" }))
        .await;
    let api = dev.api(0);
    let counted = eventually("vnc frames counted", || async {
        let counted = api.metric("regent_agent_frames_ignored_total", "unknown").await;
        (counted >= 2).then_some(counted)
    });
    agent.until(async { assert_eq!(counted.await, 2) }).await;
    // Pings came by now or come: one every heartbeat (1 s in dev).
    while agent.pings < 2 {
        let Ok(came) = tokio::time::timeout(Duration::from_secs(3), agent.socket().next()).await else {
            panic!("no ping within three heartbeats");
        };
        assert_eq!(came, Came::Frame(json!({ "type": "ping", "payload": {} })));
        agent.pings += 1;
    }
    assert_eq!(
        dev.client().agent(&agent.id).await.unwrap().status,
        AgentStatus::Online
    );
}

#[tokio::test]
async fn a_streamspace_agent_may_read_nothing_while_a_session_starts() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    api.post("templates", firefox()).await.ok(201);
    let mut agent = Streamspace::start(&api, "k8s").await;
    dev.agent_online(&agent.id).await;
    let (first, second) = (create(&api).await, create(&api).await);
    // It took the first and reads no more, not even the second or pings; heartbeats go on. What it does
    // not read must not be given up, sent twice, or make it offline.
    let start = agent.told().await;
    assert_eq!(start.session(), first.name.as_str());
    for _ in 0..6 {
        agent.heartbeat(json!("2026-01-01T00:00:00Z"), 1).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let seen = client.agent(&agent.id).await.unwrap();
    assert_eq!(
        seen.status,
        AgentStatus::Online,
        "it stays online past the 4 s of other agents"
    );
    agent.ack(&start).await;
    agent.complete(&start).await;
    session_state(&client, &first.name, SessionState::Running).await;
    let start = agent.told_to("start_session").await;
    assert_eq!(start.session(), second.name.as_str());
    agent.complete(&start).await;
    session_state(&client, &second.name, SessionState::Running).await;
    for session in [&first, &second] {
        let commands = api
            .get(&format!("commands?session={}", session.name))
            .await
            .ok(200);
        assert_eq!(commands["commands"][0]["attempts"], 1, "sent once: {commands}");
    }
}

#[tokio::test]
async fn command_error_reads_as_failed() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    api.post("templates", firefox()).await.ok(201);
    let mut agent = Streamspace::start(&api, "k8s").await;
    dev.agent_online(&agent.id).await;
    let session = create(&api).await;
    let start = agent.told_to("start_session").await;
    agent
        .say(json!({ "type": "command_error", "commandId": start.id, "error": "no such image" }))
        .await;
    let failed = session_state(&client, &session.name, SessionState::Failed).await;
    assert!(failed.reason.contains("no such image"), "{}", failed.reason);
    let command = api.get(&format!("commands/{}", start.id)).await.ok(200);
    assert_eq!(
        (&command["status"], &command["error"]),
        (&json!("failed"), &json!("no such image"))
    );
    // What it may have left behind is cleaned up.
    let stop = agent.told_to("stop_session").await;
    assert_eq!(stop.session(), session.name.as_str());
}

#[tokio::test]
async fn a_streamspace_agent_is_told_shutdown_and_goes_on_at_another_node() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    api.post("templates", firefox()).await.ok(201);
    let mut agent = Streamspace::start(&dev.api(2), "k8s").await;
    dev.agent_online(&agent.id).await;
    let session = create(&api).await;
    let start = agent.told_to("start_session").await;
    agent.complete(&start).await;
    session_state(&client, &session.name, SessionState::Running).await;

    send(dev.file.nodes[2].pid, Signal::TERM);
    let Came::Frame(frame) = agent.next().await else {
        panic!("closed without a shutdown frame")
    };
    assert_eq!(frame["type"], "shutdown");
    assert_eq!(
        agent.socket().closed().await.0,
        1001,
        "a node that stops is going away"
    );

    let (id, key) = (agent.id.clone(), agent.key.clone());
    let mut agent = Streamspace::connect(&api, id.as_str(), &key).await;
    dev.agent_online(&id).await;
    assert_eq!(
        client.session(&session.name).await.unwrap().state,
        SessionState::Running,
        "it was not lost"
    );
    api.delete(&format!("sessions/{}", session.name)).await.ok(202);
    let stop = agent.told_to("stop_session").await;
    agent.complete(&stop).await;
    session_state(
        &client,
        &SessionName::new(session.name.as_str()).unwrap(),
        SessionState::Terminated,
    )
    .await;
}

#[tokio::test]
async fn a_silent_agent_is_served_as_streamspace_s() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = Streamspace::key(&api, "silent").await;
    Streamspace::register(&api, "silent", &key).await;
    let registered = api.get("agents/silent").await.ok(200);
    assert_eq!(
        registered["status"], "offline",
        "registration alone makes nobody online"
    );
    let mut socket = crate::wire::Socket::connect(&api, "agent_id=silent", &key).await;
    dev.agent_online(&AgentId::new("silent").unwrap()).await;
    let Came::Frame(frame) = socket.next().await else {
        panic!("closed")
    };
    assert_eq!(frame["type"], "ping");
}
