//! StreamSpace's faults, each kept out by a test that names it; the numbers are those of its list. Here are
//! those that need a whole cluster: 1 and 12 are also in `liveness`, 5 in `connections`, 4 in `leases`, 15 in
//! `v2_agent`; what a single node or agent can show is tested in the crates.

use futures::future::join_all;
use regent_types::SessionName;
use regent_types::session::SessionState;
use serde_json::{Value, json};

use crate::harness::{Dev, eventually, session_of, session_state};
use crate::streamspace::Streamspace;
use crate::wire::{Api, Came, Socket};

/// Tells the agent to do things of its own: names for the actions, in order.
async fn queue(api: &Api, agent: &str, actions: &[String]) -> Vec<String> {
    let mut ids = Vec::new();
    for action in actions {
        let command = api
            .post(&format!("agents/{agent}/commands"), json!({ "action": action }))
            .await
            .ok(202);
        ids.push(command["commandId"].as_str().unwrap().to_owned());
    }
    ids
}

async fn command_is(api: &Api, id: &str, status: &str) -> Value {
    eventually(&format!("command {id} {status}"), || async {
        let command = api.get(&format!("commands/{id}")).await.ok(200);
        (command["status"] == status).then_some(command)
    })
    .await
}

#[tokio::test]
async fn fault_2_pending_commands_without_an_error_are_loaded_and_delivered() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = Streamspace::key(&api, "away").await;
    Streamspace::register(&api, "away", &key).await;
    let actions: Vec<String> = (0..5).map(|n| format!("do.{n}")).collect();
    let ids = queue(&api, "away", &actions).await;
    for node in 0..3 {
        let list = dev
            .api(node)
            .get("commands?agent=away&status=pending")
            .await
            .ok(200);
        assert_eq!(list["total"], 5, "{list}");
        for command in list["commands"].as_array().unwrap() {
            assert!(
                command.as_object().unwrap().contains_key("error") && command["error"].is_null(),
                "{command}"
            );
        }
    }
    let mut agent = Streamspace::connect(&dev.api(1), "away", &key).await;
    for (action, id) in actions.iter().zip(&ids) {
        let told = agent.told_to(action).await;
        assert_eq!(told.id, *id, "in the order of the queue");
        agent.complete(&told).await;
    }
    for id in &ids {
        command_is(&api, id, "completed").await;
    }
}

#[tokio::test]
async fn fault_3_heartbeats_with_numbers_for_timestamps_keep_an_agent_online() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = api.agent(json!({ "agentId": "numbers" })).await;
    let mut socket = Socket::connect(&api, "agent_id=numbers", &key).await;
    let hello = json!({ "protocol": 3, "runtimeId": "r", "sessions": [] });
    socket
        .send(json!({ "type": "hello", "timestamp": 1_767_225_600, "payload": hello }))
        .await;
    let welcome = socket.frame("welcome").await;
    // Heartbeats of this kind alone, for twice its stale time.
    let beats = 2 * welcome["staleMs"].as_u64().unwrap() / welcome["heartbeatMs"].as_u64().unwrap();
    for beat in 0..beats {
        let timestamp = if beat % 2 == 0 {
            1_767_225_600 + beat
        } else {
            (1_767_225_600 + beat) * 1000
        };
        socket
            .send(json!({ "type": "heartbeat", "timestamp": timestamp, "payload": {} }))
            .await;
        let next = socket
            .next_within(std::time::Duration::from_millis(
                welcome["heartbeatMs"].as_u64().unwrap(),
            ))
            .await;
        assert!(next.is_none(), "{next:?}");
    }
    let agent = api.get("agents/numbers").await.ok(200);
    assert_eq!(
        (&agent["status"], &agent["epoch"]),
        (&json!("online"), &welcome["epoch"])
    );
}

#[tokio::test]
async fn fault_6_every_queued_command_has_a_frame_of_its_own() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = Streamspace::key(&api, "away").await;
    Streamspace::register(&api, "away", &key).await;
    let actions: Vec<String> = (0..30).map(|n| format!("do.{n}")).collect();
    queue(&api, "away", &actions).await;
    let mut agent = Streamspace::connect(&api, "away", &key).await;
    for action in &actions {
        // Reading a frame parses it as one JSON document: two joined by a newline would not.
        let told = agent.told_to(action).await;
        agent.complete(&told).await;
    }
}

