//! The client against scripted nodes: what is repeated, where, and under which key.

#![allow(clippy::unwrap_used)] // helpers of tests are no tests to clippy

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};
use futures::StreamExt;
use regent_client::{Client, Consistency, Error, EventFilter, SessionFilter, Trust};
use regent_types::lease::AcquireLease;
use regent_types::session::{CreateSession, PatchSession};
use regent_types::{Code, LeaseName, Problem, Revision, SessionName, TemplateName, Token};
use serde_json::{Value, json};

/// What a node was asked.
#[derive(Debug, Clone)]
struct Seen {
    method: Method,
    uri: String,
    key: Option<String>,
    authorization: Option<String>,
    last_event_id: Option<String>,
    body: Bytes,
}

/// A node that answers from a script, then with 500.
struct Node {
    url: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Vec<Seen>>,
    script: Mutex<VecDeque<(u16, String)>>,
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let header = |name: &str| Some(headers.get(name)?.to_str().unwrap().to_owned());
    shared.seen.lock().unwrap().push(Seen {
        method,
        uri: uri.to_string(),
        key: header("idempotency-key"),
        authorization: header("authorization"),
        last_event_id: header("last-event-id"),
        body,
    });
    let scripted = shared.script.lock().unwrap().pop_front();
    let (status, body) = scripted.unwrap_or((500, "the script is at its end".to_owned()));
    Response::builder()
        .status(StatusCode::from_u16(status).unwrap())
        .header("etag", "\"7\"")
        .header("x-regent-index", "41")
        .body(Body::from(body))
        .unwrap()
}

impl Node {
    async fn start(script: impl IntoIterator<Item = (u16, String)>) -> Self {
        let shared = Arc::new(Shared {
            script: Mutex::new(script.into_iter().collect()),
            ..Shared::default()
        });
        let app = Router::new().fallback(answer).with_state(shared.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared }
    }

    fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }
}

/// The URL of a node that is not there any more.
async fn gone() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn problem(code: Code) -> (u16, String) {
    let problem = Problem::new(code, "as scripted");
    (problem.status, serde_json::to_string(&problem).unwrap())
}

fn session(name: &str) -> Value {
    json!({
        "name": name, "user": "alice", "template": "demo", "state": "pending", "reason": "", "agentId": null,
        "resources": {}, "persistentHome": false, "idleTimeout": null, "maxSessionDuration": null, "tags": [],
        "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z",
        "status": { "phase": "Pending", "url": null, "message": "", "lastActivity": null },
        "metadata": null, "generation": 1
    })
}

fn made() -> (u16, String) {
    (202, session("alice-demo-1").to_string())
}

fn wanted() -> CreateSession {
    serde_json::from_value(json!({ "template": "demo" })).unwrap()
}

fn name() -> SessionName {
    SessionName::new("alice-demo-1").unwrap()
}

fn client(servers: &[&str]) -> Client {
    Client::new(servers, Some("secret".to_owned())).unwrap()
}

#[tokio::test]
async fn a_node_without_a_leader_passes_the_call_on_under_the_same_key() {
    let one = Node::start([problem(Code::NoLeader)]).await;
    let two = Node::start([problem(Code::OutcomeUnknown), made(), made()]).await;
    let client = client(&[&one.url, &two.url]);
    // After the 504 of the second node the first is asked again; its script is at its end: 500.
    assert_eq!(client.create_session(&wanted()).await.unwrap().name, name());
    let keys: Vec<_> = one
        .seen()
        .iter()
        .chain(&two.seen())
        .map(|seen| seen.key.clone().unwrap())
        .collect();
    assert_eq!(keys.len(), 4, "{keys:?}");
    assert!(
        keys.iter().all(|key| *key == keys[0]),
        "one key for one call: {keys:?}"
    );
    assert_eq!(one.seen()[0].authorization.as_deref(), Some("Bearer secret"));

    client.create_session(&wanted()).await.unwrap();
    let last = two.seen().pop().unwrap();
    assert_ne!(last.key.as_ref(), Some(&keys[0]), "another call has another key");
    assert_eq!(one.seen().len(), 2, "the node that answered last is asked first");
}

#[tokio::test]
async fn a_node_that_is_gone_is_passed_over_and_when_all_are_it_is_said_so() {
    let node = Node::start([made()]).await;
    let dead = gone().await;
    client(&[&dead, &node.url])
        .create_session(&wanted())
        .await
        .unwrap();

    let error = client(&[&dead]).create_session(&wanted()).await.unwrap_err();
    assert!(error.is_retryable());
    assert!(
        matches!(&error, Error::Unreachable { maybe_done: false, servers, .. } if *servers == [dead]),
        "{error:?}"
    );
}

