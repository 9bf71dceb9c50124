//! Waiting for leases: the queue, who keeps a place and who loses it, and watching a lease.

use std::sync::Arc;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::events::Watch;
use super::support::{PATIENCE, Reply, TestNode};

const LEASE: &str = "/api/v1/leases/l";

async fn take(node: &TestNode, holder: &str) -> u64 {
    let body = json!({ "holder": holder, "ttlMs": 60_000 });
    let grant = node.post(&format!("{LEASE}/acquire"), body).await.is(200).body;
    assert_eq!(grant["waited"], false);
    grant["token"].as_u64().unwrap()
}

fn request(node: &TestNode, holder: &str, wait_ms: u64, key: &str) -> reqwest::RequestBuilder {
    let request = node
        .as_admin(Method::POST, &format!("{LEASE}/acquire"))
        .json(&json!({ "holder": holder, "ttlMs": 60_000, "waitMs": wait_ms }));
    if key.is_empty() {
        request
    } else {
        request.header("Idempotency-Key", key)
    }
}

fn wait(node: &Arc<TestNode>, holder: &str, wait_ms: u64, key: &str) -> JoinHandle<Reply> {
    let (node, request) = (node.clone(), request(node, holder, wait_ms, key));
    tokio::spawn(async move { node.send(request).await })
}

async fn release(node: &TestNode, token: u64) {
    node.post(&format!("{LEASE}/release"), json!({ "token": token }))
        .await
        .is(200);
}

/// Waits until those are the candidates, in that order.
async fn candidates(node: &TestNode, holders: &[&str]) {
    node.wait(LEASE, |lease| {
        let candidates = lease["candidates"].as_array().cloned().unwrap_or_default();
        candidates.iter().map(|c| &c["holder"]).eq(holders)
    })
    .await;
}

#[tokio::test]
async fn candidates_are_served_in_the_order_in_which_they_came() {
    let node = Arc::new(TestNode::start().await);
    let mut token = take(&node, "first").await;
    let mut waiting = Vec::new();
    let names = ["a", "b", "c"];
    for (n, name) in names.iter().enumerate() {
        waiting.push(wait(&node, name, 60_000, ""));
        candidates(&node, &names[..=n]).await;
    }
    for (n, waiter) in waiting.into_iter().enumerate() {
        release(&node, token).await;
        let grant = waiter.await.unwrap().is(200).body;
        assert_eq!(
            (&grant["holder"], &grant["waited"]),
            (&json!(names[n]), &json!(true))
        );
        assert!(grant["token"].as_u64().unwrap() > token);
        token = grant["token"].as_u64().unwrap();
        // What was waited for binds from the first renewal on.
        let renewed = node
            .post(&format!("{LEASE}/renew"), json!({ "token": token }))
            .await;
        assert_eq!(renewed.is(200).body, json!({ "token": token, "ttlMs": 60_000 }));
        candidates(&node, &names[n + 1..]).await;
    }
    release(&node, token).await;
    node.get(LEASE).await.is_problem(404, "lease_not_found");
}

#[tokio::test]
async fn a_wait_that_runs_out_says_who_holds_it_and_leaves_the_queue() {
    let node = Arc::new(TestNode::start().await);
    let token = take(&node, "first").await;
    let held = wait(&node, "a", 200, "").await.unwrap();
    held.is_problem(409, "lease_held");
    assert_eq!(
        (&held.body["holder"], held.body["token"].as_u64()),
        (&json!("first"), Some(token))
    );
    candidates(&node, &[]).await;
    // A lease that is free is given at once, however long one would wait.
    release(&node, token).await;
    let grant = wait(&node, "a", 60_000, "").await.unwrap().is(200).body;
    assert_eq!(grant["waited"], false);
}

