//! Elections against nodes that do what a test tells them: lose answers, freeze, refuse, answer late.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, Uri};
use futures::StreamExt as _;
use regent_client::clock::boot_ms;
use regent_client::{Client, LeaderElector, Leadership, Loss, Standing};
use regent_types::lease::AcquireLease;
use regent_types::{Code, LeaseName, Problem, Token};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

/// Above anything that a test waits for.
const PATIENCE: Duration = Duration::from_secs(90);
const TTL: u64 = 1_000;
/// What a guard of [`TTL`] lasts.
const HOLD: u64 = 980;

/// What a node was asked, and when it arrived.
#[derive(Debug, Clone)]
struct Seen {
    at: u64,
    what: String,
    key: Option<String>,
    body: Value,
    /// The how-manieth request of this kind, from 1.
    nth: usize,
}

/// What a node does with a request.
enum Act {
    Say(u16, String),
    SayAfter(Duration, u16, String),
    /// Takes it and never answers, as a process that is frozen. Says so when the connection closes.
    Freeze(Arc<AtomicBool>),
}

type Script = Box<dyn FnMut(&Seen) -> Act + Send>;

struct Node {
    url: String,
    shared: Arc<Shared>,
}

struct Shared {
    seen: Mutex<Vec<Seen>>,
    script: Mutex<Script>,
}

struct OnClose(Arc<AtomicBool>);

impl Drop for OnClose {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let what = uri.path().rsplit('/').next().unwrap().to_owned();
    let act = {
        let mut all = shared.seen.lock().unwrap();
        let seen = Seen {
            at: boot_ms(),
            nth: all.iter().filter(|seen| seen.what == what).count() + 1,
            what,
            key: headers
                .get("idempotency-key")
                .map(|key| key.to_str().unwrap().to_owned()),
            body: serde_json::from_slice(&body).unwrap_or_default(),
        };
        all.push(seen.clone());
        (shared.script.lock().unwrap())(&seen)
    };
    let (status, body) = match act {
        Act::Say(status, body) => (status, body),
        Act::SayAfter(after, status, body) => {
            tokio::time::sleep(after).await;
            (status, body)
        }
        Act::Freeze(closed) => {
            let _closed = OnClose(closed);
            std::future::pending().await
        }
    };
    Response::builder()
        .status(StatusCode::from_u16(status).unwrap())
        .body(Body::from(body))
        .unwrap()
}

impl Node {
    async fn start(script: impl FnMut(&Seen) -> Act + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            seen: Mutex::default(),
            script: Mutex::new(Box::new(script)),
        });
        let app = Router::new().fallback(answer).with_state(shared.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared }
    }

    fn seen(&self, what: &str) -> Vec<Seen> {
        let seen = self.shared.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.what == what).cloned().collect()
    }
}

/// A node that dies with every request in its hands: the URL, and the requests.
async fn dies_with_each() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let shared = requests.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = String::new();
            let mut piece = [0; 4096];
            while !text.contains('}') {
                let read = stream.read(&mut piece).await.unwrap();
                text.push_str(&String::from_utf8_lossy(&piece[..read]));
            }
            shared.lock().unwrap().push(text);
        }
    });
    (url, requests)
}

fn granted(token: u64, waited: bool) -> Act {
    let grant = json!({ "name": "l", "holder": "me", "token": token, "ttlMs": TTL, "waited": waited });
    Act::Say(200, grant.to_string())
}

fn renewed(token: u64) -> String {
    json!({ "token": token, "ttlMs": TTL }).to_string()
}

fn refused(code: Code) -> Act {
    let problem = Problem::new(code, "as scripted");
    Act::Say(problem.status, serde_json::to_string(&problem).unwrap())
}

/// A node that grants, renews and releases.
fn willing(seen: &Seen) -> Act {
    match seen.what.as_str() {
        "acquire" => granted(7, false),
        "renew" | "release" => Act::Say(200, renewed(7)),
        other => panic!("{other}"),
    }
}

fn never() -> Act {
    Act::Freeze(Arc::default())
}

fn client(servers: &[&str]) -> Client {
    Client::new(servers, Some("secret".to_owned())).unwrap()
}

fn lease() -> LeaseName {
    LeaseName::new("l").unwrap()
}

fn elector(servers: &[&str]) -> LeaderElector {
    LeaderElector::new(client(servers), lease(), "me").ttl(Duration::from_millis(TTL))
}

async fn patiently<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it never came")
}

