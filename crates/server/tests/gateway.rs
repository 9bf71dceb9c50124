//! Agents at the gateway of real nodes: what is promised, and the faults of StreamSpace that must not
//! come back (numbers as in the list of its faults).

mod harness;

use std::time::Duration;

use harness::{Node, Setting, TOKEN};
use serde_json::{Value, json};

fn ids(command: &Value) -> Value {
    json!({"commandId": command["commandId"], "run": command["run"]})
}

#[tokio::test]
async fn a_session_goes_from_its_creation_to_running_through_a_connected_agent() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    assert_eq!(agent.welcome["protocol"], 3);
    assert_eq!(agent.welcome["node"], 1);
    assert_eq!(agent.welcome["heartbeatMs"], 1000);
    assert_eq!(agent.welcome["epoch"], agent.welcome["token"]);

    let name = node
        .create_session_with(json!({"tags": ["x"], "resources": {"cpu": "250m"}}))
        .await;
    let command = agent.expect("command").await;
    assert_eq!(command["action"], "start_session");
    assert_eq!(command["run"], 1);
    assert_eq!(command["attempt"], 1);
    assert_eq!(command["token"], agent.welcome["token"]);
    let payload = &command["payload"];
    assert_eq!(payload["sessionId"], name.as_str());
    assert_eq!(payload["user"], "admin");
    assert_eq!(payload["cpu"], "250m");
    assert_eq!(payload["generation"], 1);
    assert_eq!(payload["tags"], json!(["x"]));
    assert_eq!(payload["templateManifest"]["kind"], "Template");

    agent.send("ack", ids(&command)).await;
    node.until(
        &format!("/commands/{}", command["commandId"].as_str().unwrap()),
        "acknowledged",
        |c| c["status"] == "acknowledged",
    )
    .await;
    let mut done = ids(&command);
    done["result"] = json!({"url": "http://127.0.0.1:9/", "metadata": {"pid": 7}});
    agent.send("complete", done).await;
    let session = node
        .until(&format!("/sessions/{name}"), "it runs", |s| {
            s["state"] == "running"
        })
        .await;
    assert_eq!(session["status"]["url"], "http://127.0.0.1:9/");
    assert_eq!(session["metadata"]["pid"], 7);
    assert_eq!(session["agentId"], "a");
}

#[tokio::test]
async fn who_may_not_connect_is_told_before_the_upgrade() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    node.register("b").await;
    let made = node.post("/agents/b/token", json!({})).await;
    let of_b = made["token"]
        .as_str()
        .or(made["secret"].as_str())
        .unwrap_or_else(|| panic!("{made}"))
        .to_owned();
    for (agent, token, status, code) in [
        ("a", "", 401, "unauthenticated"),
        ("a", "regent_wrong", 401, "unauthenticated"),
        ("a", of_b.as_str(), 403, "forbidden"),
        ("nobody", TOKEN, 404, "agent_not_found"),
        ("%20", TOKEN, 400, "invalid_request"),
    ] {
        let (got, problem) = node
            .dial(agent, token)
            .await
            .err()
            .unwrap_or_else(|| panic!("{agent} was let in"));
        assert_eq!(
            (got, problem["code"].as_str()),
            (status, Some(code)),
            "{agent}: {problem}"
        );
    }
    assert!(node.dial("b", &of_b).await.is_ok());
}

/// 1: heartbeats refreshed a timestamp but not the status, so no session could be made after a reconnect.
#[tokio::test]
async fn streamspace_fault_1_an_agent_that_reconnects_is_online_and_takes_sessions_at_once() {
    let node = Node::single(Setting::default()).await;
    let agent = node.register("a").await;
    assert_eq!(
        agent["status"], "offline",
        "registration alone makes nobody online"
    );
    for _ in 0..3 {
        let mut agent = node.agent("a").await;
        assert_eq!(node.get("/agents/a").await["status"], "online");
        node.create_session().await;
        assert_eq!(agent.expect("command").await["action"], "start_session");
        agent.close().await;
        node.until("/agents/a", "it is offline", |a| a["status"] == "offline")
            .await;
    }
}