#[tokio::test]
async fn fault_7_commands_flow_after_every_reconnect_and_every_new_leader() {
    let mut dev = Dev::start();
    let key = Streamspace::key(&dev.api(0), "often").await;
    Streamspace::register(&dev.api(0), "often", &key).await;
    for round in 0..6 {
        let api = dev.api(round % 3);
        let mut agent = Streamspace::connect(&api, "often", &key).await;
        let ids = queue(&dev.api((round + 1) % 3), "often", &[format!("round.{round}")]).await;
        let told = agent.told_to(&format!("round.{round}")).await;
        agent.complete(&told).await;
        command_is(&api, &ids[0], "completed").await;
        agent.hang_up().await;
    }
    // Each node leads once or more, again too; a re-elected leader reused a closed channel and crashed.
    for round in 0..3 {
        let leader = dev.leader().await;
        dev.kill_node(leader);
        let other = dev.api((leader + 1) % 3);
        let id = eventually("a command taken by the others", || async {
            let body = json!({ "action": format!("leader.{round}") });
            let answer = other
                .post_once("agents/often/commands", &format!("leader-{round}"), body)
                .await;
            (answer.status == 202).then(|| answer.body["commandId"].as_str().unwrap().to_owned())
        })
        .await;
        let mut agent = Streamspace::connect(&other, "often", &key).await;
        let told = agent.told_to(&format!("leader.{round}")).await;
        agent.complete(&told).await;
        command_is(&other, &id, "completed").await;
        agent.hang_up().await;
        dev.restart_node(leader);
        let back = dev.client_of(leader);
        eventually("the killed node to be back", || async {
            back.readyz().await.ok()
        })
        .await;
    }
}

#[tokio::test]
async fn fault_8_what_is_not_acknowledged_is_sent_again_and_late_words_move_nothing_backwards() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = api.agent(json!({ "agentId": "slow" })).await;
    let mut socket = Socket::connect(&dev.api(1), "agent_id=slow", &key).await;
    socket
        .send(json!({ "type": "hello", "payload": { "protocol": 3, "runtimeId": "r", "sessions": [] } }))
        .await;
    socket.frame("welcome").await;
    let id = queue(&api, "slow", &["think".to_owned()]).await.remove(0);
    let first = socket.frame("command").await;
    assert_eq!(
        (&first["commandId"], &first["run"], &first["attempt"]),
        (&json!(id), &json!(1), &json!(1))
    );
    assert!(first["deadline"].as_u64().unwrap() > 0 && first["token"].as_u64().unwrap() > 0);
    // Not acknowledged: it comes again, over the same connection, as the next attempt of the same run.
    let beats = async {
        loop {
            socket.send(json!({ "type": "heartbeat", "payload": {} })).await;
            if let Some(Came::Frame(frame)) = socket.next_within(std::time::Duration::from_millis(500)).await
            {
                return frame;
            }
        }
    };
    let again = tokio::time::timeout(crate::harness::PATIENCE, beats)
        .await
        .expect("it was not sent again");
    assert_eq!(again["type"], "command");
    let again = &again["payload"];
    assert_eq!(
        (&again["commandId"], &again["run"], &again["attempt"]),
        (&json!(id), &json!(1), &json!(2))
    );
    let about = json!({ "commandId": id, "run": 1 });
    socket.send(json!({ "type": "ack", "payload": about })).await;
    command_is(&api, &id, "acknowledged").await;
    socket
        .send(json!({ "type": "complete", "payload": { "commandId": id, "run": 1, "result": { "n": 1 } } }))
        .await;
    let done = command_is(&api, &id, "completed").await;
    // Late and repeated words.
    socket.send(json!({ "type": "ack", "payload": about })).await;
    socket
        .send(json!({ "type": "failed", "payload": { "commandId": id, "run": 1, "error": "late" } }))
        .await;
    socket
        .send(json!({ "type": "complete", "payload": { "commandId": id, "run": 1, "result": { "n": 2 } } }))
        .await;
    // A command after them shows that they were read.
    let next = queue(&api, "slow", &["next".to_owned()]).await.remove(0);
    let frame = socket.frame("command").await;
    assert_eq!(frame["commandId"], next.as_str());
    socket
        .send(json!({ "type": "ack", "payload": { "commandId": next, "run": 1 } }))
        .await;
    command_is(&api, &next, "acknowledged").await;
    assert_eq!(api.get(&format!("commands/{id}")).await.ok(200), done);
}

#[tokio::test]
async fn fault_9_stop_hibernate_wake_and_a_failed_start_reach_their_ends() {
    let dev = Dev::start();
    let client = dev.client();
    let session = client.create_session(&session_of("sleep")).await.unwrap().name;
    session_state(&client, &session, SessionState::Running).await;
    for _ in 0..2 {
        client.hibernate_session(&session).await.unwrap();
        session_state(&client, &session, SessionState::Hibernated).await;
        client.wake_session(&session).await.unwrap();
        session_state(&client, &session, SessionState::Running).await;
    }
    client.stop_session(&session).await.unwrap();
    session_state(&client, &session, SessionState::Terminated).await;
    let broken = json!({ "metadata": { "name": "broken" }, "spec": { "command": ["/nowhere/at/all"] } });
    dev.api(0).post("templates", broken).await.ok(201);
    let session = client.create_session(&session_of("broken")).await.unwrap().name;
    let failed = session_state(&client, &session, SessionState::Failed).await;
    assert!(!failed.reason.is_empty());
}

