//! The stream of events.

use futures::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};

use super::support::{PATIENCE, TestNode};

/// A watcher that reads until it has as many events as wanted.
pub(crate) struct Watch {
    stream: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    text: String,
}

impl Watch {
    pub(crate) async fn open(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let stream = response
            .bytes_stream()
            .map(|chunk| chunk.map(|bytes| bytes.to_vec()))
            .boxed();
        Self {
            stream,
            text: String::new(),
        }
    }

    /// The next event's id and data.
    pub(crate) async fn next(&mut self) -> (String, Value) {
        let reading = async {
            loop {
                while let Some((frame, rest)) = self.text.split_once("\n\n") {
                    let (frame, rest) = (frame.to_owned(), rest.to_owned());
                    self.text = rest;
                    let line = |name: &str| {
                        frame
                            .lines()
                            .find_map(|line| line.strip_prefix(name))
                            .map(str::trim)
                    };
                    if let Some(data) = line("data:") {
                        return (
                            line("id:").unwrap().to_owned(),
                            serde_json::from_str(data).unwrap(),
                        );
                    }
                }
                let chunk = self.stream.next().await.expect("the stream ended").unwrap();
                self.text.push_str(std::str::from_utf8(&chunk).unwrap());
            }
        };
        tokio::time::timeout(PATIENCE, reading)
            .await
            .expect("no event came")
    }
}

async fn register(node: &TestNode, id: &str) {
    node.post("/api/v1/agents/register", json!({ "agentId": id }))
        .await
        .is(201);
}

#[tokio::test]
async fn a_watcher_sees_what_happens_and_goes_on_where_it_stopped() {
    let node = TestNode::start().await;
    let mut watch = Watch::open(node.as_admin(Method::GET, "/api/v1/events")).await;
    register(&node, "one").await;
    register(&node, "two").await;
    let (first_id, first) = watch.next().await;
    assert_eq!(
        (&first["kind"], &first["subject"]),
        (&json!("agent.registered"), &json!("one"))
    );
    assert_eq!(first["id"], first_id);
    assert_eq!(first["record"]["agentId"], "one");
    assert!(first_id.starts_with(&format!("{}.", first["revision"])));
    let (second_id, second) = watch.next().await;
    assert_eq!(second["subject"], "two");
    drop(watch);

    let after = node.as_admin(Method::GET, &format!("/api/v1/events?after={first_id}"));
    assert_eq!(
        Watch::open(after).await.next().await,
        (second_id.clone(), second.clone())
    );
    // A browser repeats its first query and adds the last id that it saw: the latter counts.
    let resumed = node
        .as_admin(Method::GET, "/api/v1/events?after=0.0")
        .header("last-event-id", first_id);
    assert_eq!(Watch::open(resumed).await.next().await, (second_id, second));
}

/// An event told how many sessions an agent had when it was read, which was not the same on every node.
#[tokio::test]
async fn an_event_says_the_same_whenever_it_is_read() {
    let node = TestNode::start().await;
    let watch = async || {
        let mut watch =
            Watch::open(node.as_admin(Method::GET, "/api/v1/events?after=0.0&kinds=agent,token")).await;
        let mut events = Vec::new();
        while !events
            .last()
            .is_some_and(|(_, event): &(String, Value)| event["kind"] == "agent.registered")
        {
            events.push(watch.next().await);
        }
        events
    };
    register(&node, "one").await;
    let before = watch().await;
    let session = json!({ "template": "sleep", "whenFull": "queue" });
    node.post("/api/v1/sessions", session).await.is(202);
    assert_eq!(watch().await, before);
    let (_, registered) = before.last().unwrap();
    assert_eq!(registered["record"].get("activeSessions"), None);
}

#[tokio::test]
async fn a_watcher_chooses_kinds_and_sees_only_what_it_may() {
    let node = TestNode::start().await;
    let _agent = node.agent("dev").await;
    let (alice, bob) = (node.user("alice", "user").await, node.user("bob", "user").await);
    let path = "/api/v1/events?kinds=session.created,template";
    let mut all = Watch::open(node.as_admin(Method::GET, path)).await;
    let mut own = Watch::open(node.request(Method::GET, "/api/v1/events?kinds=session", &bob)).await;
    node.call(
        Method::POST,
        "/api/v1/sessions",
        &alice,
        json!({ "template": "demo" }),
    )
    .await
    .is(202);
    node.call(
        Method::POST,
        "/api/v1/sessions",
        &bob,
        json!({ "template": "demo" }),
    )
    .await
    .is(202);
    assert_eq!(all.next().await.1["record"]["user"], "alice");
    assert_eq!(all.next().await.1["kind"], "session.created");
    assert_eq!(
        own.next().await.1["record"]["user"],
        "bob",
        "the first event of a user is of their own session"
    );
}

#[tokio::test]
async fn an_event_that_cannot_be_resumed_from_is_410() {
    let node = TestNode::start().await;
    let revision: u64 = node
        .get("/api/v1/sessions")
        .await
        .header("x-regent-index")
        .parse()
        .unwrap();
    let ahead = node
        .get(&format!("/api/v1/events?after={}.0", revision + (1 << 40)))
        .await;
    ahead.is_problem(410, "gone");
    for bad in ["after=x", "after=1", "after=1.-1", "kinds=nonsense", "colour=red"] {
        node.get(&format!("/api/v1/events?{bad}"))
            .await
            .is_problem(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_revoked_token_ends_its_stream() {
    let node = TestNode::start().await;
    let alice = node.user("alice", "user").await;
    let response = node
        .request(Method::GET, "/api/v1/events", &alice)
        .send()
        .await
        .unwrap();
    node.call(Method::POST, "/api/v1/auth/logout", &alice, Value::Null)
        .await
        .is(204);
    let ended = tokio::time::timeout(PATIENCE, response.bytes()).await;
    assert!(ended.is_ok(), "the stream goes on under a revoked token");
}

#[tokio::test]
async fn a_node_that_stops_ends_its_streams() {
    let node = TestNode::start().await;
    let response = node.as_admin(Method::GET, "/api/v1/events").send().await.unwrap();
    node.stop().await;
    assert!(
        tokio::time::timeout(PATIENCE, response.bytes()).await.is_ok(),
        "the stream outlives its node"
    );
}