/// 3: heartbeats with numbers as timestamps were refused, and the agent cut off.
#[tokio::test]
async fn streamspace_fault_3_timestamps_may_be_numbers_text_or_absent() {
    let setting = Setting {
        heartbeat: Duration::from_millis(100),
        stale_after: Duration::from_millis(800),
    };
    let node = Node::single(setting).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    let token = node.get("/agents/a").await["token"].clone();
    let mut heard = Value::Null;
    // Longer than the stale time in all: what was not heard would be lost.
    for timestamp in [
        "1767225600",
        "1767225600000",
        "\"2026-01-01T00:00:00Z\"",
        "1767225600.5",
        "null",
    ] {
        for _ in 0..3 {
            let frame =
                format!(r#"{{"type":"heartbeat","timestamp":{timestamp},"payload":{{"status":"healthy"}}}}"#);
            heard = node.hear(&mut agent, "a", &frame, &heard).await;
        }
    }
    assert_eq!(
        node.get("/agents/a").await["token"],
        token,
        "it was never lost in between"
    );
}

/// 5: unregistering went by agent id, so that an old socket's end evicted the new one.
#[tokio::test]
async fn streamspace_fault_5_the_end_of_an_old_socket_does_not_evict_the_new_one() {
    let nodes = Node::cluster(3, Setting::default()).await;
    nodes[0].register("a").await;
    let mut old = nodes[1].agent("a").await;
    let name = nodes[0].create_session().await;
    let command = old.expect("command").await;

    let mut new = nodes[2].agent("a").await;
    assert!(new.welcome["epoch"].as_u64() > old.welcome["epoch"].as_u64());
    assert!(
        old.expect("superseded").await["reason"]
            .as_str()
            .unwrap()
            .contains("node 3")
    );
    // What the old one says now changes nothing.
    let mut failed = ids(&command);
    failed["error"] = json!("too late");
    let _ = tokio::time::timeout(Duration::from_secs(1), old.send("failed", failed)).await;
    assert_eq!(old.closed().await.code, 4001);
    drop(old);

    let again = new.work(json!({})).await;
    assert_eq!(again["commandId"], command["commandId"]);
    assert_eq!(
        (again["run"].clone(), again["attempt"].clone()),
        (json!(1), json!(2))
    );
    let session = nodes[0]
        .until(&format!("/sessions/{name}"), "it runs", |s| {
            s["state"] == "running"
        })
        .await;
    assert_eq!(session["agentId"], "a");
    for node in &nodes {
        let agent = node.get("/agents/a").await;
        assert_eq!(
            (agent["status"].clone(), agent["node"].clone()),
            (json!("online"), json!(3))
        );
        assert_eq!(agent["epoch"], new.welcome["epoch"]);
    }
}

/// 6: several messages shared one frame, and agents lost them all.
#[tokio::test]
async fn streamspace_fault_6_every_command_has_a_frame_of_its_own() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    let mut expected = Vec::new();
    for n in 0..40 {
        // One line each, so that all may be sent at once.
        if n % 2 == 0 {
            expected.push(node.create_session().await);
        } else {
            node.post(
                "/agents/a/commands",
                json!({"action": "note", "payload": {"n": n}}),
            )
            .await;
        }
    }
    let mut started = Vec::new();
    let mut notes = Vec::new();
    for _ in 0..40 {
        // The harness parses each frame as one JSON value.
        let command = agent.work(json!({})).await;
        match command["action"].as_str().unwrap() {
            "start_session" => started.push(command["payload"]["sessionId"].as_str().unwrap().to_owned()),
            _ => notes.push(command["payload"]["n"].as_u64().unwrap()),
        }
    }
    started.sort();
    expected.sort();
    assert_eq!(started, expected);
    assert_eq!(
        notes,
        (0..40).filter(|n| n % 2 == 1).collect::<Vec<u64>>(),
        "one line keeps its order"
    );
}

/// 7: a write loop that had ended was never started again after a reconnect.
#[tokio::test]
async fn streamspace_fault_7_commands_flow_after_every_reconnect() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    for n in 0..10 {
        let mut agent = node.agent("a").await;
        let command = node
            .post(
                "/agents/a/commands",
                json!({"action": "note", "payload": {"n": n}}),
            )
            .await;
        let got = agent.work(json!({"n": n})).await;
        assert_eq!(got["commandId"], command["commandId"]);
        let id = command["commandId"].as_str().unwrap();
        let done = node
            .until(&format!("/commands/{id}"), "it is done", |c| {
                c["status"] == "completed"
            })
            .await;
        assert_eq!(done["result"]["n"], n);
        // Dropped without a close handshake, every other time.
        if n % 2 == 0 {
            agent.close().await;
        }
    }
}