#[tokio::test]
async fn fault_10_a_start_of_what_exists_is_done_and_a_stop_that_fails_is_not() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    let mut agent = Streamspace::start(&api, "k8s").await;
    dev.agent_online(&agent.id).await;
    let on_it = json!({ "template": "sleep", "placement": { "platform": "kubernetes" } });
    let session = api.post("sessions", on_it).await.ok(202);
    let name = SessionName::new(session["name"].as_str().unwrap()).unwrap();
    let start = agent.told_to("start_session").await;
    agent
        .fail(&start, &format!("deployments.apps \"{name}\" already exists"))
        .await;
    session_state(&client, &name, SessionState::Running).await;
    client.stop_session(&name).await.unwrap();
    let stop = agent.told_to("stop_session").await;
    agent.fail(&stop, "the API server is away").await;
    // Tried again by itself, and not terminated before it is.
    let again = agent.told_to("stop_session").await;
    assert_eq!(again.id, stop.id);
    assert_eq!(
        client.session(&name).await.unwrap().state,
        SessionState::Terminating
    );
    assert_eq!(
        again.payload["deletePVC"], true,
        "volumes that nobody asked to keep do not leak"
    );
    agent.complete(&again).await;
    session_state(&client, &name, SessionState::Terminated).await;
}

#[tokio::test]
async fn fault_11_quota_and_capacity_hold_against_creations_at_the_same_time_on_all_nodes() {
    let dev = Dev::start();
    let api = dev.api(0);
    let user = api.user("many", "user").await;
    api.put("users/many/quota", json!({ "sessions": 3 }))
        .await
        .ok(200);
    let token = api.post("tokens", json!({ "user": "many" })).await.ok(201)["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let asked = (0..12).map(|n| {
        let node = dev.api(n % 3).with_token(&token);
        async move { node.post("sessions", json!({ "template": "sleep" })).await }
    });
    let answers = join_all(asked).await;
    let made = answers.iter().filter(|answer| answer.status == 202).count();
    assert_eq!(made, 3, "{answers:?}");
    for answer in answers.into_iter().filter(|answer| answer.status != 202) {
        answer.problem(403, "quota_exceeded");
    }
    assert_eq!(user.get("sessions").await.ok(200)["total"], 3);
    // The same for an agent's capacity, which registration alone declares.
    let mut agent = Streamspace::start(&api, "small").await;
    agent
        .say(json!({ "type": "heartbeat", "payload": { "capacity": { "maxSessions": 2 } } }))
        .await;
    eventually("the smaller capacity", || async {
        (api.get("agents/small").await.ok(200)["capacity"]["maxSessions"] == 2).then_some(())
    })
    .await;
    let on_it = json!({ "template": "sleep", "placement": { "platform": "kubernetes" } });
    let asked = (0..9).map(|n| {
        let (node, body) = (dev.api(n % 3), on_it.clone());
        async move { node.post("sessions", body).await }
    });
    let answers = join_all(asked).await;
    assert_eq!(
        answers.iter().filter(|answer| answer.status == 202).count(),
        2,
        "{answers:?}"
    );
    for answer in answers.into_iter().filter(|answer| answer.status != 202) {
        answer.problem(503, "no_agents_available");
    }
    let small = api.get("agents/small").await.ok(200);
    assert_eq!(
        (&small["activeSessions"], &small["allocated"]["sessions"]),
        (&json!(2), &json!(2))
    );
}

#[tokio::test]
async fn fault_13_a_command_reaches_its_agent_from_every_node_and_waits_when_it_is_away() {
    let dev = Dev::start();
    let mut agent = Streamspace::start(&dev.api(2), "there").await;
    dev.agent_online(&agent.id).await;
    for node in 0..3 {
        let id = queue(&dev.api(node), "there", &[format!("from.{node}")])
            .await
            .remove(0);
        let told = agent.told_to(&format!("from.{node}")).await;
        agent.complete(&told).await;
        command_is(&dev.api((node + 1) % 3), &id, "completed").await;
    }
    let key = agent.key.clone();
    agent.hang_up().await;
    dev.agent_status(
        &regent_types::AgentId::new("there").unwrap(),
        regent_types::agent::AgentStatus::Offline,
    )
    .await;
    let id = queue(&dev.api(0), "there", &["later".to_owned()]).await.remove(0);
    let waiting = dev.api(1).get(&format!("commands/{id}")).await.ok(200);
    assert_eq!(
        (&waiting["status"], &waiting["attempts"]),
        (&json!("pending"), &json!(0)),
        "published to nobody is not sent"
    );
    let mut agent = Streamspace::connect(&dev.api(1), "there", &key).await;
    assert_eq!(agent.told_to("later").await.id, id);
}

