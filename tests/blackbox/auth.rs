//! Who may do what, on every node alike: roles, tokens, logins, quotas.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::Dev;
use crate::wire::{Api, PASSWORD};

async fn login(api: &Api, username: &str, password: &str) -> crate::wire::Answer {
    let body = json!({ "username": username, "password": password });
    api.with_token("").post("auth/login", body).await
}

#[tokio::test]
async fn each_role_may_do_what_the_contract_says_and_no_more() {
    let dev = Dev::start();
    let admin = dev.api(0);
    let key = admin.agent(json!({ "agentId": "own" })).await;
    admin.agent(json!({ "agentId": "other" })).await;
    let user = admin.user("anna", "user").await;
    let operator = admin.user("olaf", "operator").await;
    let agent = admin.with_token(&key);
    let nobody = admin.with_token("");
    let made = user
        .post("sessions", json!({ "template": "sleep" }))
        .await
        .ok(202);
    let session = format!("sessions/{}", made["name"].as_str().unwrap());
    let ttl = json!({ "holder": "h", "ttlMs": 60_000 });
    user.post("leases/annas/acquire", ttl.clone()).await.ok(200);
    let manifest = json!({ "metadata": { "name": "mine" }, "spec": { "command": ["true"] } });
    let new_user = json!({ "username": "new", "password": PASSWORD });
    // Method, path, body; the status for nobody, agent, user, operator. An admin may do all of it.
    let table: Vec<(Method, &str, Value, [u16; 4])> = vec![
        (Method::GET, "templates", Value::Null, [401, 200, 200, 200]),
        (Method::POST, "templates", manifest, [401, 403, 403, 201]),
        (
            Method::DELETE,
            "templates/mine",
            Value::Null,
            [401, 403, 403, 204],
        ),
        (Method::GET, &session, Value::Null, [401, 403, 200, 200]),
        (Method::GET, "agents", Value::Null, [401, 200, 403, 200]),
        (Method::GET, "agents/own", Value::Null, [401, 200, 403, 200]),
        (Method::GET, "agents/other", Value::Null, [401, 403, 403, 200]),
        (
            Method::POST,
            "agents/other/cordon",
            json!({}),
            [401, 403, 403, 200],
        ),
        (
            Method::POST,
            "agents/other/uncordon",
            json!({}),
            [401, 403, 403, 200],
        ),
        (
            Method::POST,
            "agents/register",
            json!({ "agentId": "own" }),
            [401, 200, 403, 200],
        ),
        (
            Method::POST,
            "agents/other/commands",
            json!({ "action": "a" }),
            [401, 403, 403, 202],
        ),
        (Method::DELETE, "leases/annas", Value::Null, [401, 403, 403, 200]),
        (Method::POST, "users", new_user, [401, 403, 403, 403]),
        (Method::PUT, "users/anna/quota", json!({}), [401, 403, 403, 403]),
        (Method::DELETE, "users/anna", Value::Null, [401, 403, 403, 403]),
        (
            Method::GET,
            "tokens?user=admin",
            Value::Null,
            [401, 403, 403, 403],
        ),
        (
            Method::POST,
            "tokens",
            json!({ "user": "admin" }),
            [401, 403, 403, 403],
        ),
        (Method::GET, "cluster", Value::Null, [401, 200, 200, 200]),
        (Method::POST, "cluster/transfer", json!({}), [401, 403, 403, 200]),
    ];
    for (method, path, body, expected) in &table {
        for (who, (api, status)) in ["nobody", "agent", "user", "operator"]
            .iter()
            .zip([&nobody, &agent, &user, &operator].into_iter().zip(expected))
        {
            let answer = api.send(api.request(method.clone(), path).json(body)).await;
            assert_eq!(answer.status, *status, "{who}: {method} {path}: {}", answer.text);
            if *status >= 400 {
                answer.is_a_problem();
            }
        }
    }
    for list in [
        "sessions",
        "agents",
        "commands",
        "leases",
        "templates",
        "users",
        "tokens",
        "cluster",
    ] {
        admin.get(list).await.ok(200);
    }
    // An operator sees all sessions, another user none.
    assert_eq!(operator.get("sessions").await.ok(200)["total"], 1);
    let names: Vec<Value> = user.get("users").await.ok(200)["users"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(
        (names.len(), &names[0]["username"]),
        (1, &json!("anna")),
        "a user sees themself only"
    );
}

#[tokio::test]
async fn a_revoked_token_is_worth_nothing_on_any_node_at_once() {
    let dev = Dev::start();
    let admin = dev.api(0);
    admin.user("anna", "user").await;
    for round in 0..6 {
        let token = dev
            .api(round % 3)
            .post("tokens", json!({ "user": "anna" }))
            .await
            .ok(201);
        let secret = token["token"].as_str().unwrap();
        for node in 0..3 {
            dev.api(node).with_token(secret).get("sessions").await.ok(200);
        }
        let id = token["id"].as_str().unwrap();
        assert_eq!(
            dev.api((round + 1) % 3)
                .delete(&format!("tokens/{id}"))
                .await
                .status,
            204
        );
        for node in 0..3 {
            dev.api(node)
                .with_token(secret)
                .get("sessions")
                .await
                .problem(401, "unauthenticated");
            let create = json!({ "template": "sleep" });
            dev.api(node)
                .with_token(secret)
                .post("sessions", create)
                .await
                .problem(401, "unauthenticated");
        }
    }
    let list = admin.get("tokens").await.ok(200);
    assert!(
        list["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .all(|token| token.get("token").is_none()),
        "secrets are shown once"
    );
}

#[tokio::test]
async fn a_login_works_on_every_node_until_logout_or_a_new_password() {
    let dev = Dev::start();
    let admin = dev.api(0);
    login(&admin, "admin", &dev.file.admin_password).await.ok(200);
    let kept = admin.user("anna", "user").await;
    let first = login(&dev.api(0), "anna", PASSWORD).await.ok(200);
    assert_eq!(first["user"]["username"], "anna");
    assert!(first["expiresAt"].as_str().unwrap().ends_with('Z'));
    let second = login(&dev.api(1), "anna", PASSWORD).await.ok(200);
    let token = |login: &Value| login["token"].as_str().unwrap().to_owned();
    let (first, second) = (token(&first), token(&second));
    assert_ne!(first, second);
    for node in 0..3 {
        dev.api(node).with_token(&first).get("sessions").await.ok(200);
    }
    assert_eq!(
        dev.api(1)
            .with_token(&first)
            .post("auth/logout", json!({}))
            .await
            .status,
        204
    );
    dev.api(2)
        .with_token(&first)
        .get("sessions")
        .await
        .problem(401, "unauthenticated");

    // One's own password needs the old one.
    let anna = dev.api(2).with_token(&second);
    let refused = anna
        .put("users/anna/password", json!({ "password": "another password" }))
        .await;
    assert_eq!(refused.fields(), ["currentPassword"]);
    let change = json!({ "password": "another password", "currentPassword": PASSWORD });
    assert_eq!(anna.put("users/anna/password", change).await.status, 204);
    for node in 0..3 {
        dev.api(node)
            .with_token(&second)
            .get("sessions")
            .await
            .problem(401, "unauthenticated");
    }
    kept.get("sessions").await.ok(200); // an API token is no login
    login(&dev.api(0), "anna", PASSWORD)
        .await
        .problem(401, "unauthenticated");
    login(&dev.api(1), "anna", "another password").await.ok(200);
}

#[tokio::test]
async fn guessing_a_password_is_limited_and_an_unknown_user_looks_like_a_wrong_password() {
    let dev = Dev::start();
    let api = dev.api(0);
    api.user("anna", "user").await;
    let wrong = login(&api, "anna", "wrong password")
        .await
        .problem(401, "unauthenticated");
    let unknown = login(&api, "nobody", "wrong password")
        .await
        .problem(401, "unauthenticated");
    assert_eq!(wrong["detail"], unknown["detail"]);
    let mut limited = None;
    for _ in 0..30 {
        let answer = login(&api, "anna", "wrong password").await;
        if answer.status == 429 {
            limited = Some(answer);
            break;
        }
        answer.problem(401, "unauthenticated");
    }
    let limited = limited.expect("thirty guesses within a minute");
    assert!(limited.header("retry-after").parse::<u32>().unwrap() > 0);
    limited.problem(429, "busy");
    login(&api, "anna", PASSWORD).await.problem(429, "busy");
    login(&api, "admin", &dev.file.admin_password).await.ok(200); // others are not kept out
}

#[tokio::test]
async fn a_quota_refuses_what_is_above_it_and_room_comes_back() {
    let dev = Dev::start();
    let api = dev.api(0);
    let anna = api.user("anna", "user").await;
    let quota = json!({ "sessions": 5, "cpu": "500m", "memory": "1Gi" });
    assert_eq!(
        api.put("users/anna/quota", quota.clone()).await.ok(200)["quota"],
        quota
    );
    let size = |cpu: &str, memory: &str| json!({ "template": "sleep", "resources": { "cpu": cpu, "memory": memory } });
    let first = anna.post("sessions", size("400m", "64Mi")).await.ok(202);
    let refused = anna
        .post("sessions", size("200m", "64Mi"))
        .await
        .problem(403, "quota_exceeded");
    assert!(refused["detail"].as_str().unwrap().contains("cpu"), "{refused}");
    let refused = anna
        .post("sessions", size("10m", "1Gi"))
        .await
        .problem(403, "quota_exceeded");
    assert!(
        refused["detail"].as_str().unwrap().contains("memory"),
        "{refused}"
    );
    // An admin who makes one for them meets the same quota.
    let mut for_anna = size("200m", "64Mi");
    for_anna["user"] = json!("anna");
    api.post("sessions", for_anna)
        .await
        .problem(403, "quota_exceeded");
    let used = api.get("users").await.ok(200);
    let users = used["users"].as_array().unwrap();
    let used = &users.iter().find(|user| user["username"] == "anna").unwrap()["used"];
    assert_eq!(*used, json!({ "sessions": 1, "cpu": "400m", "memory": "64Mi" }));
    let name = first["name"].as_str().unwrap();
    anna.delete(&format!("sessions/{name}")).await.ok(202);
    crate::harness::eventually("room again", || async {
        (anna.post("sessions", size("500m", "64Mi")).await.status == 202).then_some(())
    })
    .await;
    // A user with live sessions is not removed under them.
    api.delete("users/anna").await.problem(409, "wrong_state");
}
