//! What holds for every route: problems, ids, headers, limits, and what is served beside `/api/v1`.

use reqwest::Method;
use serde_json::{Value, json};

use super::support::TestNode;

#[tokio::test]
async fn every_wrong_request_gets_a_problem_document() {
    let node = TestNode::start().await;
    node.get("/api/v1/nonsense")
        .await
        .is_problem(404, "route_not_found");
    node.get("/").await.is_problem(404, "route_not_found");
    let wrong_method = node.put("/api/v1/sessions", Value::Null).await;
    wrong_method.is_problem(405, "method_not_allowed");
    assert!(wrong_method.header("allow").contains("POST"));
    node.call(Method::GET, "/api/v1/sessions", "", Value::Null)
        .await
        .is_problem(401, "unauthenticated");
    node.call(Method::GET, "/api/v1/sessions", "wrong", Value::Null)
        .await
        .is_problem(401, "unauthenticated");
    node.get("/api/v1/sessions/Not_A_Name")
        .await
        .is_problem(400, "invalid_request");
    node.get("/api/v1/sessions/%FF")
        .await
        .is_problem(400, "invalid_request");
    node.get("/api/v1/sessions/none-such")
        .await
        .is_problem(404, "session_not_found");
    node.get("/api/v1/agents/none")
        .await
        .is_problem(404, "agent_not_found");
    node.get("/api/v1/commands/none")
        .await
        .is_problem(404, "command_not_found");
    node.get("/api/v1/leases/none")
        .await
        .is_problem(404, "lease_not_found");
    node.get("/api/v1/templates/none")
        .await
        .is_problem(404, "template_not_found");
    node.delete("/api/v1/users/none")
        .await
        .is_problem(404, "user_not_found");
    node.delete("/api/v1/tokens/none")
        .await
        .is_problem(404, "token_not_found");
    // Reserved: no route yet.
    node.get("/api/v1/sessions/none-such/logs")
        .await
        .is_problem(404, "route_not_found");
}

#[tokio::test]
async fn a_bad_body_is_refused_with_the_field() {
    let node = TestNode::start().await;
    let raw = async |body: &str, kind: &'static str| {
        let request = node
            .as_admin(Method::POST, "/api/v1/sessions")
            .header("content-type", kind);
        node.send(request.body(body.to_owned())).await
    };
    for body in ["", "{", "nonsense", "{\"template\":\"demo\"} x"] {
        raw(body, "application/json")
            .await
            .is_problem(400, "invalid_request");
    }
    let wrong_type = raw(
        r#"{"template":"demo","resources":{"cpu":true}}"#,
        "application/json",
    )
    .await;
    wrong_type.is_problem(400, "invalid_request");
    assert_eq!(wrong_type.fields(), ["resources.cpu"]);
    let unknown = raw(r#"{"template":"demo","colour":"red"}"#, "application/json").await;
    unknown.is_problem(400, "invalid_request");
    assert!(
        unknown.body["detail"].as_str().unwrap().contains("colour"),
        "{unknown:?}"
    );
    let zero = raw(
        r#"{"template":"demo","resources":{"memory":"0"}}"#,
        "application/json",
    )
    .await;
    zero.is_problem(400, "invalid_request");
    assert_eq!(zero.fields(), ["resources.memory"]);
    raw(r#"{"template":"demo"}"#, "text/plain")
        .await
        .is_problem(415, "unsupported_media_type");
    let large = format!(r#"{{"template":"{}"}}"#, "x".repeat(1 << 20));
    raw(&large, "application/json").await.is_problem(413, "too_large");
}

#[tokio::test]
async fn a_body_without_a_declared_length_is_bounded_too() {
    let node = TestNode::start().await;
    let chunks = (0..40).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 << 10]));
    let body = reqwest::Body::wrap_stream(futures::stream::iter(chunks));
    let request = node
        .as_admin(Method::POST, "/api/v1/sessions")
        .header("content-type", "application/json");
    node.send(request.body(body)).await.is_problem(413, "too_large");
}

#[tokio::test]
async fn unknown_names_and_values_of_a_query_are_refused() {
    let node = TestNode::start().await;
    for query in [
        "colour=red",
        "state=sleeping",
        "limit=0",
        "limit=1001",
        "limit=many",
        "cursor=nonsense",
        "consistency=fresh",
        "min_index=-1",
        "user=%20",
        "state=running&state=failed",
    ] {
        let reply = node.get(&format!("/api/v1/sessions?{query}")).await;
        reply.is_problem(400, "invalid_request");
        assert_eq!(reply.fields().len(), 1, "{query}: {reply:?}");
    }
    node.post("/api/v1/agents/x/cordon?now=1", Value::Null)
        .await
        .is_problem(400, "invalid_request");
    node.get("/api/v1/sessions?state=running&limit=10&consistency=stale")
        .await
        .is(200);
}

#[tokio::test]
async fn answers_carry_the_request_id_and_a_revision() {
    let node = TestNode::start().await;
    let given = node
        .send(
            node.as_admin(Method::GET, "/api/v1/sessions")
                .header("x-request-id", "abc-1"),
        )
        .await;
    assert_eq!(given.header("x-request-id"), "abc-1");
    let made = node
        .send(
            node.as_admin(Method::GET, "/api/v1/sessions")
                .header("x-request-id", "a b"),
        )
        .await;
    assert!(made.header("x-request-id").starts_with("req-"));
    let index: u64 = made.header("x-regent-index").parse().unwrap();
    assert!(index > 0);
    node.get(&format!("/api/v1/sessions?min_index={index}&consistency=stale"))
        .await
        .is(200);
    let problem = node.get("/api/v1/nonsense").await;
    assert!(problem.header("x-regent-index").parse::<u64>().unwrap() >= index);
}

