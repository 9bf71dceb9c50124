//! Registers: the tags of sessions that nobody else touches, read, written, and written with `If-Match`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt as _;
use regent_history::register::{Call, INITIAL, Op};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{Answer, REST, Run, one_of, send};
use crate::harness::eventually;

/// Registers, and clients of each node. Few and many: they must meet.
const REGISTERS: usize = 4;
const CLIENTS: usize = 2;

/// What the clients did, by register.
#[derive(Default)]
pub(crate) struct Registers {
    names: Vec<String>,
    next: AtomicU64,
    calls: Mutex<BTreeMap<String, Vec<Call>>>,
}

impl Registers {
    pub(crate) async fn new(run: &Arc<Run>) -> Arc<Self> {
        let mut names = Vec::new();
        for _ in 0..REGISTERS {
            let body =
                json!({ "template": "sleep", "whenFull": "queue", "placement": { "region": "nowhere" } });
            let name = eventually("a session for a register", || async {
                let request = run.request(0, Method::POST, "sessions").json(&body);
                match send(request).await {
                    Answer::Done { body, .. } => Some(body["name"].as_str()?.to_owned()),
                    Answer::Refused(..) | Answer::Unknown => None,
                }
            })
            .await;
            names.push(name);
        }
        Arc::new(Self {
            names,
            next: AtomicU64::new(INITIAL + 1),
            ..Self::default()
        })
    }

    pub(crate) fn spawn(self: &Arc<Self>, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        for node in 0..run.cluster.plan.seats() {
            for number in 0..CLIENTS {
                let id = u32::try_from(node * 10 + number).unwrap();
                clients.spawn(self.clone().client(run.clone(), node, id));
            }
        }
    }

    /// What was recorded, by register.
    pub(crate) fn calls(&self) -> BTreeMap<String, Vec<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One write of a register through one node, for who wants to know whether it serves.
    pub(crate) async fn probe(&self, run: &Run, node: usize) -> bool {
        let value = self.next.fetch_add(1, Ordering::Relaxed);
        self.write(run, node, 100, &self.names[0], value, None)
            .await
            .is_some()
            && self.read(run, node, 100, &self.names[0]).await.is_some()
    }

    async fn client(self: Arc<Self>, run: Arc<Run>, node: usize, id: u32) {
        let mut random = run.random(u64::from(id));
        let mut known: BTreeMap<String, (u64, String)> = BTreeMap::new();
        while run.node_on(node).await {
            let name = one_of(&mut random, &self.names).clone();
            let kind: u8 = random.random_range(0..10);
            let seen = if kind < 5 {
                self.read(&run, node, id, &name).await
            } else {
                let value = self.next.fetch_add(1, Ordering::Relaxed);
                // What it expects is what it saw last, by now often not true any more.
                let expected = known.remove(&name).filter(|_| kind < 8);
                self.write(&run, node, id, &name, value, expected).await
            };
            match seen {
                Some(seen) => drop(known.insert(name, seen)),
                None => run.rest(REST).await,
            }
            run.rest(Duration::from_millis(random.random_range(0..20))).await;
        }
    }

    fn record(&self, name: &str, call: Call) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.entry(name.to_owned()).or_default().push(call);
    }

    /// Gives what it saw, and its `ETag`.
    async fn read(&self, run: &Run, node: usize, client: u32, name: &str) -> Option<(u64, String)> {
        let invoked = run.now();
        let answer = send(run.request(node, Method::GET, &format!("sessions/{name}"))).await;
        let Answer::Done { etag, body } = answer else {
            return None;
        };
        let seen = value(&body);
        let call = Call {
            client,
            invoked,
            returned: Some(run.now()),
            op: Op::Read,
            seen: Some(seen),
        };
        self.record(name, call);
        Some((seen, etag))
    }

    async fn write(
        &self,
        run: &Run,
        node: usize,
        client: u32,
        name: &str,
        value: u64,
        expected: Option<(u64, String)>,
    ) -> Option<(u64, String)> {
        let mut request = run.request(node, Method::PATCH, &format!("sessions/{name}"));
        if let Some((_, etag)) = &expected {
            request = request.header("if-match", etag);
        }
        let invoked = run.now();
        let answer = send(request.json(&json!({ "tags": [format!("v{value}")] }))).await;
        let (returned, etag) = match answer {
            Answer::Done { etag, .. } => (Some(run.now()), Some(etag)),
            Answer::Unknown => (None, None),
            Answer::Refused(..) => return None,
        };
        let op = match expected {
            Some((expected, _)) => Op::Cas { expected, new: value },
            None => Op::Write(value),
        };
        let call = Call {
            client,
            invoked,
            returned,
            op,
            seen: None,
        };
        self.record(name, call);
        etag.map(|etag| (value, etag))
    }
}

/// What a register holds: its only tag.
fn value(session: &Value) -> u64 {
    let tag = session["tags"][0].as_str().unwrap_or("v0");
    tag.trim_start_matches('v')
        .parse()
        .expect("the tags are of this test")
}