#[tokio::test]
async fn refusals_are_typed_and_not_repeated() {
    for code in [
        Code::NoAgentsAvailable,
        Code::Busy,
        Code::TemplateNotFound,
        Code::QuotaExceeded,
    ] {
        let node = Node::start([problem(code), made()]).await;
        let error = client(&[&node.url]).create_session(&wanted()).await.unwrap_err();
        assert_eq!(error.code(), Some(code));
        assert_eq!(
            error.is_retryable(),
            matches!(code, Code::NoAgentsAvailable | Code::Busy)
        );
        assert_eq!(node.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_conditional_change_is_not_repeated_in_doubt_and_a_removal_that_was_done_is_a_success() {
    let node = Node::start([problem(Code::OutcomeUnknown), problem(Code::Changed)]).await;
    let patched = client(&[&node.url])
        .patch_session(&name(), &PatchSession::default(), Some("\"7\""))
        .await;
    assert_eq!(patched.unwrap_err().code(), Some(Code::OutcomeUnknown));
    assert_eq!(node.seen().len(), 1);

    let template = TemplateName::new("demo").unwrap();
    let node = Node::start([problem(Code::OutcomeUnknown), problem(Code::TemplateNotFound)]).await;
    client(&[&node.url]).delete_template(&template).await.unwrap();
    let node = Node::start([problem(Code::NoLeader), problem(Code::TemplateNotFound)]).await;
    let error = client(&[&node.url]).delete_template(&template).await.unwrap_err();
    assert_eq!(
        error.code(),
        Some(Code::TemplateNotFound),
        "it was not there before"
    );
}

#[tokio::test]
async fn doubt_is_not_forgotten_when_later_attempts_certainly_did_nothing() {
    let node = Node::start(
        [problem(Code::OutcomeUnknown)]
            .into_iter()
            .chain(vec![problem(Code::NoQuorum); 100]),
    )
    .await;
    let client = client(&[&node.url]).with_deadline(Duration::from_millis(300));
    let error = client.create_session(&wanted()).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::OutcomeUnknown));
    let node = Node::start(vec![problem(Code::NoQuorum); 100]).await;
    let client = self::client(&[&node.url]).with_deadline(Duration::from_millis(300));
    let error = client.create_session(&wanted()).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NoQuorum));
}

#[tokio::test]
async fn names_are_encoded_and_reads_say_how_fresh_they_must_be() {
    let grant = json!({ "name": "agent/dev", "holder": "h", "token": 9, "ttlMs": 1000, "waited": false });
    let node = Node::start([
        (200, grant.to_string()),
        (200, json!({ "token": 9, "ttlMs": 1000 }).to_string()),
        (200, session("alice-demo-1").to_string()),
        (200, session("alice-demo-1").to_string()),
    ])
    .await;
    let client = client(&[&node.url]);
    let lease = LeaseName::new("agent/dev").unwrap();
    let acquire = AcquireLease {
        holder: "h".to_owned(),
        ttl_ms: 1000,
        wait_ms: None,
    };
    let grant = client.acquire_lease(&lease, &acquire).await.unwrap();
    assert_eq!(grant.token, Token(9));
    client.renew_lease(&lease, grant.token).await.unwrap();
    let fresh = client.with_consistency(Consistency::AtLeast(Revision(12)));
    fresh.session(&name()).await.unwrap();
    let tagged = client.session_tagged(&name()).await.unwrap();
    assert_eq!(tagged.etag.as_deref(), Some("\"7\""));

    let seen = node.seen();
    assert_eq!(seen[0].uri, "/api/v1/leases/agent%2Fdev/acquire");
    assert_eq!(
        serde_json::from_slice::<Value>(&seen[0].body).unwrap()["ttlMs"],
        1000
    );
    assert!(seen[1].key.is_none(), "a renewal is never replayed");
    assert!(seen[2].uri.contains("min_index=12"), "{}", seen[2].uri);
    assert_eq!((seen[3].method.clone(), seen[3].key.clone()), (Method::GET, None));
    let dots = LeaseName::new("..").unwrap();
    assert!(matches!(client.lease(&dots).await, Err(Error::Configuration(_))));
}

