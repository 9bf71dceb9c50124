//! Users, tokens and logins over REST.

use reqwest::Method;
use serde_json::{Value, json};

use super::support::{ADMIN_PASSWORD, TestNode};

async fn with_password() -> TestNode {
    TestNode::start_with(|options| options.admin_password = Some(ADMIN_PASSWORD.to_owned())).await
}

async fn login(node: &TestNode, user: &str, password: &str) -> super::support::Reply {
    let body = json!({ "username": user, "password": password });
    node.call(Method::POST, "/api/v1/auth/login", "", body).await
}

#[tokio::test]
async fn a_login_gives_a_token_and_a_logout_revokes_it() {
    let node = with_password().await;
    let good = login(&node, "admin", ADMIN_PASSWORD).await.is(200).body;
    assert_eq!(
        (&good["user"]["username"], &good["user"]["role"]),
        (&json!("admin"), &json!("admin"))
    );
    assert!(good["expiresAt"].as_str().unwrap().ends_with('Z'));
    let token = good["token"].as_str().unwrap();
    assert!(token.starts_with("regent_") && token.len() == 50, "{token}");
    node.call(Method::GET, "/api/v1/users", token, Value::Null)
        .await
        .is(200);
    node.call(Method::POST, "/api/v1/auth/logout", token, Value::Null)
        .await
        .is(204);
    node.call(Method::GET, "/api/v1/users", token, Value::Null)
        .await
        .is_problem(401, "unauthenticated");
    let stale = "/api/v1/users?consistency=stale";
    node.call(Method::GET, stale, token, Value::Null)
        .await
        .is_problem(401, "unauthenticated");

    let wrong = login(&node, "admin", "another one").await;
    let unknown = login(&node, "nobody", "another one").await;
    wrong.is_problem(401, "unauthenticated");
    unknown.is_problem(401, "unauthenticated");
    assert_eq!(
        wrong.body["detail"], unknown.body["detail"],
        "an answer tells nobody which users exist"
    );
    login(&node, "not a name!", "x")
        .await
        .is_problem(401, "unauthenticated");
}

#[tokio::test]
async fn guessing_a_password_is_limited() {
    let node = with_password().await;
    let mut limited = None;
    for _ in 0..20 {
        let reply = login(&node, "guessed", "a wrong one").await;
        if reply.status == 429 {
            limited = Some(reply);
            break;
        }
        reply.is_problem(401, "unauthenticated");
    }
    let limited = limited.expect("guessing was never limited");
    limited.is_problem(429, "busy");
    assert!(limited.header("retry-after").parse::<u64>().unwrap() >= 1);
    login(&node, "admin", ADMIN_PASSWORD).await.is(200);
}

#[tokio::test]
async fn users_are_made_by_admins_and_see_themselves() {
    let node = TestNode::start().await;
    let alice = node.user("alice", "user").await;
    let as_alice =
        async |method: Method, path: &str, body: Value| node.call(method, path, &alice, body).await;
    let list = as_alice(Method::GET, "/api/v1/users", Value::Null)
        .await
        .is(200)
        .body;
    assert_eq!(
        (list["total"].as_u64(), &list["users"][0]["username"]),
        (Some(1), &json!("alice"))
    );
    let bob = json!({ "username": "bob", "password": "a good password" });
    as_alice(Method::POST, "/api/v1/users", bob.clone())
        .await
        .is_problem(403, "forbidden");
    node.post("/api/v1/users", bob.clone()).await.is(201);
    node.post("/api/v1/users", bob)
        .await
        .is_problem(409, "already_exists");
    as_alice(Method::DELETE, "/api/v1/users/bob", Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_alice(Method::PUT, "/api/v1/users/alice/quota", json!({}))
        .await
        .is_problem(403, "forbidden");
    for (body, field) in [
        (json!({ "username": "c", "password": "short" }), "password"),
        (
            json!({ "username": "c d", "password": "a good password" }),
            "username",
        ),
        (
            json!({ "username": "c", "password": "a good password", "role": "agent" }),
            "role",
        ),
        (
            json!({ "username": "c", "password": "a good password", "role": "king" }),
            "role",
        ),
    ] {
        let reply = node.post("/api/v1/users", body.clone()).await;
        reply.is_problem(400, "invalid_request");
        assert_eq!(reply.fields(), [field], "{body}");
    }
    node.delete("/api/v1/users/alice").await.is(204);
    as_alice(Method::GET, "/api/v1/users", Value::Null)
        .await
        .is_problem(401, "unauthenticated");
}

#[tokio::test]
async fn ones_own_password_needs_the_old_one() {
    let node = TestNode::start().await;
    let alice = node.user("alice", "user").await;
    let session = login(&node, "alice", "a good password").await.is(200).body["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let change = async |body: Value| {
        node.call(Method::PUT, "/api/v1/users/alice/password", &alice, body)
            .await
    };
    let bare = change(json!({ "password": "a new password" })).await;
    bare.is_problem(400, "invalid_request");
    assert_eq!(bare.fields(), ["currentPassword"]);
    let wrong = json!({ "password": "a new password", "currentPassword": "not this one" });
    change(wrong).await.is_problem(403, "forbidden");
    change(json!({ "password": "a new password", "currentPassword": "a good password" }))
        .await
        .is(204);
    login(&node, "alice", "a good password")
        .await
        .is_problem(401, "unauthenticated");
    login(&node, "alice", "a new password").await.is(200);
    let old = node
        .call(Method::GET, "/api/v1/sessions", &session, Value::Null)
        .await;
    old.is_problem(401, "unauthenticated");
    node.put(
        "/api/v1/users/alice/password",
        json!({ "password": "an admin's one" }),
    )
    .await
    .is(204);
    login(&node, "alice", "an admin's one").await.is(200);
}

#[tokio::test]
async fn tokens_show_their_secret_once() {
    let node = TestNode::start().await;
    let alice = node.user("alice", "user").await;
    let as_alice =
        async |method: Method, path: &str, body: Value| node.call(method, path, &alice, body).await;
    let create = async || {
        let request = node
            .request(Method::POST, "/api/v1/tokens", &alice)
            .header("idempotency-key", "k");
        node.send(request.json(&json!({ "description": "ci", "expiresIn": "1h" })))
            .await
            .is(201)
            .body
    };
    let first = create().await;
    let again = create().await;
    assert_eq!(first["id"], again["id"]);
    assert!(
        first["token"].is_string() && again.get("token").is_none(),
        "a replay shows no secret"
    );
    assert!(first["expiresAt"].is_string());
    let list = as_alice(Method::GET, "/api/v1/tokens", Value::Null)
        .await
        .is(200)
        .body;
    assert_eq!(list["total"], 2);
    assert!(
        list["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .all(|token| token.get("token").is_none())
    );
    as_alice(Method::GET, "/api/v1/tokens?user=admin", Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_alice(Method::POST, "/api/v1/tokens", json!({ "user": "admin" }))
        .await
        .is_problem(403, "forbidden");
    let secret = first["token"].as_str().unwrap();
    node.call(Method::GET, "/api/v1/sessions", secret, Value::Null)
        .await
        .is(200);
    as_alice(
        Method::DELETE,
        &format!("/api/v1/tokens/{}", first["id"].as_str().unwrap()),
        Value::Null,
    )
    .await
    .is(204);
    node.call(Method::GET, "/api/v1/sessions", secret, Value::Null)
        .await
        .is_problem(401, "unauthenticated");
}
