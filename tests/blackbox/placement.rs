//! Where sessions go: refused with a reason for each agent, queued, by label, region and platform, least
//! loaded first, never to an agent that is cordoned or drained.

use regent_types::session::{Session, SessionState};
use regent_types::{AgentId, SessionName};
use serde_json::{Value, json};

use crate::harness::{Dev, eventually, session_state};
use crate::streamspace::Streamspace;
use crate::wire::Api;

fn name(session: &Value) -> SessionName {
    SessionName::new(session["name"].as_str().unwrap()).unwrap()
}

async fn create(api: &Api, placement: Value) -> crate::wire::Answer {
    api.post("sessions", json!({ "template": "sleep", "placement": placement }))
        .await
}

#[tokio::test]
async fn a_session_that_nobody_can_take_is_refused_with_a_reason_for_each_agent() {
    let mut dev = Dev::start();
    let api = dev.api(0);
    dev.add_agent(
        "small",
        &[
            "--max-sessions",
            "1",
            "--cpu",
            "500m",
            "--region",
            "eu",
            "--label",
            "disk=ssd",
        ],
    )
    .await;
    let small = AgentId::new("small").unwrap();
    dev.agent_online(&small).await;
    eventually("its capacity", || async {
        (api.get("agents/small").await.ok(200)["capacity"]["maxSessions"] == 1).then_some(())
    })
    .await;
    api.agent(json!({ "agentId": "away" })).await;
    api.post("agents/dev/cordon", json!({})).await.ok(200);
    let reasons = |problem: &Value| {
        let text = problem.to_string();
        for agent in ["dev", "small", "away"] {
            assert!(text.contains(agent), "{agent} is not named: {text}");
        }
        text
    };
    for (asked, because) in [
        (json!({ "region": "us" }), "region"),
        (json!({ "labels": { "disk": "hdd" } }), "disk"),
        (json!({ "platform": "docker" }), "platform"),
    ] {
        let text = reasons(&create(&api, asked).await.problem(503, "no_agents_available"));
        assert!(
            text.contains(because) && text.contains("cordoned") && text.contains("offline"),
            "{text}"
        );
    }
    let large = json!({ "template": "sleep", "resources": { "cpu": "2" } });
    let text = reasons(
        &api.post("sessions", large)
            .await
            .problem(503, "no_agents_available"),
    );
    assert!(text.contains("cpu"), "{text}");
    let wanted = json!({ "region": "eu", "labels": { "disk": "ssd" }, "platform": "process" });
    let session = create(&dev.api(2), wanted.clone()).await.ok(202);
    assert_eq!(session["agentId"], "small");
    let text = reasons(
        &create(&dev.api(1), wanted)
            .await
            .problem(503, "no_agents_available"),
    );
    assert!(text.contains("sessions"), "{text}");
    session_state(&dev.client(), &name(&session), SessionState::Running).await;
    assert_eq!(
        api.get("sessions").await.ok(200)["total"],
        1,
        "what was refused left nothing behind"
    );
}

#[tokio::test]
async fn a_session_that_waits_is_placed_in_order_when_there_is_room() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    api.post("agents/dev/cordon", json!({})).await.ok(200);
    let queued = json!({ "template": "sleep", "whenFull": "queue" });
    let mut waiting = Vec::new();
    for node in 0..3 {
        let session = dev.api(node).post("sessions", queued.clone()).await.ok(202);
        assert_eq!(
            (&session["state"], &session["agentId"]),
            (&json!("pending"), &Value::Null)
        );
        assert!(
            !session["reason"].as_str().unwrap().is_empty(),
            "it says what it waits for: {session}"
        );
        waiting.push(name(&session));
    }
    // One that is called off while it waits is over at once.
    let last = waiting.pop().unwrap();
    api.delete(&format!("sessions/{last}")).await.ok(202);
    session_state(&client, &last, SessionState::Terminated).await;
    api.post("agents/dev/uncordon", json!({})).await.ok(200);
    for session in &waiting {
        let session = session_state(&client, session, SessionState::Running).await;
        assert_eq!(session.agent_id, Some(dev.agent_id()));
    }
}

#[tokio::test]
async fn the_least_loaded_agent_takes_the_next_session() {
    let dev = Dev::start();
    let api = dev.api(0);
    let mut agents = Vec::new();
    for id in ["a", "b", "c"] {
        agents.push(Streamspace::start(&api, id).await);
        dev.agent_online(&agents.last().unwrap().id).await;
    }
    let mut placed = Vec::new();
    for n in 0..6 {
        let session = create(&dev.api(n % 3), json!({ "platform": "kubernetes" }))
            .await
            .ok(202);
        placed.push(session["agentId"].as_str().unwrap().to_owned());
    }
    assert_eq!(
        placed,
        ["a", "b", "c", "a", "b", "c"],
        "least loaded first, then by id"
    );
}

#[tokio::test]
async fn a_drained_agent_takes_nothing_and_its_sessions_are_waited_for_or_stopped() {
    let mut dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    let session = create(&api, json!({})).await.ok(202);
    session_state(&client, &name(&session), SessionState::Running).await;
    let agent = api.post("agents/dev/drain", json!({})).await.ok(200);
    assert_eq!(
        (&agent["scheduling"], &agent["status"]),
        (&json!("draining"), &json!("online"))
    );
    let refused = create(&api, json!({})).await.problem(503, "no_agents_available");
    assert!(refused.to_string().contains("draining"), "{refused}");
    // Neither a new connection nor a registration ends it; what runs goes on.
    dev.kill_agent(0);
    dev.agent_status(&dev.agent_id(), regent_types::agent::AgentStatus::Offline)
        .await;
    dev.restart_agent(0);
    dev.agent_online(&dev.agent_id()).await;
    let agent = api.get("agents/dev").await.ok(200);
    assert_eq!(
        (&agent["scheduling"], &agent["activeSessions"]),
        (&json!("draining"), &json!(1))
    );
    assert_eq!(
        client.session(&name(&session)).await.unwrap().state,
        SessionState::Running
    );
    // With a deadline it is stopped when that is over.
    api.post("agents/dev/drain", json!({ "deadline": "1s" }))
        .await
        .ok(200);
    let ended: Session = session_state(&client, &name(&session), SessionState::Terminated).await;
    assert!(ended.reason.contains("drain"), "{}", ended.reason);
    api.post("agents/dev/uncordon", json!({})).await.ok(200);
    let next = create(&api, json!({})).await.ok(202);
    session_state(&client, &name(&next), SessionState::Running).await;
    api.delete("agents/dev").await.problem(409, "wrong_state");
    assert!([200, 204].contains(&api.delete("agents/dev?force=true").await.status));
    let lost = session_state(&client, &name(&next), SessionState::Lost).await;
    assert!(!lost.reason.is_empty());
}