async fn eventually(what: &str, mut look: impl FnMut() -> bool) {
    patiently(async {
        while !look() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(look(), "{what}");
}

async fn lead(elector: &LeaderElector) -> Leadership {
    patiently(elector.campaign()).await.unwrap()
}

#[tokio::test]
async fn a_grant_counts_from_its_sending_and_ends_before_the_ttl() {
    let node = Node::start(|seen| match seen.what.as_str() {
        "renew" => never(),
        _ => willing(seen),
    })
    .await;
    let before = boot_ms();
    let leadership = lead(&elector(&[&node.url])).await;
    assert_eq!(leadership.token(), Token(7));
    let until = leadership.valid_until();
    let arrived = node.seen("acquire")[0].at;
    assert!(
        (before + HOLD..=arrived + HOLD).contains(&until),
        "{before} {until} {arrived}"
    );
    assert_eq!(patiently(leadership.invalid()).await, Standing::Lapsed);
    assert!(boot_ms() >= until && !leadership.is_valid());
}

#[tokio::test]
async fn a_grant_whose_answer_was_lost_comes_back_under_the_same_key() {
    let (dying, requests) = dies_with_each().await;
    let node = Node::start(|seen| match seen.what.as_str() {
        "acquire" => granted(9, true),
        _ => willing(seen),
    })
    .await;
    let leadership = lead(&elector(&[&dying, &node.url])).await;
    assert!(leadership.is_valid() && leadership.token() == Token(9));
    let again = node.seen("acquire")[0].clone();
    let lost = requests.lock().unwrap()[0].to_lowercase();
    assert!(
        lost.contains(&format!("idempotency-key: {}", again.key.unwrap())),
        "{lost}"
    );
    let body: Value = serde_json::from_str(lost.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["ttlms"], again.body["ttlMs"]);
    assert_eq!(
        body["waitms"], again.body["waitMs"],
        "another body is another request"
    );
}

#[tokio::test]
async fn a_grant_that_waited_is_renewed_before_it_is_acted_on() {
    let node = Node::start(|seen| match seen.what.as_str() {
        "acquire" => granted(7, true),
        "renew" => Act::SayAfter(Duration::from_millis(150), 200, renewed(7)),
        _ => willing(seen),
    })
    .await;
    let leadership = lead(&elector(&[&node.url])).await;
    let first = node.seen("renew")[0].at;
    assert!(boot_ms() >= first + 150, "not before the acknowledgement");
    // Later renewals may have been acknowledged by now, each counting from its own sending.
    let last = node.seen("renew").last().unwrap().at;
    assert!(leadership.is_valid() && leadership.valid_until() <= last + HOLD);
}

#[tokio::test]
async fn a_grant_that_was_taken_back_before_its_first_renewal_is_campaigned_for_anew() {
    let node = Node::start(|seen| match (seen.what.as_str(), seen.nth) {
        ("acquire", 1) => granted(7, true),
        ("renew", 1) => refused(Code::LeaseLost),
        ("acquire", 2) => granted(8, true),
        _ => Act::Say(200, renewed(8)),
    })
    .await;
    let leadership = lead(&elector(&[&node.url])).await;
    assert_eq!(leadership.token(), Token(8));
    let keys: Vec<_> = node.seen("acquire").into_iter().map(|seen| seen.key).collect();
    assert_ne!(keys[0], keys[1], "another candidacy has another key");
}

#[tokio::test]
async fn a_frozen_node_costs_a_hedge_and_not_the_lease() {
    let frozen = Node::start(|seen| match seen.what.as_str() {
        "renew" => never(),
        _ => willing(seen),
    })
    .await;
    let other = Node::start(willing).await;
    let leadership = lead(&elector(&[&frozen.url, &other.url])).await;
    let end = boot_ms() + 3 * TTL;
    let mut changes = leadership.changes();
    while boot_ms() < end {
        let standing = changes.borrow_and_update().clone();
        assert!(matches!(standing, Standing::Valid { .. }), "{standing:?}");
        patiently(changes.changed()).await.unwrap();
    }
    let asked = frozen.seen("renew").len();
    assert_eq!(asked, 1, "from then on the node that answers is asked first");
    assert!(other.seen("renew").len() >= 10);
}

#[tokio::test]
async fn a_late_answer_counts_from_its_own_sending() {
    let node = Node::start(|seen| match (seen.what.as_str(), seen.nth) {
        ("renew", 1) => Act::SayAfter(Duration::from_millis(600), 200, renewed(7)),
        ("renew", _) => never(),
        _ => willing(seen),
    })
    .await;
    let leadership = lead(&elector(&[&node.url])).await;
    let granted_until = leadership.valid_until();
    let mut changes = leadership.changes();
    let longer = patiently(
        changes.wait_for(|standing| matches!(standing, Standing::Valid { until } if *until > granted_until)),
    )
    .await
    .unwrap()
    .clone();
    let sent = node.seen("renew")[0].at;
    let Standing::Valid { until } = longer else {
        unreachable!()
    };
    assert!(boot_ms() >= sent + 600);
    assert!(until <= sent + HOLD, "{until} {sent}");
}

#[tokio::test]
async fn a_guard_that_ran_out_is_won_back_by_the_same_token() {
    let began = boot_ms();
    let node = Node::start(move |seen| match seen.what.as_str() {
        "renew" if boot_ms() < began + 2 * TTL => refused(Code::NoQuorum),
        _ => willing(seen),
    })
    .await;
    let leadership = lead(&elector(&[&node.url])).await;
    assert_eq!(patiently(leadership.invalid()).await, Standing::Lapsed);
    assert!(!leadership.is_valid());
    let mut changes = leadership.changes();
    patiently(changes.wait_for(|standing| matches!(standing, Standing::Valid { .. })))
        .await
        .unwrap();
    assert!(leadership.is_valid());
    // Without a pause between rounds it would be thousands.
    assert!(node.seen("renew").len() < 100, "{}", node.seen("renew").len());
}

#[tokio::test]
async fn a_refusal_that_stands_ends_it_and_nothing_is_given_back() {
    for (code, held) in [(Code::LeaseLost, true), (Code::Forbidden, false)] {
        let node = Node::start(move |seen| match (seen.what.as_str(), seen.nth) {
            // A renewal that is sent before the loss and answered after it.
            ("renew", 1) => Act::SayAfter(Duration::from_millis(400), 200, renewed(7)),
            ("renew", _) => refused(code),
            _ => willing(seen),
        })
        .await;
        let leadership = lead(&elector(&[&node.url])).await;
        let loss = patiently(leadership.lost()).await;
        match &loss {
            Loss::NotHeld(problem) => assert!(held && problem.code == code),
            Loss::Refused(problem) => assert!(!held && problem.code == code),
            Loss::Resigned => panic!("nobody resigned"),
        }
        assert!(!leadership.is_valid(), "at once, whatever the guard had left");
        let asked = node.seen("renew").len();
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert!(!leadership.is_valid(), "no late answer brings it back");
        assert_eq!(node.seen("renew").len(), asked);
        leadership.resign().await.unwrap();
        assert!(node.seen("release").is_empty());
    }
}

#[tokio::test]
async fn resigning_and_dropping_give_it_back_also_from_outside_the_runtime() {
    let node = Node::start(willing).await;
    let elector = elector(&[&node.url]);
    let leadership = lead(&elector).await;
    leadership.resign().await.unwrap();
    let release = node.seen("release");
    assert_eq!((release.len(), &release[0].body), (1, &json!({ "token": 7 })));

    let leadership = lead(&elector).await;
    let changes = leadership.changes();
    std::thread::spawn(move || drop(leadership)).join().unwrap();
    assert_eq!(*changes.borrow(), Standing::Lost(Loss::Resigned));
    eventually("the release of what was dropped", || {
        node.seen("release").len() == 2
    })
    .await;
}

#[tokio::test]
async fn a_release_goes_past_a_frozen_node() {
    let frozen = Node::start(|seen| match seen.what.as_str() {
        "release" => never(),
        _ => willing(seen),
    })
    .await;
    let other = Node::start(|seen| match seen.what.as_str() {
        "release" => refused(Code::LeaseLost),
        _ => willing(seen),
    })
    .await;
    let leadership = lead(&elector(&[&frozen.url, &other.url])).await;
    // The frozen node may have done it: then "lost" is what was asked for.
    patiently(leadership.resign()).await.unwrap();
    assert_eq!(frozen.seen("release").len(), 1);
    assert_eq!(other.seen("release")[0].key, frozen.seen("release")[0].key);
}

#[tokio::test]
async fn who_gives_up_leaves_the_queue() {
    let closed = Arc::new(AtomicBool::new(false));
    let script = closed.clone();
    let node = Node::start(move |_| Act::Freeze(script.clone())).await;
    let campaign = tokio::spawn({
        let elector = elector(&[&node.url]);
        async move { elector.campaign().await.map(drop) }
    });
    eventually("a place in the queue", || node.seen("acquire").len() == 1).await;
    assert!(!closed.load(Ordering::SeqCst));
    campaign.abort();
    eventually("the end of the connection", || closed.load(Ordering::SeqCst)).await;
}

#[tokio::test]
async fn a_wait_is_sliced_under_one_key_and_body_and_ends_when_it_is_over() {
    // Each "held" comes when the slice is over, as from a real node.
    let held = |seen: &Seen| {
        let problem = Problem::new(Code::LeaseHeld, "held").with("holder", "other");
        let wait = Duration::from_millis(seen.body["waitMs"].as_u64().unwrap_or(0));
        Act::SayAfter(wait, 409, serde_json::to_string(&problem).unwrap())
    };
    let node = Node::start(held).await;
    let acquire = |wait_ms| AcquireLease {
        holder: "me".to_owned(),
        ttl_ms: TTL,
        wait_ms: Some(wait_ms),
    };
    let began = boot_ms();
    let error = patiently(client(&[&node.url]).acquire_lease(&lease(), &acquire(5_200)))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::LeaseHeld));
    assert_eq!(error.problem().unwrap().extra["holder"], "other");
    assert!(boot_ms() >= began + 5_000);
    let asked = node.seen("acquire");
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert_eq!((&asked[0].key, &asked[0].body), (&asked[1].key, &asked[1].body));
    assert_eq!(asked[0].body["waitMs"], 2_600);
    // It will not come again, and says so: its place need not be kept for it.
    assert_eq!(
        (&asked[2].key, asked[2].body["waitMs"].as_u64()),
        (&asked[0].key, None)
    );
    // Without a wait it is one request, and its body says nothing of one.
    let node = Node::start(|_| refused(Code::LeaseHeld)).await;
    let error = elector(&[&node.url]).wait(Duration::ZERO).campaign().await;
    assert_eq!(error.unwrap_err().code(), Some(Code::LeaseHeld));
    assert_eq!(node.seen("acquire").len(), 1);
    assert_eq!(node.seen("acquire")[0].body.get("waitMs"), None);
}

