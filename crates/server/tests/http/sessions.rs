//! Sessions over REST. What becomes of them on an agent is the black-box tests' matter.

use reqwest::Method;
use serde_json::{Value, json};

use super::support::TestNode;

#[tokio::test]
async fn a_session_is_made_shown_changed_and_ended() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let body = json!({ "template": "demo", "resources": { "cpu": "500m", "memory": "1Gi" }, "idleTimeout": "30m",
        "tags": ["a", "b"] });
    let made = node.post("/api/v1/sessions", body).await.is(202);
    assert_eq!(
        (&made.body["state"], &made.body["status"]["phase"]),
        (&json!("pending"), &json!("Pending"))
    );
    assert_eq!(made.body["user"], "admin");
    assert_eq!(made.body["agentId"], "dev");
    assert_eq!(made.body["idleTimeout"], "30m");
    let name = made.body["name"].as_str().unwrap();
    assert!(name.starts_with("admin-demo-"), "{name}");
    let path = format!("/api/v1/sessions/{name}");

    let shown = node.get(&path).await.is(200);
    let etag = shown.header("etag").to_owned();
    let patch = async |etag: &str, body: Value| {
        node.send(
            node.as_admin(Method::PATCH, &path)
                .header("if-match", etag)
                .json(&body),
        )
        .await
    };
    let patched = patch("*", json!({ "tags": ["t".repeat(256)], "idleTimeout": null }))
        .await
        .is(200);
    assert_eq!(patched.body["tags"][0].as_str().unwrap().len(), 256);
    assert!(patched.body["idleTimeout"].is_null());
    assert_ne!(patched.header("etag"), etag);
    patch(&etag, json!({ "tags": [] }))
        .await
        .is_problem(412, "changed");
    patch("nonsense", json!({ "tags": [] }))
        .await
        .is_problem(400, "invalid_request");

    node.post(&format!("{path}/heartbeat"), Value::Null).await.is(204);
    node.wait(&path, |session| session["status"]["lastActivity"].is_string())
        .await;
    let stale = node.get(&format!("{path}?consistency=stale")).await.is(200);
    assert!(
        stale.body["status"]["lastActivity"].is_null(),
        "a stale read does not know it"
    );

    node.put(&format!("{path}/wake"), Value::Null)
        .await
        .is_problem(409, "wrong_state");
    let ended = node.delete(&path).await.is(202);
    let again = node.delete(&path).await.is(202);
    assert_eq!(ended.body["commandId"], again.body["commandId"]);
    assert_eq!(ended.body["name"], name);
}

/// Fault 14 of StreamSpace: session endpoints checked no owner, and any user could name another.
#[tokio::test]
async fn a_user_sees_and_touches_own_sessions_only() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let (alice, bob) = (node.user("alice", "user").await, node.user("bob", "user").await);
    let made = node
        .call(
            Method::POST,
            "/api/v1/sessions",
            &alice,
            json!({ "template": "demo" }),
        )
        .await
        .is(202);
    let path = format!("/api/v1/sessions/{}", made.body["name"].as_str().unwrap());
    let as_bob = async |method: Method, path: &str, body: Value| node.call(method, path, &bob, body).await;

    as_bob(Method::GET, &path, Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::DELETE, &path, Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::PATCH, &path, json!({ "tags": [] }))
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::PUT, &format!("{path}/hibernate"), Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::POST, &format!("{path}/heartbeat"), Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::GET, "/api/v1/sessions?user=alice", Value::Null)
        .await
        .is_problem(403, "forbidden");
    let named = json!({ "template": "demo", "user": "alice" });
    as_bob(Method::POST, "/api/v1/sessions", named)
        .await
        .is_problem(403, "forbidden");
    assert_eq!(
        as_bob(Method::GET, "/api/v1/sessions", Value::Null)
            .await
            .is(200)
            .body["total"],
        0
    );
    let commands = as_bob(Method::GET, "/api/v1/commands", Value::Null).await.is(200);
    assert_eq!(commands.body["total"], 0);
    let own = node
        .call(Method::GET, "/api/v1/sessions", &alice, Value::Null)
        .await
        .is(200);
    assert_eq!(own.body["total"], 1);
    as_bob(Method::GET, "/api/v1/agents", Value::Null)
        .await
        .is_problem(403, "forbidden");
}