/// 8: no retry, and late messages moved a status backwards. Also StreamSpace's test 3.2.
#[tokio::test]
async fn streamspace_fault_8_what_was_not_acknowledged_is_sent_again_and_nothing_moves_backwards() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    let queued = node.post("/agents/a/commands", json!({"action": "note"})).await;
    let path = format!("/commands/{}", queued["commandId"].as_str().unwrap());
    assert_eq!(agent.expect("command").await["attempt"], 1);
    assert_eq!(node.get(&path).await["status"], "sent");
    drop(agent);
    node.until("/agents/a", "it is offline", |a| a["status"] == "offline")
        .await;
    let waiting = node.post("/agents/a/commands", json!({"action": "note"})).await;
    assert_eq!(
        (waiting["status"].clone(), waiting["error"].clone()),
        (json!("pending"), Value::Null)
    );

    let mut agent = node.agent("a").await;
    let again = agent.work(json!({"ok": true})).await;
    assert_eq!(
        (again["run"].clone(), again["attempt"].clone()),
        (json!(1), json!(2))
    );
    node.until(&path, "it is done", |c| c["status"] == "completed")
        .await;
    // Late words about what is done.
    agent.send("ack", ids(&again)).await;
    let mut failed = ids(&again);
    failed["error"] = json!("late");
    agent.send("failed", failed).await;
    let second = agent.work(json!({})).await;
    assert_eq!(second["commandId"], waiting["commandId"]);
    node.until(
        &format!("/commands/{}", waiting["commandId"].as_str().unwrap()),
        "it is done",
        |c| c["status"] == "completed",
    )
    .await;
    let command = node.get(&path).await;
    assert_eq!(
        (command["status"].clone(), command["error"].clone()),
        (json!("completed"), Value::Null)
    );
}

/// 12: a heartbeat overwrote `draining`, and counts of active sessions were always 0.
#[tokio::test]
async fn streamspace_fault_12_draining_survives_heartbeats_reconnects_and_registration() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    node.create_session().await;
    agent.work(json!({})).await;
    node.post("/agents/a/drain", json!({})).await;
    agent
        .send(
            "heartbeat",
            json!({"status": "online", "activeSessions": 0, "capacity": {"maxSessions": 77}}),
        )
        .await;
    let shown = node
        .until("/agents/a", "the capacity is taken up", |a| {
            a["capacity"]["maxSessions"] == 77
        })
        .await;
    assert_eq!(shown["scheduling"], "draining");
    assert_eq!(shown["activeSessions"], 1);
    agent.close().await;
    node.register("a").await;
    let _agent = node.agent("a").await;
    let shown = node.get("/agents/a").await;
    assert_eq!(
        (shown["status"].clone(), shown["scheduling"].clone()),
        (json!("online"), json!("draining"))
    );
    let (status, problem) = node.call("POST", "/sessions", json!({"template": "demo"})).await;
    assert_eq!(
        (status, problem["code"].clone()),
        (503, json!("no_agents_available"))
    );
}