#[tokio::test]
async fn a_node_that_does_not_wait_is_not_asked_in_a_loop_without_a_pause() {
    let node = Node::start(|_| refused(Code::LeaseHeld)).await;
    let error = elector(&[&node.url])
        .wait(Duration::from_millis(800))
        .campaign()
        .await;
    assert_eq!(error.unwrap_err().code(), Some(Code::LeaseHeld));
    assert!(node.seen("acquire").len() < 60, "{}", node.seen("acquire").len());
}

#[tokio::test]
async fn a_watch_shows_who_leads_and_begins_anew_when_it_fell_behind() {
    let event = |id: &str, kind: &str, record: Value| {
        let event = json!({ "id": id, "revision": 5, "time": "2026-01-01T00:00:00Z", "kind": kind,
            "subject": "l", "record": record });
        format!("id: {id}\ndata: {event}\n\n")
    };
    let of = |holder: &str, token: u64| json!({ "holder": holder, "token": token });
    let streams = [
        event("5.0", "lease.state", Value::Null) + &event("6.0", "lease.granted", of("a", 6)),
        event("7.0", "lease.queued", of("b", 0))
            + &event("8.0", "lease.released", of("a", 6))
            + &event("8.1", "lease.granted", of("b", 8))
            + "event: gone\ndata: too slow\n\n",
        event("9.0", "lease.state", of("b", 8)) + &event("9.1", "lease.force_released", of("b", 8)),
    ];
    let node = Node::start(move |seen| match streams.get(seen.nth - 1) {
        Some(stream) => Act::Say(200, stream.clone()),
        None => refused(Code::Forbidden),
    })
    .await;
    let states: Vec<_> = patiently(elector(&[&node.url]).observe().collect()).await;
    let shown: Vec<_> = states
        .iter()
        .map(|state| match state {
            Ok(state) => state.leader.as_ref().map_or("nobody".to_owned(), |leader| {
                format!("{} {}", leader.holder, leader.token)
            }),
            Err(error) => format!("{:?}", error.code().unwrap()),
        })
        .collect();
    assert_eq!(shown, ["nobody", "a 6", "nobody", "b 8", "nobody", "Forbidden"]);
}
