//! What the clients do all the time, on every node, and what they record of it.
//!
//! A call goes to one node and is made once: what its answer says of it is what is recorded. Only what the contract
//! calls certain is taken for certain: 503 is not done, 504 and a broken connection may be done.

pub(crate) mod leases;
pub(crate) mod registers;
pub(crate) mod reports;
pub(crate) mod sessions;
pub(crate) mod watches;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use reqwest::{Method, RequestBuilder};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cluster::Cluster;

/// How long a client waits for an answer. Longer than an election takes, so that most are heard.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);
/// A moment of rest after something that was refused.
const REST: Duration = Duration::from_millis(20);

/// How often it is looked whether a host has a node by now.
const ABSENT: Duration = Duration::from_millis(50);

/// What all clients share.
pub(crate) struct Run {
    pub(crate) cluster: Arc<Cluster>,
    begun: Instant,
    stopping: AtomicBool,
    /// One for each node: a connection that hangs is that node's.
    http: Vec<reqwest::Client>,
}

/// What came of a call.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Done.
    Done { etag: String, body: Value },
    /// Certainly not done, with the status; 0 when nobody was reached.
    Refused(u16, Value),
    /// Nobody knows.
    Unknown,
}

impl Run {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Arc<Self> {
        let client = || {
            reqwest::Client::builder()
                .timeout(ANSWER_WITHIN)
                .pool_max_idle_per_host(8)
                .build()
                .unwrap()
        };
        Arc::new(Self {
            http: (0..cluster.plan.seats()).map(|_| client()).collect(),
            cluster,
            begun: Instant::now(),
            stopping: AtomicBool::new(false),
        })
    }

    /// Nanoseconds since the run began.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).expect("a run is short")
    }

    /// Whether the clients shall go on.
    pub(crate) fn goes_on(&self) -> bool {
        !self.stopping.load(Ordering::Relaxed)
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Waits, but not beyond the end of the run.
    pub(crate) async fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        while self.goes_on() && Instant::now() < until {
            tokio::time::sleep(REST.min(until - Instant::now())).await;
        }
    }

    /// A request to a path under `/api/v1` of a node.
    pub(crate) fn request(&self, node: usize, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}/api/v1/{path}", self.cluster.url(node));
        self.http[node]
            .request(method, url)
            .bearer_auth(self.cluster.token())
    }

    /// Waits until a node is on that host; `false` at the end of the run.
    pub(crate) async fn node_on(&self, host: usize) -> bool {
        while self.goes_on() && self.cluster.seats.at(host).is_none() {
            tokio::time::sleep(ABSENT).await;
        }
        self.goes_on()
    }

    /// Any node, whatever it is to the cluster just then.
    pub(crate) fn any_node(&self, random: &mut StdRng) -> usize {
        *one_of(random, &self.cluster.seats.taken())
    }

    /// Randomness for one client, from the seed.
    pub(crate) fn random(&self, client: u64) -> StdRng {
        StdRng::seed_from_u64(self.cluster.plan.seed ^ (client + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

/// Sends once.
pub(crate) async fn send(request: RequestBuilder) -> Answer {
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) if error.is_connect() => return Answer::Refused(0, Value::Null),
        Err(_) => return Answer::Unknown,
    };
    let status = response.status();
    let etag = response.headers().get("etag").and_then(|etag| etag.to_str().ok());
    let etag = etag.unwrap_or_default().to_owned();
    let text = response.text().await;
    let body = text
        .as_deref()
        .ok()
        .and_then(|text| serde_json::from_str(text).ok());
    match (status.as_u16(), text) {
        // What was answered is done, even if the rest of the answer is lost; but what it says is not known then.
        (200..300, Ok(_)) => Answer::Done {
            etag,
            body: body.unwrap_or(Value::Null),
        },
        (400..500 | 503, _) => Answer::Refused(status.as_u16(), body.unwrap_or(Value::Null)),
        _ => Answer::Unknown,
    }
}

/// One of these.
pub(crate) fn one_of<'a, T>(random: &mut StdRng, all: &'a [T]) -> &'a T {
    &all[random.random_range(0..all.len())]
}

/// Waits for clients that were told to stop.
pub(crate) async fn ended(mut clients: JoinSet<()>) {
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client does not fail, whatever it is answered");
    }
}
