//! Leases over REST.

use reqwest::Method;
use serde_json::{Value, json};

use super::support::{PATIENCE, TestNode};

#[tokio::test]
async fn a_lease_is_taken_renewed_verified_and_given_back() {
    let node = TestNode::start().await;
    let lease = "/api/v1/leases/db%2Fprimary";
    let acquire = async || {
        node.post(
            &format!("{lease}/acquire"),
            json!({ "holder": "a", "ttlMs": 60_000 }),
        )
        .await
    };
    let call = async |verb: &str, token: u64| {
        node.post(&format!("{lease}/{verb}"), json!({ "token": token }))
            .await
    };

    let grant = acquire().await.is(200).body;
    assert_eq!(
        (&grant["name"], &grant["waited"], &grant["ttlMs"]),
        (&json!("db/primary"), &json!(false), &json!(60_000))
    );
    let token = grant["token"].as_u64().unwrap();
    let held = acquire().await;
    held.is_problem(409, "lease_held");
    assert_eq!(
        (&held.body["holder"], held.body["token"].as_u64()),
        (&json!("a"), Some(token))
    );
    assert_eq!(
        call("renew", token).await.is(200).body,
        json!({ "token": token, "ttlMs": 60_000 })
    );
    call("verify", token).await.is(200);
    for verb in ["renew", "verify", "release"] {
        call(verb, token - 1).await.is_problem(409, "lease_lost");
    }
    let shown = node.get(lease).await.is(200).body;
    assert_eq!(
        (&shown["holder"], &shown["owner"]),
        (&json!("a"), &json!("user:admin"))
    );
    assert!(
        (1..=61_200).contains(&shown["remainingMs"].as_u64().unwrap()),
        "{shown}"
    );
    assert!(node.get(&format!("{lease}?consistency=stale")).await.body["remainingMs"].is_null());
    assert_eq!(node.get("/api/v1/leases").await.body["total"], 1);

    call("release", token).await.is(200);
    node.get(lease).await.is_problem(404, "lease_not_found");
    let next = acquire().await.is(200).body["token"].as_u64().unwrap();
    assert!(next > token, "a fencing token only grows");
    call("verify", token).await.is_problem(409, "lease_lost");
    let freed = node.delete(lease).await;
    assert!(freed.status.is_success(), "{freed:?}");
    call("renew", next).await.is_problem(409, "lease_lost");
}

#[tokio::test]
async fn a_lease_belongs_to_who_took_it() {
    let node = TestNode::start().await;
    let (alice, bob) = (node.user("alice", "user").await, node.user("bob", "user").await);
    let body = json!({ "holder": "a", "ttlMs": 60_000 });
    let grant = node
        .call(Method::POST, "/api/v1/leases/l/acquire", &alice, body.clone())
        .await
        .is(200)
        .body;
    let token = json!({ "token": grant["token"] });
    let as_bob = async |method: Method, path: &str, body: Value| node.call(method, path, &bob, body).await;
    as_bob(Method::POST, "/api/v1/leases/l/renew", token.clone())
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::POST, "/api/v1/leases/l/release", token.clone())
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::DELETE, "/api/v1/leases/l", Value::Null)
        .await
        .is_problem(403, "forbidden");
    as_bob(Method::GET, "/api/v1/leases/l", Value::Null)
        .await
        .is_problem(403, "forbidden");
    assert_eq!(
        as_bob(Method::GET, "/api/v1/leases", Value::Null)
            .await
            .is(200)
            .body["total"],
        0
    );
    // A target that guards something verifies what it is handed.
    as_bob(Method::POST, "/api/v1/leases/l/verify", token)
        .await
        .is(200);
    as_bob(Method::POST, "/api/v1/leases/l/acquire", body.clone())
        .await
        .is_problem(409, "lease_held");
    as_bob(Method::POST, "/api/v1/leases/agent%2Fdev/acquire", body)
        .await
        .is_problem(403, "forbidden");
}

#[tokio::test]
async fn a_replayed_acquire_gives_the_grant_while_it_stands() {
    let node = TestNode::start().await;
    let acquire = async || {
        let request = node
            .as_admin(Method::POST, "/api/v1/leases/l/acquire")
            .header("idempotency-key", "k");
        node.send(request.json(&json!({ "holder": "a", "ttlMs": 60_000 })))
            .await
    };
    let first = acquire().await.is(200).body;
    assert_eq!(acquire().await.is(200).body, first);
    node.post("/api/v1/leases/l/release", json!({ "token": first["token"] }))
        .await
        .is(200);
    acquire().await.is_problem(409, "lease_lost");
}

/// Its TTL counts from the repetition, so the repetition must have renewed it.
#[tokio::test]
async fn a_replayed_acquire_begins_the_time_anew() {
    let node = TestNode::start().await;
    let acquire = async || {
        let request = node
            .as_admin(Method::POST, "/api/v1/leases/l/acquire")
            .header("idempotency-key", "k");
        node.send(request.json(&json!({ "holder": "a", "ttlMs": 60_000 })))
            .await
            .is(200);
    };
    let left = async || {
        node.get("/api/v1/leases/l").await.body["remainingMs"]
            .as_u64()
            .unwrap()
    };
    acquire().await;
    let first = left().await;
    node.wait("/api/v1/leases/l", |lease| {
        lease["remainingMs"].as_u64().unwrap() < first - 100
    })
    .await;
    let before = left().await;
    let renewed = async {
        // Without a renewal what is left only shrinks, however often one looks.
        loop {
            acquire().await;
            if left().await > before {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, renewed)
        .await
        .expect("the repetition renews nothing");
}

#[tokio::test]
async fn a_lease_that_nobody_renews_is_free_again() {
    let node = TestNode::start().await;
    node.post("/api/v1/leases/l/acquire", json!({ "holder": "a", "ttlMs": 100 }))
        .await
        .is(200);
    node.wait("/api/v1/leases/l", |lease| lease["code"] == "lease_not_found")
        .await;
}

#[tokio::test]
async fn the_bounds_of_a_lease_are_kept() {
    let node = TestNode::start_with(|options| options.dev = false).await;
    let acquire = async |body: Value| node.post("/api/v1/leases/l/acquire", body).await;
    for (body, field) in [
        (json!({ "holder": "a", "ttlMs": 999 }), "ttlMs"),
        (json!({ "holder": "a", "ttlMs": 3_600_001 }), "ttlMs"),
        (json!({ "holder": "a", "ttlMs": -1 }), "ttlMs"),
        (json!({ "holder": "", "ttlMs": 5_000 }), "holder"),
        (json!({ "holder": "h".repeat(201), "ttlMs": 5_000 }), "holder"),
    ] {
        let reply = acquire(body.clone()).await;
        reply.is_problem(400, "invalid_request");
        assert_eq!(reply.fields(), [field], "{body}");
    }
    acquire(json!({ "holder": "ä".repeat(200), "ttlMs": 1_000 }))
        .await
        .is(200);
    node.post(
        "/api/v1/leases/a%20b/acquire",
        json!({ "holder": "a", "ttlMs": 5_000 }),
    )
    .await
    .is_problem(400, "invalid_request");
}
