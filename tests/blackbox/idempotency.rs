//! `Idempotency-Key`: the same request twice, at any two nodes, is done once and answered alike.

use futures::future::join_all;
use serde_json::json;

use crate::harness::Dev;

#[tokio::test]
async fn the_same_key_gives_the_same_answer_on_every_node_and_makes_one_session() {
    let dev = Dev::start();
    let body = json!({ "template": "sleep", "tags": ["once"] });
    let first = dev
        .api(0)
        .post_once("sessions", "key-1", body.clone())
        .await
        .ok(202);
    for node in [1, 2, 0] {
        let again = dev.api(node).post_once("sessions", "key-1", body.clone()).await;
        assert_eq!(again.ok(202)["name"], first["name"]);
    }
    // At the same time too.
    let answers = join_all((0..6).map(|n| {
        let (api, body) = (dev.api(n % 3), body.clone());
        async move { api.post_once("sessions", "key-2", body).await.ok(202)["name"].clone() }
    }))
    .await;
    assert!(
        answers
            .iter()
            .all(|name| *name == answers[0] && *name != first["name"]),
        "{answers:?}"
    );
    assert_eq!(dev.api(2).get("sessions?tag=once").await.ok(200)["total"], 2);
}

#[tokio::test]
async fn a_key_used_for_another_body_is_refused_and_for_another_caller_or_route_is_another_key() {
    let dev = Dev::start();
    let admin = dev.api(0);
    let body = json!({ "template": "sleep" });
    let first = admin.post_once("sessions", "key", body.clone()).await.ok(202);
    let other = json!({ "template": "sleep", "tags": ["other"] });
    dev.api(1)
        .post_once("sessions", "key", other)
        .await
        .problem(422, "idempotency_key_reused");
    let anna = admin.user("anna", "user").await;
    let theirs = anna.post_once("sessions", "key", body).await.ok(202);
    assert_ne!(theirs["name"], first["name"]);
    let lease = admin
        .post_once(
            "leases/l/acquire",
            "key",
            json!({ "holder": "h", "ttlMs": 60_000 }),
        )
        .await
        .ok(200);
    assert_eq!(lease["name"], "l");
    // A refusal is an answer like any other: it is not remembered as done.
    let missing = json!({ "template": "later" });
    admin
        .post_once("sessions", "later", missing.clone())
        .await
        .problem(404, "template_not_found");
    let manifest =
        json!({ "metadata": { "name": "later" }, "spec": { "command": ["sleep"], "args": ["100"] } });
    admin.post("templates", manifest).await.ok(201);
    let again = dev.api(2).post_once("sessions", "later", missing).await;
    assert!([202, 404].contains(&again.status), "{}", again.text);
}

#[tokio::test]
async fn every_post_takes_a_key() {
    let dev = Dev::start();
    let (here, there) = (dev.api(0), dev.api(1));
    here.agent(json!({ "agentId": "away" })).await;
    let user = json!({ "username": "anna", "password": crate::wire::PASSWORD });
    let manifest = json!({ "metadata": { "name": "mine" }, "spec": { "command": ["true"] } });
    for (path, body, id) in [
        ("users", user, "username"),
        ("templates", manifest, "name"),
        ("tokens", json!({ "description": "t" }), "id"),
        ("agents/away/token", json!({}), "id"),
        ("agents/away/commands", json!({ "action": "a" }), "commandId"),
        (
            "leases/mine/acquire",
            json!({ "holder": "h", "ttlMs": 60_000 }),
            "token",
        ),
    ] {
        let first = here.post_once(path, "k", body.clone()).await;
        assert!(first.status < 300, "{path}: {}", first.text);
        let again = there.post_once(path, "k", body).await;
        assert_eq!(
            (again.status, &again.body[id]),
            (first.status, &first.body[id]),
            "{path}: {}",
            again.text
        );
        if path == "tokens" {
            assert!(
                first.body["token"].is_string() && again.body.get("token").is_none(),
                "a secret is shown once"
            );
        }
    }
    assert_eq!(here.get("commands?agent=away").await.ok(200)["total"], 1);
    let token = here.get("leases/mine").await.ok(200)["token"].clone();
    for api in [&here, &there] {
        let release = json!({ "token": token });
        let answer = api.post_once("leases/mine/release", "r", release).await;
        assert_eq!(answer.status, 200, "a repeated release is done: {}", answer.text);
    }
}
