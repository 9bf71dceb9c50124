//! The leadership is handed over while writes go on through every node: none of them fails, and each that
//! was acknowledged is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Dev, eventually};

/// Writers at each node.
const WRITERS: usize = 3;

#[tokio::test]
async fn a_transfer_fails_no_write() {
    let dev = Dev::start();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let mut writers = Vec::new();
    for n in 0..3 * WRITERS {
        let api = dev.api(n % 3);
        let session = api
            .post(
                "sessions",
                json!({ "template": "sleep", "whenFull": "queue", "placement": { "region": "nowhere" } }),
            )
            .await
            .ok(202);
        let path = format!("sessions/{}", session["name"].as_str().unwrap());
        let (stop, written) = (stop.clone(), written.clone());
        writers.push(tokio::spawn(async move {
            let (mut count, mut longest) = (0_u64, Duration::ZERO);
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                let at = Instant::now();
                api.patch(&path, json!({ "tags": [count.to_string()] }))
                    .await
                    .ok(200);
                longest = longest.max(at.elapsed());
                written.fetch_add(1, Ordering::Relaxed);
            }
            let session = api.get(&path).await.ok(200);
            assert_eq!(
                session["tags"],
                json!([count.to_string()]),
                "the last one is there"
            );
            longest
        }));
    }
    let goes_on = async || {
        let before = written.load(Ordering::Relaxed);
        let enough = before + 3 * WRITERS as u64;
        eventually("more writes", || async {
            (written.load(Ordering::Relaxed) > enough).then_some(())
        })
        .await;
    };
    goes_on().await;
    // To each of the others in turn, asked at each node; then to whoever can.
    for n in 0..6 {
        let leader = dev.leader().await;
        let to = dev.file.nodes[(leader + 1) % 3].id;
        let body = if n < 4 { json!({ "to": to }) } else { json!({}) };
        let at = Instant::now();
        let cluster = dev.api(n % 3).post("cluster/transfer", body).await.ok(200);
        let took = at.elapsed();
        let now = cluster["leader"].as_u64().unwrap();
        assert_ne!(now, dev.file.nodes[leader].id.0, "{cluster}");
        assert!(n >= 4 || now == to.0, "{cluster}");
        eprintln!("handed over in {took:?}");
        goes_on().await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    for writer in writers {
        longest = longest.max(writer.await.unwrap());
    }
    eprintln!(
        "{} writes, the longest took {longest:?}",
        written.load(Ordering::Relaxed)
    );
}

#[tokio::test]
async fn a_transfer_names_a_member_or_changes_nothing() {
    let dev = Dev::start();
    let api = dev.api(0);
    let leader = dev.leader().await;
    let again = api
        .post("cluster/transfer", json!({ "to": dev.file.nodes[leader].id }))
        .await
        .ok(200);
    assert_eq!(
        again["leader"], dev.file.nodes[leader].id.0,
        "it leads already: nothing happens"
    );
    let unknown = api.post("cluster/transfer", json!({ "to": 9 })).await;
    assert_eq!(unknown.fields(), ["to"]);
    unknown.problem(400, "invalid_request");
    api.post("cluster/transfer", json!({ "node": 1 }))
        .await
        .problem(400, "invalid_request");
    assert_eq!(dev.leader().await, leader);
}
