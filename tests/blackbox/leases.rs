//! Leases over REST: one holder, fencing tokens that grow, and an end that the holder can count on, also
//! when the leader dies. (StreamSpace's fault 4: elections with three leaders or none, and no fencing.)

use futures::future::join_all;
use serde_json::{Value, json};

use crate::harness::{Dev, eventually};
use crate::wire::Api;

fn of(token: &Value) -> Value {
    json!({ "token": token })
}

async fn acquire(api: &Api, name: &str, holder: &str, ttl_ms: u64) -> crate::wire::Answer {
    api.post(
        &format!("leases/{name}/acquire"),
        json!({ "holder": holder, "ttlMs": ttl_ms }),
    )
    .await
}

#[tokio::test]
async fn a_lease_has_one_holder_on_all_nodes_until_it_is_released() {
    let dev = Dev::start();
    let (a, b) = (dev.api(0), dev.api(1));
    let grant = acquire(&a, "jobs%2Fnightly", "a", 60_000).await.ok(200);
    assert_eq!(
        (&grant["name"], &grant["holder"], &grant["waited"]),
        (&json!("jobs/nightly"), &json!("a"), &json!(false))
    );
    let held = acquire(&b, "jobs%2Fnightly", "b", 60_000)
        .await
        .problem(409, "lease_held");
    assert_eq!((&held["holder"], &held["token"]), (&json!("a"), &grant["token"]));
    acquire(&a, "jobs%2Fnightly", "a", 60_000)
        .await
        .problem(409, "lease_held");
    for node in 0..3 {
        let lease = dev.api(node).get("leases/jobs%2Fnightly").await.ok(200);
        assert_eq!(
            (&lease["holder"], &lease["token"], &lease["ttlMs"]),
            (&json!("a"), &grant["token"], &json!(60_000))
        );
        let left = lease["remainingMs"].as_u64().unwrap();
        assert!(left > 0 && left <= 60_000, "{lease}");
        assert_eq!(lease["candidates"], json!([]));
        let renewed = dev
            .api(node)
            .post("leases/jobs%2Fnightly/renew", of(&grant["token"]))
            .await
            .ok(200);
        assert_eq!(renewed, json!({ "token": grant["token"], "ttlMs": 60_000 }));
        dev.api(node)
            .post("leases/jobs%2Fnightly/verify", of(&grant["token"]))
            .await
            .ok(200);
    }
    let stale = json!(grant["token"].as_u64().unwrap() - 1);
    for what in ["renew", "verify", "release"] {
        b.post(&format!("leases/jobs%2Fnightly/{what}"), of(&stale))
            .await
            .problem(409, "lease_lost");
    }
    b.post("leases/jobs%2Fnightly/release", of(&grant["token"]))
        .await
        .ok(200);
    for node in 0..3 {
        dev.api(node)
            .get("leases/jobs%2Fnightly")
            .await
            .problem(404, "lease_not_found");
        dev.api(node)
            .post("leases/jobs%2Fnightly/verify", of(&grant["token"]))
            .await
            .problem(409, "lease_lost");
    }
    let next = acquire(&b, "jobs%2Fnightly", "b", 60_000).await.ok(200);
    assert!(next["token"].as_u64() > grant["token"].as_u64(), "tokens grow");
}

#[tokio::test]
async fn of_many_that_want_a_lease_at_the_same_time_one_gets_it() {
    let dev = Dev::start();
    let mut last = 0;
    for _ in 0..5 {
        let asked = (0..9).map(|n| {
            let api = dev.api(n % 3);
            async move { acquire(&api, "one", &format!("h{n}"), 60_000).await }
        });
        let answers = join_all(asked).await;
        let granted: Vec<_> = answers.iter().filter(|answer| answer.status == 200).collect();
        assert_eq!(granted.len(), 1, "{answers:?}");
        let token = granted[0].body["token"].as_u64().unwrap();
        assert!(token > last);
        last = token;
        for answer in answers.into_iter().filter(|answer| answer.status != 200) {
            answer.problem(409, "lease_held");
        }
        dev.api(0)
            .post("leases/one/release", json!({ "token": token }))
            .await
            .ok(200);
    }
}