#[tokio::test]
async fn a_repetition_under_the_same_key_keeps_its_place_and_finds_its_grant() {
    let node = Arc::new(TestNode::start().await);
    let token = take(&node, "first").await;
    let first = wait(&node, "a", 300, "key-a");
    candidates(&node, &["a"]).await;
    let second = wait(&node, "b", 60_000, "key-b");
    candidates(&node, &["a", "b"]).await;
    first.await.unwrap().is_problem(409, "lease_held");
    let again = wait(&node, "a", 60_000, "key-a");
    candidates(&node, &["a", "b"]).await;
    release(&node, token).await;
    let grant = again.await.unwrap().is(200).body;
    let once_more = wait(&node, "a", 60_000, "key-a").await.unwrap().is(200).body;
    assert_eq!(
        (&once_more["token"], &once_more["waited"]),
        (&grant["token"], &json!(true))
    );
    wait(&node, "other", 60_000, "key-a")
        .await
        .unwrap()
        .is_problem(422, "idempotency_key_reused");
    second.abort();
}

/// Who gives up must not be promoted in the moment in which its place is kept for a repetition.
#[tokio::test]
async fn who_asks_again_without_waiting_leaves_the_queue_at_once() {
    let node = Arc::new(TestNode::start().await);
    let token = take(&node, "first").await;
    let first = wait(&node, "a", 300, "key-a");
    candidates(&node, &["a"]).await;
    first.await.unwrap().is_problem(409, "lease_held");
    let left = node.send(request(&node, "a", 0, "key-a")).await;
    left.is_problem(409, "lease_held");
    assert_eq!(left.body["token"].as_u64(), Some(token));
    // Not a moment later: the place would be kept for a repetition for two seconds.
    let lease = node.get(LEASE).await.is(200).body;
    assert_eq!(lease["candidates"], json!([]));
    // One that was promoted meanwhile gets what it waited for.
    let second = wait(&node, "b", 300, "key-b");
    candidates(&node, &["b"]).await;
    second.await.unwrap().is_problem(409, "lease_held");
    release(&node, token).await;
    let grant = node.send(request(&node, "b", 0, "key-b")).await.is(200).body;
    assert_eq!((&grant["holder"], &grant["waited"]), (&json!("b"), &json!(true)));
}

#[tokio::test]
async fn a_candidate_that_hangs_up_leaves_the_queue_at_once() {
    let node = Arc::new(TestNode::start().await);
    let token = take(&node, "first").await;
    let gone = wait(&node, "gone", 60_000, "");
    candidates(&node, &["gone"]).await;
    let stays = wait(&node, "stays", 60_000, "");
    candidates(&node, &["gone", "stays"]).await;
    gone.abort();
    candidates(&node, &["stays"]).await;
    release(&node, token).await;
    assert_eq!(stays.await.unwrap().is(200).body["holder"], "stays");
}

/// Nobody acts under a promotion before its first renewal, so one whose candidate is gone must not cost the
/// next one the whole TTL, which is a minute here.
#[tokio::test]
async fn a_promotion_that_nobody_takes_up_goes_on_to_the_next() {
    let node = Arc::new(TestNode::start().await);
    let token = take(&node, "first").await;
    let silent = wait(&node, "silent", 60_000, "");
    candidates(&node, &["silent"]).await;
    let next = wait(&node, "next", 60_000, "");
    candidates(&node, &["silent", "next"]).await;
    release(&node, token).await;
    let lapsed = silent.await.unwrap().is(200).body["token"].as_u64().unwrap();
    let grant = next.await.unwrap().is(200).body;
    assert!(grant["token"].as_u64().unwrap() > lapsed);
    // The rule that keeps the two apart: the first renewal is what binds, and it comes too late.
    node.post(&format!("{LEASE}/renew"), json!({ "token": lapsed }))
        .await
        .is_problem(409, "lease_lost");
    let next = json!({ "token": grant["token"] });
    node.post(&format!("{LEASE}/renew"), next).await.is(200);
}

#[tokio::test]
async fn an_operator_takes_a_lease_and_the_event_says_who_and_why() {
    let node = Arc::new(TestNode::start().await);
    let olga = node.user("olga", "operator").await;
    let token = take(&node, "first").await;
    let mut events =
        Watch::open(node.as_admin(Method::GET, "/api/v1/events?kinds=lease.force_released")).await;
    let next = wait(&node, "next", 60_000, "");
    candidates(&node, &["next"]).await;
    let path = format!("{LEASE}?reason=it%20is%20stuck");
    node.call(Method::DELETE, &path, &olga, Value::Null).await.is(200);
    let (_, event) = events.next().await;
    assert_eq!(
        (&event["by"], &event["reason"], &event["subject"]),
        (&json!("user:olga"), &json!("it is stuck"), &json!("l"))
    );
    node.post(&format!("{LEASE}/renew"), json!({ "token": token }))
        .await
        .is_problem(409, "lease_lost");
    assert_eq!(next.await.unwrap().is(200).body["holder"], "next");
    let too_long = format!("{LEASE}?reason={}", "x".repeat(201));
    assert_eq!(node.delete(&too_long).await.is(400).fields(), ["reason"]);
}