#[tokio::test]
async fn a_refused_placement_says_why_for_each_agent() {
    let node = TestNode::start().await;
    let none = node.post("/api/v1/sessions", json!({ "template": "demo" })).await;
    none.is_problem(503, "no_agents_available");
    node.post("/api/v1/agents/register", json!({ "agentId": "away" }))
        .await
        .is(201);
    let refused = node.post("/api/v1/sessions", json!({ "template": "demo" })).await;
    refused.is_problem(503, "no_agents_available");
    assert_eq!(refused.body["agents"][0]["agentId"], "away");
    assert!(
        refused.body["agents"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("offline"),
        "{refused:?}"
    );
    assert!(refused.headers.contains_key("retry-after"));
    let queued = node
        .post(
            "/api/v1/sessions",
            json!({ "template": "demo", "whenFull": "queue" }),
        )
        .await
        .is(202);
    assert!(queued.body["agentId"].is_null());
    node.post("/api/v1/sessions", json!({ "template": "none" }))
        .await
        .is_problem(404, "template_not_found");
}

#[tokio::test]
async fn a_quota_is_kept() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let alice = node.user("alice", "user").await;
    let quota = node
        .put("/api/v1/users/alice/quota", json!({ "sessions": 1 }))
        .await
        .is(200);
    assert_eq!(quota.body["quota"]["sessions"], 1);
    let create = async || {
        node.call(
            Method::POST,
            "/api/v1/sessions",
            &alice,
            json!({ "template": "demo" }),
        )
        .await
    };
    create().await.is(202);
    create().await.is_problem(403, "quota_exceeded");
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    for n in 0..5 {
        let tags = if n < 3 { json!(["red"]) } else { json!([]) };
        node.post("/api/v1/sessions", json!({ "template": "demo", "tags": tags }))
            .await
            .is(202);
    }
    let mut names = Vec::new();
    let mut query = "/api/v1/sessions?limit=2".to_owned();
    loop {
        let page = node.get(&query).await.is(200).body;
        assert_eq!(page["total"], 5);
        names.extend(
            page["sessions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|s| s["name"].as_str().unwrap().to_owned()),
        );
        let Some(cursor) = page["nextCursor"].as_str() else {
            break;
        };
        query = format!("/api/v1/sessions?limit=2&cursor={cursor}");
    }
    assert_eq!(names.len(), 5);
    assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
    assert_eq!(node.get("/api/v1/sessions?tag=red").await.body["total"], 3);
    assert_eq!(node.get("/api/v1/sessions?agent=other").await.body["total"], 0);
    assert_eq!(
        node.get("/api/v1/sessions?user=admin&agent=dev").await.body["total"],
        5
    );
    let foreign = node.get("/api/v1/sessions?limit=2").await.body["nextCursor"]
        .as_str()
        .unwrap()
        .to_owned();
    node.get(&format!("/api/v1/commands?cursor={foreign}"))
        .await
        .is_problem(400, "invalid_request");

    let commands = node.get("/api/v1/commands?agent=dev&limit=3").await.is(200).body;
    assert_eq!(commands["total"], 5);
    let first = &commands["commands"][0];
    assert_eq!(
        (&first["action"], &first["error"]),
        (&json!("start_session"), &Value::Null)
    );
}

#[tokio::test]
async fn a_repeated_create_makes_one_session() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let create = async || {
        let request = node
            .as_admin(Method::POST, "/api/v1/sessions")
            .header("idempotency-key", "once");
        node.send(request.json(&json!({ "template": "demo" })))
            .await
            .is(202)
    };
    let (first, second) = (create().await, create().await);
    assert_eq!(first.body["name"], second.body["name"]);
    assert_eq!(node.get("/api/v1/sessions").await.body["total"], 1);
}
