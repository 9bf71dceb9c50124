//! Leases kept alive through all nodes: nothing is written for it, and none runs out. The large one, ten thousand
//! leases for a minute with what it costs, is in `benches/load` (`--work keepalive`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use crate::harness::{Dev, eventually};
use crate::wire::{Api, Came, Socket};

/// Connections, spread over the nodes.
const SOCKETS: usize = 6;
/// Leases of each.
const LEASES: usize = 50;
const TTL: Duration = Duration::from_secs(3);

/// A connection that holds leases, by name.
struct Holder {
    socket: Socket,
    tokens: BTreeMap<String, u64>,
    seq: u64,
}

impl Holder {
    async fn start(api: &Api, number: usize) -> Self {
        let id = format!("holder-{number}");
        let key = api.agent(json!({ "agentId": id, "platform": "none" })).await;
        let mut socket = Socket::connect(api, &format!("agent_id={id}"), &key).await;
        let hello = json!({ "protocol": 3, "runtimeId": id, "sessions": [], "leases": [] });
        socket.send(json!({ "type": "hello", "payload": hello })).await;
        socket.frame("welcome").await;
        for lease in 0..LEASES {
            let campaign = json!({ "name": format!("kept/{number}/{lease}"), "ttlMs": TTL.as_millis() });
            socket
                .send(json!({ "type": "lease_campaign", "payload": campaign }))
                .await;
        }
        let mut tokens = BTreeMap::new();
        while tokens.len() < LEASES {
            let granted = socket.frame("lease_granted").await;
            let name = granted["name"].as_str().unwrap().to_owned();
            tokens.insert(name, granted["token"].as_u64().unwrap());
        }
        Self {
            socket,
            tokens,
            seq: 0,
        }
    }

    /// Renews all, and says that it lives; waits until all are acknowledged.
    async fn renew(&mut self) {
        self.socket
            .send(json!({ "type": "heartbeat", "payload": {} }))
            .await;
        for (name, token) in &self.tokens {
            self.seq += 1;
            let keepalive = json!({ "name": name, "token": token, "seq": self.seq });
            self.socket
                .send(json!({ "type": "lease_keepalive", "payload": keepalive }))
                .await;
        }
        let mut open = self.tokens.len();
        while open > 0 {
            match self.socket.next().await {
                Came::Frame(frame) if frame["type"] == "lease_renewed" => open -= 1,
                Came::Frame(frame) => assert_ne!(frame["type"], "lease_lost", "{frame}"),
                Came::Closed(code, reason) => panic!("closed with {code}: {reason}"),
            }
        }
    }
}

async fn applied(dev: &Dev) -> u64 {
    let cluster = dev.api(0).get("cluster").await.ok(200);
    let members = cluster["members"].as_array().unwrap();
    members
        .iter()
        .filter_map(|member| member["appliedIndex"].as_u64())
        .max()
        .unwrap()
}

#[tokio::test]
async fn leases_that_are_kept_alive_write_nothing_and_none_runs_out() {
    let dev = Dev::start();
    dev.written_down().await;
    let mut holders = Vec::new();
    for number in 0..SOCKETS {
        holders.push(Holder::start(&dev.api(number % 3), number).await);
    }
    let before = applied(&dev).await;
    // Long enough for each to run out twice, were it not renewed.
    let until = Instant::now() + 2 * TTL;
    let mut rounds = 0_u32;
    while Instant::now() < until {
        futures::future::join_all(holders.iter_mut().map(Holder::renew)).await;
        rounds += 1;
        tokio::time::sleep(TTL / 5).await;
    }
    let held = dev.api(1).get("leases?limit=1000").await.ok(200);
    let kept = held["leases"].as_array().unwrap().iter();
    let kept = kept.filter(|lease| lease["name"].as_str().unwrap().starts_with("kept/"));
    assert_eq!(kept.count(), SOCKETS * LEASES);
    assert_eq!(
        applied(&dev).await,
        before,
        "{rounds} rounds of {} keepalives wrote to the log",
        SOCKETS * LEASES
    );
    // The rounds were not for nothing: without them all of them end.
    let mut last = holders.pop().unwrap();
    last.renew().await;
    drop(holders);
    eventually("the end of what nobody renews", || async {
        let held = dev.api(2).get("leases?limit=1000").await.ok(200);
        let left = held["leases"].as_array().unwrap().iter();
        let left = left.filter(|lease| lease["name"].as_str().unwrap().starts_with("kept/0/"));
        (left.count() == 0).then_some(())
    })
    .await;
}