#[tokio::test]
async fn a_lease_is_its_owners_and_an_operator_may_take_it_away() {
    let dev = Dev::start();
    let admin = dev.api(0);
    let (anna, bert) = (admin.user("anna", "user").await, admin.user("bert", "user").await);
    let operator = admin.user("olaf", "operator").await;
    let grant = acquire(&anna, "l", "anna's job", 60_000).await.ok(200);
    for what in ["renew", "release"] {
        bert.post(&format!("leases/l/{what}"), of(&grant["token"]))
            .await
            .problem(403, "forbidden");
    }
    bert.get("leases/l").await.problem(403, "forbidden");
    assert_eq!(bert.get("leases").await.ok(200)["total"], 0);
    bert.post("leases/l/verify", of(&grant["token"])).await.ok(200); // for targets that were given the token
    bert.delete("leases/l").await.problem(403, "forbidden");
    let lease = operator.get("leases/l").await.ok(200);
    assert!(lease["owner"].as_str().unwrap().contains("anna"), "{lease}");
    assert!([200, 204].contains(&operator.delete("leases/l").await.status));
    anna.post("leases/l/renew", of(&grant["token"]))
        .await
        .problem(409, "lease_lost");
    acquire(&bert, "l", "b", 60_000).await.ok(200);
    // The lease of an agent is nobody's to take over REST.
    let refused = acquire(&anna, "agent%2Fdev", "me", 60_000).await;
    assert!([403, 409].contains(&refused.status), "{}", refused.text);
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_and_one_that_is_renewed_does_not() {
    let dev = Dev::start();
    let (a, b) = (dev.api(0), dev.api(1));
    let short = acquire(&a, "short", "a", 1_000).await.ok(200);
    let kept = acquire(&a, "kept", "a", 1_000).await.ok(200);
    eventually("the end of the lease that nobody renews", || async {
        b.post("leases/kept/renew", of(&kept["token"])).await.ok(200);
        (b.get("leases/short").await.status == 404).then_some(())
    })
    .await;
    a.post("leases/short/renew", of(&short["token"]))
        .await
        .problem(409, "lease_lost");
    let next = acquire(&b, "short", "b", 60_000).await.ok(200);
    assert!(next["token"].as_u64() > short["token"].as_u64());
}

#[tokio::test]
async fn a_lease_survives_its_leader_and_its_token_stays() {
    let mut dev = Dev::start();
    let leader = dev.leader().await;
    let other = dev.api((leader + 1) % 3);
    let grant = acquire(&other, "l", "a", 30_000).await.ok(200);
    dev.kill_node(leader);
    eventually("a renewal by the next leader", || async {
        let renewed = other.post("leases/l/renew", of(&grant["token"])).await;
        assert_ne!(
            renewed.status, 409,
            "it was lost with the leader: {}",
            renewed.text
        );
        (renewed.status == 200).then_some(())
    })
    .await;
    acquire(&dev.api((leader + 2) % 3), "l", "b", 30_000)
        .await
        .problem(409, "lease_held");
    let lease = other.get("leases/l").await.ok(200);
    assert_eq!(
        (&lease["holder"], &lease["token"]),
        (&json!("a"), &grant["token"])
    );
}

#[tokio::test]
async fn the_bounds_of_a_lease_are_kept() {
    let dev = Dev::start();
    let api = dev.api(0);
    for ttl in [
        json!(0),
        json!(99),
        json!(3_600_001),
        json!(u64::MAX),
        json!(-1),
        json!(1.5),
        json!("5s"),
        Value::Null,
    ] {
        let answer = api
            .post("leases/l/acquire", json!({ "holder": "h", "ttlMs": ttl }))
            .await;
        assert_eq!(answer.fields(), ["ttlMs"], "{ttl}: {}", answer.text);
        answer.problem(400, "invalid_request");
    }
    for ttl in [100, 3_600_000] {
        let grant = acquire(&api, &format!("l{ttl}"), "h", ttl).await.ok(200);
        assert_eq!(grant["ttlMs"], ttl);
    }
    for holder in [json!(""), json!("a\nb"), json!("x".repeat(201)), json!(5)] {
        let answer = api
            .post("leases/l/acquire", json!({ "holder": holder, "ttlMs": 1000 }))
            .await;
        assert_eq!(answer.fields(), ["holder"], "{}", answer.text);
    }
    for name in ["a%20b", "%00", &"x".repeat(201)] {
        acquire(&api, name, "h", 1000)
            .await
            .problem(400, "invalid_request");
    }
}