#[tokio::test]
async fn fault_14_no_key_is_a_master_key_and_sessions_are_their_owners() {
    let dev = Dev::start();
    let api = dev.api(0);
    let key = api.agent(json!({ "agentId": "one" })).await;
    api.agent(json!({ "agentId": "two" })).await;
    assert_eq!(
        Socket::try_connect(&dev.api(1), "agent_id=two", &key).await.err(),
        Some(403)
    );
    assert_eq!(
        Socket::try_connect(&dev.api(1), "agent_id=nobody", &key)
            .await
            .err(),
        Some(403)
    );
    let one = api.with_token(&key);
    one.post("agents/register", json!({ "agentId": "two" }))
        .await
        .problem(403, "forbidden");
    let (anna, bert) = (api.user("anna", "user").await, api.user("bert", "user").await);
    assert_eq!(
        Socket::try_connect(&dev.api(1), "agent_id=one", anna_key(&anna).await.as_str())
            .await
            .err(),
        Some(403)
    );
    let session = anna
        .post("sessions", json!({ "template": "sleep" }))
        .await
        .ok(202);
    assert_eq!(session["user"], "anna");
    let path = format!("sessions/{}", session["name"].as_str().unwrap());
    bert.get(&path).await.problem(403, "forbidden");
    bert.delete(&path).await.problem(403, "forbidden");
    bert.put(&format!("{path}/hibernate"), json!({}))
        .await
        .problem(403, "forbidden");
    bert.post("sessions", json!({ "template": "sleep", "user": "anna" }))
        .await
        .problem(403, "forbidden");
    assert_eq!(bert.get("sessions").await.ok(200)["total"], 0);
    assert_eq!(anna.get(&path).await.ok(200)["name"], session["name"]);
}

async fn anna_key(anna: &Api) -> String {
    anna.post("tokens", json!({})).await.ok(201)["token"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn fault_17_any_user_name_makes_a_session_name_that_every_runtime_takes() {
    let dev = Dev::start();
    let (api, client) = (dev.api(0), dev.client());
    let long = format!("Some.Person+{}@Example.COM", "x".repeat(80));
    for user in [long.as_str(), "UPPER_case", "9.9"] {
        let theirs = api.user(user, "user").await;
        let session = theirs
            .post("sessions", json!({ "template": "sleep" }))
            .await
            .ok(202);
        assert_eq!(session["user"], user);
        let name = session["name"].as_str().unwrap();
        assert!(name.len() <= 63, "{name}");
        assert!(
            name.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "{name}"
        );
        assert!(name.as_bytes()[0].is_ascii_alphanumeric(), "{name}");
        let (front, digits) = name.rsplit_once('-').unwrap();
        assert!(front.ends_with("-sleep"), "{name}");
        assert!(
            digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()),
            "{name}"
        );
        session_state(&client, &SessionName::new(name).unwrap(), SessionState::Running).await;
    }
}

#[tokio::test]
async fn fault_18_health_and_metrics_say_how_the_cluster_is() {
    let mut dev = Dev::start();
    let leader = dev.leader().await;
    let (killed, left) = ((leader + 1) % 3, (leader + 2) % 3);
    let api = dev.api(left);
    let health = api.get("/health").await.ok(200);
    assert_eq!(
        (&health["status"], &health["reachable"], &health["members"]),
        (&json!("ok"), &json!(3), &json!(3))
    );
    assert_eq!(health["leader"], dev.file.nodes[leader].id.0);
    assert_eq!(api.get("/readyz").await.status, 200);
    assert_eq!(api.metric("regent_ready", "").await, 1);
    assert_eq!(api.metric("regent_agents", "online").await, 1);
    let cluster = api.get("cluster").await.ok(200);
    assert_eq!(cluster["members"].as_array().unwrap().len(), 3);

    dev.kill_node(killed);
    eventually("degraded health", || async {
        let health = api.get("/health").await;
        (health.status == 200 && health.body["status"] == "degraded" && health.body["reachable"] == 2)
            .then_some(())
    })
    .await;
    dev.kill_node(leader);
    eventually("no health without a quorum", || async {
        let health = api.get("/health").await;
        (health.status == 503 && health.body["status"] == "unavailable").then_some(())
    })
    .await;
    assert_eq!(api.get("/readyz").await.status, 503);
    assert_eq!(api.get("/livez").await.status, 200, "the process itself lives");
    assert_eq!(api.metric("regent_ready", "").await, 0);
    assert_eq!(api.get("sessions?consistency=stale").await.status, 200);
    let refused = api.get("sessions").await;
    assert_eq!(refused.status, 503, "{}", refused.text);
    refused.is_a_problem();
}