#[tokio::test]
async fn a_watcher_sees_what_the_lease_is_and_everything_that_follows() {
    let node = Arc::new(TestNode::start().await);
    let path = format!("{LEASE}/watch");
    let mut watch = Watch::open(node.as_admin(Method::GET, &path)).await;
    let (_, first) = watch.next().await;
    assert_eq!(
        (&first["kind"], &first["record"]),
        (&json!("lease.state"), &Value::Null)
    );
    node.post(
        "/api/v1/leases/other/acquire",
        json!({ "holder": "o", "ttlMs": 60_000 }),
    )
    .await
    .is(200);
    let token = take(&node, "a").await;
    let waiter = wait(&node, "b", 60_000, "");
    candidates(&node, &["b"]).await;
    release(&node, token).await;
    waiter.await.unwrap().is(200);
    let mut seen = Vec::new();
    let mut last = String::new();
    for _ in 0..4 {
        let (id, event) = watch.next().await;
        assert_eq!(event["subject"], "l");
        seen.push((
            event["kind"].as_str().unwrap().to_owned(),
            event["record"]["holder"].clone(),
        ));
        last = id;
    }
    let seen: Vec<(&str, &Value)> = seen.iter().map(|(kind, holder)| (&**kind, holder)).collect();
    let (a, b) = (json!("a"), json!("b"));
    assert_eq!(
        seen,
        [
            ("lease.granted", &a),
            ("lease.queued", &b),
            ("lease.released", &Value::Null),
            ("lease.granted", &b)
        ]
    );
    // It goes on after what was seen, without the state; a new one begins with it.
    let resumed = node.as_admin(Method::GET, &path).header("Last-Event-ID", &last);
    let mut resumed = Watch::open(resumed).await;
    let mut fresh = Watch::open(node.as_admin(Method::GET, &path)).await;
    assert_eq!(fresh.next().await.1["record"]["holder"], "b");
    node.delete(LEASE).await.is(200);
    assert_eq!(resumed.next().await.1["kind"], "lease.force_released");
}

#[tokio::test]
async fn the_bounds_of_waiting_are_kept_and_named() {
    let node = Arc::new(TestNode::start().await);
    for wait_ms in [json!(3_600_001), json!(-1), json!("5s"), json!(1.5)] {
        let body = json!({ "holder": "h", "ttlMs": 1_000, "waitMs": wait_ms });
        let refused = node.post(&format!("{LEASE}/acquire"), body).await;
        refused.is_problem(400, "invalid_request");
        assert_eq!(refused.fields(), ["waitMs"], "{refused:?}");
    }
    let alice = node.user("alice", "user").await;
    node.call(
        Method::GET,
        "/api/v1/leases/agent%2Fdev/watch",
        &alice,
        Value::Null,
    )
    .await
    .is_problem(403, "forbidden");
    let take_agent = json!({ "holder": "h", "ttlMs": 1_000, "waitMs": 1_000 });
    node.post("/api/v1/leases/agent%2Fdev/acquire", take_agent)
        .await
        .is_problem(403, "forbidden");
}

/// A node that goes away answers those who wait, so that they go on at another one.
#[tokio::test]
async fn a_node_that_stops_lets_its_candidates_go() {
    let node = Arc::new(TestNode::start().await);
    take(&node, "first").await;
    let request = request(&node, "a", 60_000, "key");
    let waiting = tokio::spawn(request.send());
    candidates(&node, &["a"]).await;
    let node = Arc::into_inner(node).expect("nobody else has it");
    node.stop().await;
    let answer = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    let answer = answer.map_or(0, |response| response.status().as_u16());
    assert!([0, 409, 503].contains(&answer), "{answer}");
}
