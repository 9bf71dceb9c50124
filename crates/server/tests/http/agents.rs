//! Agents and commands over REST.

use reqwest::Method;
use serde_json::{Value, json};

use super::support::TestNode;

#[tokio::test]
async fn an_agent_is_registered_once_and_known_after() {
    let node = TestNode::start().await;
    // As StreamSpace's Kubernetes agent sends it.
    let body = json!({ "agentId": "k8s", "platform": "kubernetes", "region": "eu",
        "capacity": { "maxSessions": 100, "cpu": "64 cores", "memory": "256Gi", "storage": "1Ti" },
        "metadata": { "version": "v2" } });
    let new = node.post("/api/v1/agents/register", body.clone()).await.is(201);
    assert_eq!(
        (&new.body["agentId"], &new.body["status"]),
        (&json!("k8s"), &json!("offline"))
    );
    assert_eq!(
        (&new.body["capacity"]["cpu"], &new.body["metadata"]["version"]),
        (&json!("64"), &json!("v2"))
    );
    node.post("/api/v1/agents/register", body).await.is(200);
    node.post("/api/v1/agents/register", json!({ "agentId": "a b" }))
        .await
        .is_problem(400, "invalid_request");
    node.delete("/api/v1/agents/k8s").await;
    node.get("/api/v1/agents/k8s")
        .await
        .is_problem(404, "agent_not_found");
}

/// Fault 14 of StreamSpace: a bootstrap key was a master key for any agent id.
#[tokio::test]
async fn an_agents_token_is_good_for_its_own_id_only() {
    let node = TestNode::start().await;
    node.post("/api/v1/agents/register", json!({ "agentId": "one" }))
        .await
        .is(201);
    node.post("/api/v1/agents/register", json!({ "agentId": "two" }))
        .await
        .is(201);
    let token = node
        .post("/api/v1/agents/one/token", Value::Null)
        .await
        .is(201)
        .body;
    assert_eq!(token["role"], "agent");
    let token = token["token"].as_str().unwrap();
    let call = async |method: Method, path: &str, body: Value| node.call(method, path, token, body).await;
    call(
        Method::POST,
        "/api/v1/agents/register",
        json!({ "agentId": "one", "region": "here" }),
    )
    .await
    .is(200);
    call(
        Method::POST,
        "/api/v1/agents/register",
        json!({ "agentId": "two" }),
    )
    .await
    .is_problem(403, "forbidden");
    call(Method::GET, "/api/v1/agents/one", Value::Null).await.is(200);
    call(Method::GET, "/api/v1/agents/two", Value::Null)
        .await
        .is_problem(403, "forbidden");
    let list = call(Method::GET, "/api/v1/agents", Value::Null)
        .await
        .is(200)
        .body;
    assert_eq!(
        (list["total"].as_u64(), &list["agents"][0]["agentId"]),
        (Some(1), &json!("one"))
    );
    call(Method::POST, "/api/v1/agents/one/cordon", Value::Null)
        .await
        .is_problem(403, "forbidden");
    call(Method::POST, "/api/v1/sessions", json!({ "template": "demo" }))
        .await
        .is_problem(403, "forbidden");
    call(Method::GET, "/api/v1/users", Value::Null)
        .await
        .is_problem(403, "forbidden");
    // StreamSpace's agents send their key in a header of their own.
    let request = node
        .request(Method::GET, "/api/v1/agents/one", "")
        .header("x-agent-api-key", token);
    node.send(request).await.is(200);
}

/// Fault 12 of StreamSpace: registering or a heartbeat overwrote `draining`.
#[tokio::test]
async fn scheduling_is_an_operators_and_survives_registration() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let drained = node
        .post("/api/v1/agents/dev/drain", json!({ "deadline": "10m" }))
        .await
        .is(200);
    assert_eq!(drained.body["scheduling"], "draining");
    node.post("/api/v1/agents/register", json!({ "agentId": "dev" }))
        .await
        .is(200);
    let shown = node.get("/api/v1/agents/dev").await.is(200).body;
    assert_eq!(
        (&shown["scheduling"], &shown["status"]),
        (&json!("draining"), &json!("online"))
    );
    assert_eq!(
        node.post("/api/v1/agents/dev/drain", Value::Null)
            .await
            .is(200)
            .body["scheduling"],
        "draining"
    );
    assert_eq!(
        node.post("/api/v1/agents/dev/cordon", Value::Null)
            .await
            .is(200)
            .body["scheduling"],
        "cordoned"
    );
    let open = node
        .post("/api/v1/agents/dev/uncordon", Value::Null)
        .await
        .is(200);
    assert_eq!(open.body["scheduling"], "eligible");
    let late = node
        .post("/api/v1/agents/dev/drain", json!({ "deadline": "soon" }))
        .await;
    late.is_problem(400, "invalid_request");
    assert_eq!(late.fields(), ["deadline"]);
}

#[tokio::test]
async fn an_agent_with_live_sessions_is_deleted_by_force_only() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let session = node
        .post("/api/v1/sessions", json!({ "template": "demo" }))
        .await
        .is(202);
    node.delete("/api/v1/agents/dev")
        .await
        .is_problem(409, "wrong_state");
    let gone = node.delete("/api/v1/agents/dev?force=true").await;
    assert!(gone.status.is_success(), "{gone:?}");
    let path = format!("/api/v1/sessions/{}", session.body["name"].as_str().unwrap());
    assert_eq!(node.get(&path).await.body["state"], "lost");
}

#[tokio::test]
async fn commands_are_queued_cancelled_and_retried() {
    let node = TestNode::start().await;
    node.post("/api/v1/agents/register", json!({ "agentId": "away" }))
        .await
        .is(201);
    let path = "/api/v1/agents/away/commands";
    let queued = node
        .post(path, json!({ "action": "ping", "payload": { "n": 1 } }))
        .await
        .is(202)
        .body;
    assert_eq!(
        (&queued["status"], &queued["error"], &queued["run"]),
        (&json!("pending"), &Value::Null, &json!(1))
    );
    assert_eq!(queued["payload"]["n"], 1);
    let command = format!("/api/v1/commands/{}", queued["commandId"].as_str().unwrap());
    node.post(&format!("{command}/retry"), Value::Null)
        .await
        .is_problem(409, "wrong_state");
    let cancelled = node.post(&format!("{command}/cancel"), Value::Null).await.is(200);
    assert_eq!(cancelled.body["status"], "cancelled");
    let retried = node.post(&format!("{command}/retry"), Value::Null).await.is(202);
    assert_eq!(
        (&retried.body["status"], &retried.body["run"]),
        (&json!("pending"), &json!(2))
    );
    assert_eq!(
        node.get("/api/v1/commands?status=pending&agent=away").await.body["total"],
        1
    );
    let start = node
        .post(path, json!({ "action": "start_session", "sessionId": "a-b" }))
        .await;
    start.is_problem(400, "invalid_request");
    node.post(path, json!({ "action": "not a word" }))
        .await
        .is_problem(400, "invalid_request");
    node.post("/api/v1/agents/none/commands", json!({ "action": "ping" }))
        .await
        .is_problem(404, "agent_not_found");
}