#[tokio::test]
async fn a_revision_that_the_cluster_does_not_have_is_refused() {
    let node = TestNode::start().await;
    for consistency in ["linearizable", "stale"] {
        let reply = node
            .get(&format!(
                "/api/v1/sessions?min_index=9000000000&consistency={consistency}"
            ))
            .await;
        reply.is_problem(400, "invalid_request");
        assert_eq!(reply.fields(), ["min_index"]);
    }
}

#[tokio::test]
async fn what_probes_and_people_ask_is_answered() {
    let node = TestNode::start().await;
    let open = async |path: &str| node.call(Method::GET, path, "", Value::Null).await;
    open("/livez").await.is(200);
    assert_eq!(open("/readyz").await.is(200).body["status"], "ready");
    assert_eq!(open("/health").await.is(200).body["status"], "ok");
    assert!(open("/version").await.is(200).body["version"].is_string());
    let cluster = node.get("/api/v1/cluster").await.is(200).body;
    assert_eq!(cluster["leader"], 1);
    assert_eq!(cluster["members"][0]["role"], "leader");
    assert!(cluster["clusterId"].is_string());
    node.get("/api/v1/agents/no-such-agent").await;
    let metrics = open("/metrics").await.is(200);
    let text = metrics.body.as_str().unwrap();
    // Fault 18 of StreamSpace: no metrics. Labels are routes, never what was asked for.
    assert!(text.contains("route=\"/api/v1/agents/{id}\""), "{text}");
    assert!(!text.contains("no-such-agent"));
    assert!(text.contains("regent_sessions{state=\"running\"}"));
}

#[tokio::test]
async fn the_document_describes_what_is_served() {
    let node = TestNode::start().await;
    let document = node
        .call(Method::GET, "/openapi.json", "", Value::Null)
        .await
        .is(200)
        .body;
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let create = &document["paths"]["/api/v1/sessions"]["post"];
    let problem = &create["responses"]["503"]["content"]["application/problem+json"]["schema"]["$ref"];
    assert_eq!(problem, "#/components/schemas/Problem");
    assert!(
        create["responses"]["503"]["description"]
            .as_str()
            .unwrap()
            .contains("no_agents_available")
    );
    assert_eq!(
        document["components"]["securitySchemes"]["token"]["scheme"],
        "bearer"
    );
    // Every documented route without parameters and with GET answers something other than 404.
    for (path, item) in document["paths"].as_object().unwrap() {
        if item.get("get").is_some() && !path.contains('{') && path != "/api/v1/events" {
            let reply = node.get(path).await;
            assert_ne!(reply.status, 404, "{path}");
        }
    }
}

#[tokio::test]
async fn an_idempotency_key_makes_a_post_safe_to_repeat() {
    let node = TestNode::start().await;
    let create = async |key: &str, name: &str| {
        let body = json!({ "metadata": { "name": name }, "spec": { "command": ["true"] } });
        let request = node
            .as_admin(Method::POST, "/api/v1/templates")
            .header("idempotency-key", key);
        node.send(request.json(&body)).await
    };
    let first = create("k1", "one").await.is(201);
    let again = create("k1", "one").await.is(201);
    assert_eq!(first.body, again.body);
    create("k1", "two")
        .await
        .is_problem(422, "idempotency_key_reused");
    create("k2", "one").await.is_problem(409, "already_exists");
    create(&"k".repeat(129), "three")
        .await
        .is_problem(400, "invalid_request");
}

#[tokio::test]
async fn templates_are_made_changed_and_removed() {
    let node = TestNode::start().await;
    let manifest = |image: &str| {
        json!({ "apiVersion": "stream.space/v1alpha1", "kind": "Template", "metadata": { "name": "browser" },
            "spec": { "baseImage": image, "ports": [{ "containerPort": 3000 }] } })
    };
    node.put("/api/v1/templates/other", manifest("a"))
        .await
        .is_problem(400, "invalid_request");
    let made = node.put("/api/v1/templates/browser", manifest("a")).await.is(201);
    let etag = made.header("etag").to_owned();
    node.put("/api/v1/templates/browser", manifest("b")).await.is(200);
    let stale = node
        .as_admin(Method::PUT, "/api/v1/templates/browser")
        .header("if-match", etag);
    node.send(stale.json(&manifest("c")))
        .await
        .is_problem(412, "changed");
    let shown = node.get("/api/v1/templates/browser").await.is(200);
    assert_eq!(shown.body["manifest"]["spec"]["baseImage"], "b");
    let list = node.get("/api/v1/templates?limit=1").await.is(200).body;
    assert_eq!(list["templates"].as_array().unwrap().len(), 1);
    assert!(
        list["total"].as_u64().unwrap() > 1 && list["nextCursor"].is_string(),
        "built-in ones are there too"
    );
    node.delete("/api/v1/templates/browser").await.is(204);
    node.get("/api/v1/templates/browser")
        .await
        .is_problem(404, "template_not_found");
}