#[tokio::test]
async fn all_pages_are_gathered() {
    let page = |names: [&str; 2], next: Option<&str>| {
        let sessions: Vec<Value> = names.iter().map(|name| session(name)).collect();
        let mut list = json!({ "sessions": sessions, "total": 4 });
        if let Some(next) = next {
            list["nextCursor"] = next.into();
        }
        (200, list.to_string())
    };
    let node = Node::start([page(["a", "b"], Some("x y")), page(["c", "d"], None)]).await;
    let filter = SessionFilter {
        tag: Some("t&t".to_owned()),
        ..SessionFilter::default()
    };
    let all = client(&[&node.url]).all_sessions(&filter).await.unwrap();
    let names: Vec<&str> = all.iter().map(|session| session.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    let uris: Vec<String> = node.seen().into_iter().map(|seen| seen.uri).collect();
    assert!(uris.iter().all(|uri| uri.contains("tag=t%26t")), "{uris:?}");
    assert!(uris[1].contains("cursor=x+y"), "{uris:?}");
}

#[tokio::test]
async fn events_go_on_at_another_node_after_the_last_one_until_they_are_gone() {
    let event = |id: &str| {
        let event = json!({ "id": id, "revision": 5, "time": "2026-01-01T00:00:00Z", "kind": "session.running",
            "subject": "a", "record": null });
        format!("id: {id}\ndata: {event}\n\n")
    };
    // Each answer ends, as when its node is killed.
    let one = Node::start([
        (200, format!(": hello\n\n{}{}", event("5.0"), event("5.1"))),
        problem(Code::Gone),
    ])
    .await;
    let two = Node::start([(200, format!("{}id: 6.0\ndata: cut", event("5.2")))]).await;
    let filter = EventFilter {
        after: Some("4.0".to_owned()),
        kinds: vec!["session.running".to_owned()],
    };
    let got: Vec<_> = client(&[&one.url, &two.url]).events(filter).collect().await;
    let ids: Vec<_> = got
        .iter()
        .map(|one| one.as_ref().map_or("error", |event| event.id.as_str()))
        .collect();
    assert_eq!(ids, ["5.0", "5.1", "5.2", "error"]);
    assert_eq!(got[3].as_ref().unwrap_err().code(), Some(Code::Gone));
    let ids: Vec<_> = [&one.seen()[0], &two.seen()[0], &one.seen()[1]]
        .map(|seen| seen.last_event_id.clone().unwrap())
        .to_vec();
    assert_eq!(ids, ["4.0", "5.1", "5.2"]);
}

#[tokio::test]
async fn a_stream_from_now_on_misses_nothing_when_its_node_dies_before_the_first_event() {
    let event = json!({ "id": "42.0", "revision": 42, "time": "2026-01-01T00:00:00Z", "kind": "session.running",
        "subject": "a", "record": null });
    let node = Node::start([
        (200, ": hello\n\n".to_owned()),
        (
            200,
            format!("id: 42.0\ndata: {event}\n\nevent: gone\ndata: too slow\n\n"),
        ),
    ])
    .await;
    let got: Vec<_> = client(&[&node.url])
        .events(EventFilter::default())
        .collect()
        .await;
    assert_eq!(got[0].as_ref().unwrap().id, "42.0");
    assert_eq!(got[1].as_ref().unwrap_err().code(), Some(Code::Gone));
    assert_eq!(got.len(), 2);
    let ids: Vec<_> = node.seen().into_iter().map(|seen| seen.last_event_id).collect();
    assert_eq!(ids, [None, Some("41.4294967295".to_owned())]);
}

#[test]
fn what_cannot_be_a_server_is_refused() {
    for bad in ["", "ftp://x", "https://", "http://", "http://:1"] {
        assert!(Client::new([bad], None).is_err(), "{bad:?}");
    }
    let client = Client::new(["127.0.0.1:8000", " http://b/ "], None).unwrap();
    assert_eq!(client.servers(), ["http://127.0.0.1:8000", "http://b"]);
}

/// A file that is not there is said when the client is made, and not looked for when no server is asked over TLS.
#[test]
fn a_ca_that_cannot_be_read_is_refused_where_it_is_needed() {
    let trust = Trust {
        ca: Some("/there/is/no/ca.pem".into()),
        identity: None,
    };
    let refused = Client::with_trust(["https://a"], None, &trust).unwrap_err();
    assert!(
        refused.to_string().contains("/there/is/no/ca.pem cannot be read"),
        "{refused}"
    );
    Client::with_trust(["http://a"], None, &trust).unwrap();
}