#[tokio::test]
async fn a_streamspace_agent_is_served_in_its_own_dialect() {
    let node = Node::single(Setting {
        heartbeat: Duration::from_millis(200),
        ..Setting::default()
    })
    .await;
    node.register("k8s").await;
    let mut agent = node.dial("k8s", TOKEN).await.unwrap();
    // No timestamp, no hello: what its Kubernetes agent sends first.
    agent
        .send_text(
            r#"{"type":"heartbeat","payload":{"status":"online","activeSessions":0,"capacity":null}}"#.into(),
        )
        .await;
    node.until("/agents/k8s", "it is online", |a| a["status"] == "online")
        .await;
    let ping = loop {
        let frame = agent.next().await.unwrap();
        if frame["type"] == "ping" {
            break frame;
        }
    };
    assert!(ping.get("timestamp").is_none(), "{ping}");
    agent.send_text(r#"{"type":"pong"}"#.into()).await;

    let name = node.create_session().await;
    let frame = loop {
        let frame = agent.next().await.unwrap();
        if frame["type"] == "command" {
            break frame;
        }
    };
    assert!(frame.get("timestamp").is_none(), "{frame}");
    assert_eq!(frame["payload"]["action"], "start_session");
    assert!(frame["payload"]["payload"]["templateManifest"]["metadata"]["name"].is_string());
    let id = frame["payload"]["commandId"].clone();
    // Fields beside the type, no run, numbers for times, words of its own.
    agent
        .send_text(json!({"type": "ack", "timestamp": 1_767_225_600, "commandId": id}).to_string())
        .await;
    agent.send_text(json!({"type": "status", "payload": {"sessionId": name, "state": "running", "vncReady": true, "vncPort": 5900, "platformMetadata": {"podName": "p"}}}).to_string()).await;
    agent
        .send_text(
            json!({"type": "complete", "payload": {"commandId": id, "result": {"sessionId": name}}})
                .to_string(),
        )
        .await;
    agent
        .send_text(json!({"type": "vnc_ready", "payload": {"sessionId": name}}).to_string())
        .await;
    node.until(&format!("/sessions/{name}"), "it runs", |s| {
        s["state"] == "running"
    })
    .await;

    node.call("DELETE", &format!("/sessions/{name}"), Value::Null)
        .await;
    let frame = loop {
        let frame = agent.next().await.unwrap();
        if frame["type"] == "command" {
            break frame;
        }
    };
    assert_eq!(frame["payload"]["action"], "stop_session");
    let id = frame["payload"]["commandId"].clone();
    agent.send_text(json!({"type": "command_error", "payload": {"commandId": id, "error": "deployments.apps \"x\" not found"}}).to_string()).await;
    node.until(&format!("/sessions/{name}"), "it is over", |s| {
        s["state"] == "terminated"
    })
    .await;
}

#[tokio::test]
async fn a_silent_agent_is_taken_for_streamspaces_and_may_still_say_hello() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.dial("a", TOKEN).await.unwrap();
    let before = node
        .until("/agents/a", "it is online", |a| a["status"] == "online")
        .await;
    agent.send("hello", json!({"protocol": 3, "sessions": []})).await;
    let welcome = agent.expect("welcome").await;
    assert!(welcome["epoch"].as_u64() > before["epoch"].as_u64());
    node.create_session().await;
    assert_eq!(agent.expect("command").await["attempt"], 1);
}

#[tokio::test]
async fn frames_that_cannot_be_read_are_ignored_and_others_go_on() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    node.register("b").await;
    let mut other = node.agent("b").await;
    let mut agent = node.agent("a").await;
    for text in [
        "",
        "[]",
        "nonsense",
        r#"{"type":7}"#,
        r#"{"type":"ack"}"#,
        "{\"type\":\"pong\"}\n{\"type\":\"pong\"}",
    ] {
        agent.send_text(text.to_owned()).await;
    }
    agent
        .send_text(r#"{"type":"tomorrow","payload":{"a":[1,2]}}"#.to_owned())
        .await;
    agent.send_binary(vec![0, 159, 146, 150]).await;
    node.post("/agents/a/commands", json!({"action": "note"})).await;
    assert_eq!(agent.work(json!({})).await["action"], "note");

    // Too many in a row: it is better off reconnecting.
    for _ in 0..20 {
        agent.send_text("nonsense".to_owned()).await;
    }
    assert_eq!(agent.closed().await.code, 1008);
    node.until("/agents/a", "it is offline", |a| a["status"] == "offline")
        .await;
    node.post("/agents/b/commands", json!({"action": "note"})).await;
    assert_eq!(other.work(json!({})).await["action"], "note");
}

#[tokio::test]
async fn a_frame_over_the_limit_ends_the_connection_that_sent_it() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    agent
        .send(
            "progress",
            json!({"commandId": "c", "message": "x".repeat(2 << 20)}),
        )
        .await;
    agent.closed().await;
    node.until("/agents/a", "it is offline", |a| a["status"] == "offline")
        .await;
}

#[tokio::test]
async fn an_agent_that_falls_silent_is_offline_after_its_stale_time() {
    let setting = Setting {
        heartbeat: Duration::from_millis(100),
        stale_after: Duration::from_millis(600),
    };
    let node = Node::single(setting).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    // The socket stays open and nothing is read or written, as with a frozen process.
    node.until("/agents/a", "it is offline", |a| a["status"] == "offline")
        .await;
    agent.closed().await;
    node.agent("a").await;
    assert_eq!(node.get("/agents/a").await["status"], "online");
}

/// An idle cluster writes nothing: neither heartbeats nor reconcilers reach the log.
#[tokio::test]
async fn heartbeats_of_idle_agents_write_nothing() {
    let setting = Setting {
        heartbeat: Duration::from_millis(100),
        stale_after: Duration::from_secs(3),
    };
    let node = Node::single(setting).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    node.create_session().await;
    agent.work(json!({})).await;
    node.until("/sessions", "it runs", |s| s["sessions"][0]["state"] == "running")
        .await;
    // A cluster writes down who founded it a moment after its start.
    node.until("/cluster", "its member is written down", |c| {
        c["members"][0]["since"].is_string()
    })
    .await;
    let index = |cluster: &Value| cluster["members"][0]["appliedIndex"].clone();
    let before = index(&node.get("/cluster").await);
    let mut heard = Value::Null;
    for _ in 0..20 {
        let frame = r#"{"type":"heartbeat","payload":{"activeSessions":1,"capacity":{"maxSessions":100,"cpu":"64","memory":"256Gi"}}}"#;
        heard = node.hear(&mut agent, "a", frame, &heard).await;
    }
    assert_eq!(index(&node.get("/cluster").await), before);
    assert!(before.as_u64() > Some(0), "{before}");
}

#[tokio::test]
async fn a_node_without_a_quorum_lets_its_agents_go() {
    let setting = Setting {
        heartbeat: Duration::from_millis(200),
        stale_after: Duration::from_secs(6),
    };
    let mut nodes = Node::cluster(3, setting).await;
    nodes[0].register("a").await;
    let mut agent = nodes[0].agent("a").await;
    nodes[1].stop().await;
    nodes[2].stop().await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, 1001, "{closed:?}");
    assert!(closed.reason.contains("cut off"), "{closed:?}");
}

#[tokio::test]
async fn a_node_that_stops_lets_its_agents_go_and_they_are_not_lost() {
    let mut nodes = Node::cluster(3, Setting::default()).await;
    nodes[0].register("a").await;
    let mut agent = nodes[1].agent("a").await;
    let reading = tokio::spawn(async move { agent.closed().await });
    nodes[1].stop().await;
    assert_eq!(reading.await.unwrap().code, 1001);
    let shown = nodes[0]
        .until("/agents/a", "it is offline", |a| a["status"] == "offline")
        .await;
    assert_eq!(shown["replicas"], json!([]));
    let mut agent = nodes[2].agent("a").await;
    nodes[0].create_session().await;
    agent.work(json!({})).await;
}

#[tokio::test]
async fn idle_and_overlong_sessions_are_put_to_sleep_and_ended() {
    let node = Node::single(Setting::default()).await;
    node.register("a").await;
    let mut agent = node.agent("a").await;
    let name = node
        .create_session_with(json!({"idleTimeout": "1s", "maxSessionDuration": "4s"}))
        .await;
    assert_eq!(agent.work(json!({})).await["action"], "start_session");
    assert_eq!(agent.work(json!({})).await["action"], "hibernate_session");
    let asleep = node
        .until(&format!("/sessions/{name}"), "it sleeps", |s| {
            s["state"] == "hibernated"
        })
        .await;
    assert!(
        asleep["reason"].as_str().unwrap().contains("idle for 1s"),
        "{asleep}"
    );
    assert_eq!(agent.work(json!({})).await["action"], "stop_session");
    node.until(&format!("/sessions/{name}"), "it is over", |s| {
        s["state"] == "terminated"
    })
    .await;
}

#[tokio::test]
async fn a_session_that_waits_is_placed_when_an_agent_comes() {
    let node = Node::single(Setting::default()).await;
    let name = node.create_session_with(json!({"whenFull": "queue"})).await;
    assert_eq!(node.get(&format!("/sessions/{name}")).await["state"], "pending");
    node.register("a").await;
    let mut agent = node.agent("a").await;
    assert_eq!(agent.work(json!({})).await["payload"]["sessionId"], name.as_str());
    node.until(&format!("/sessions/{name}"), "it runs", |s| {
        s["state"] == "running"
    })
    .await;
}
